"""Load a labelled task: read its files, check them, and pack proteins, targets and sets into arrays."""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.sequences.ids import digest_sequence
from esm2kit.sequences.letters import FileLetters, LetterCounts
from esm2kit.sequences.similarity import describe_limit
from esm2kit.tasks.config import TaskConfig
from esm2kit.tasks.files import ENDINGS, Source, TaskRecord, parse_split_name, read_description, read_split
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.infer import SPLITS_FOLDER, find_custom_task, infer_task
from esm2kit.tasks.kinds import describe_own_format, find_task_table
from esm2kit.tasks.label_sets import format_label_set, merge_rows, pack_columns, stratify_columns
from esm2kit.tasks.labels import parse_mask, parse_number, parse_residue_targets
from esm2kit.tasks.labels_table import UNASSIGNED, LabelRecords, read_labels
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.pair_files import PairFile, has_pairs, read_pairs
from esm2kit.tasks.pairs import (
    Pairs,
    assign_pair_sets,
    build_keys,
    choose_pair_validation,
    describe_overlap,
    find_repeated_pairs,
    group_proteins,
)
from esm2kit.tasks.split import SHARES, VALIDATION_SHARES, assign_sets, build_strata
from esm2kit.tasks.tables import format_column_name, split_unit
from esm2kit.tasks.task import Level, Split, SplitBy, TargetType, Task

logger = logging.getLogger(__name__)

SET_NAMES = ("train", "validation", "test")
LONGEST_NAME = 60  # characters of the names of several columns in the name of a task


@dataclass(frozen=True)
class TaskData:
    """One split of one task.

    Args:
        task: what is predicted and how it is scored.
        split: name of the split.
        ids: (P) protein ids; FLIP repeats a few.
        sequences: (P) amino-acid sequences.
        sets: (P,) "train", "validation" or "test".
        targets: (P,) one target per protein, or (N,) one per residue, concatenated over proteins. Classes are int64,
            values are float64. A task with several targets per protein has (P, C): labels that are 0 or 1 (int64), or
            values with nan where one is missing.
        scored: (P,) or (N,), False for targets that are ignored, such as unresolved residues.
        files: files that the task was read from.
        notes: what a reader needs to know to interpret a score.
        official: True if the set sizes are FLIP's, so that scores can be compared with published ones.
        split_method: how the sets were chosen; empty if they are those of the files.
        pairs: the second proteins of a task of pairs, whose records are pairs; None for single proteins.
    """

    task: Task
    split: str
    ids: list[str]
    sequences: list[str]
    sets: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    files: dict[str, Path]
    notes: tuple[str, ...] = ()
    official: bool = False
    split_method: str = ""
    pairs: Pairs | None = None

    @cached_property
    def num_residues(self) -> np.ndarray:
        """(P,) number of residues per protein."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(P + 1,) the targets of protein i are targets[offsets[i]:offsets[i + 1]]."""
        counts = np.ones(len(self.ids), np.int64) if self.task.level == "protein" else self.num_residues
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def protein_of_target(self) -> np.ndarray:
        """Index into `ids` of the protein that each target belongs to."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.offsets))

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the task: ids, sequences, sets, targets and the mask of scored targets."""
        names = self.task.labels or self.task.columns or (self.task.is_multilabel and self.task.binary_labels) or ()
        digest = hashlib.sha256(f"{self.task.name} {self.split} {names}".encode())
        for lines in (self.ids, self.sequences, self.sets):
            digest.update("\n".join(lines).encode())
        digest.update(self.targets.tobytes() + self.scored.tobytes())
        if self.pairs is not None:
            digest.update("\n".join([self.pairs.features, *self.pairs.second]).encode())
        return digest.hexdigest()

    @property
    def keys(self) -> list[str]:
        """One text per record, equal for equal proteins, or for equal pairs of proteins in either order."""
        if self.pairs is None:
            return self.sequences
        return build_keys(self.sequences, self.pairs.second, ordered=self.pairs.features == "concat")

    def rows(self, set_name: str) -> np.ndarray:
        """Indices of the proteins of a set."""
        return np.flatnonzero(self.sets == set_name)

    def target_rows(self, set_name: str) -> np.ndarray:
        """Indices of the scored targets of a set."""
        return np.flatnonzero((self.sets == set_name)[self.protein_of_target] & self.scored)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of proteins per set."""
        return {name: int((self.sets == name).sum()) for name in SET_NAMES}

    def subset(self, rows: np.ndarray) -> "TaskData":
        """Return the task restricted to the proteins with these indices."""
        indices = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in rows],
            sequences=[self.sequences[row] for row in rows],
            sets=self.sets[rows],
            targets=self.targets[indices],
            scored=self.scored[indices],
            pairs=self.pairs and self.pairs.subset(rows),
        )

    def limit_proteins(self, limit: int, seed: int = 0) -> "TaskData":
        """Return at most `limit` proteins per set, by a stratified sample.

        The strata are the classes, ten quantiles of the values, or, for residue tasks, ten quantiles of the sequence
        length. Each class keeps at least one protein, even if that exceeds the limit.

        Args:
            limit: proteins per set.
            seed: of the sample.

        Returns:
            The smaller task, with a note that its scores are not comparable with published ones.
        """
        generator = np.random.default_rng(seed)
        strata = self._assign_strata(limit)
        sampled = []
        for name in SET_NAMES:
            rows = self.rows(name)
            sampled.append(rows if len(rows) <= limit else _sample_strata(rows, strata[rows], limit, generator))
        chosen = self.subset(np.sort(np.concatenate(sampled)))
        more = ", at least one per class" if max(chosen.sizes.values()) > limit else ""
        note = f"subset of at most {limit} proteins per set{more} (seed {seed}): not comparable with published scores"
        return dataclasses.replace(chosen, official=False, notes=(*self.notes, note))

    def _assign_strata(self, limit: int) -> np.ndarray:
        if self.task.is_multilabel:
            return stratify_columns(self.targets, multilabel=True)
        if self.task.level == "protein" and self.task.target == "class":
            return self.targets
        values = _sort_key(self)
        edges = np.quantile(values, np.linspace(0.1, 0.9, 9))
        return np.searchsorted(edges, values) * min(limit, 10) // 10  # at most one stratum per sampled protein


def _sort_key(data: TaskData) -> np.ndarray:
    """Return a number per protein by which proteins are similar: the value, or the number of residues."""
    if data.task.columns:
        return stratify_columns(data.targets, multilabel=False)
    return (data.targets if data.task.level == "protein" else data.num_residues).astype(np.float64)


def _sample_strata(rows: np.ndarray, strata: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """Sample `limit` rows in proportion to the strata, by largest remainder, at least one per stratum if possible."""
    names, counts = np.unique(strata, return_counts=True)
    share = counts * limit / counts.sum()
    quota = np.minimum(np.maximum(np.floor(share).astype(int), 1), counts)
    while quota.sum() > limit and quota.max() > 1:
        quota[quota.argmax()] -= 1
    for place in np.argsort(quota - share, kind="stable"):
        if quota.sum() >= limit:
            break
        quota[place] += quota[place] < counts[place]
    return np.concatenate(
        [generator.choice(rows[strata == name], size, replace=False) for name, size in zip(names, quota, strict=True)]
    )


def load_task(
    task: str,
    split: str | None = None,
    data_dir: Path = Path("flip"),
    target_type: TargetType | None = None,
    level: Level | None = None,
    target: str | Sequence[str] | None = None,
    split_by: SplitBy = "auto",
    identity: float = 0.5,
    split_seed: int = 0,
    pooled: bool = False,
) -> TaskData:
    """Read and check one split of a task.

    If no protein of a custom task is marked as validation, a tenth of train is chosen.

    Args:
        task: FLIP task (its files are in `<data_dir>/<task>/`), or name or path of a custom task's folder or file.
        split: name of the split. None selects FLIP's default, or the only split of a custom task.
        data_dir: folder that contains the task folders.
        target_type: "class", "value" or "multilabel" for a custom task. None infers it from the targets.
        level: "protein" or "residue" for a custom task. None infers it from the targets.
        target: column, or header field, of the targets of a custom task, or several. None is the one named target.
        split_by: how validation is chosen, as in `split.assign_sets`.
        identity: share of equal residues from which sequences are similar.
        split_seed: of the choice.
        pooled: for cross-validation: records need no set, and all of them are in train.

    Returns:
        The checked task, with notes on what was inferred where another reading is possible.

    Raises:
        InputError: the task, the split or a record is invalid; the message names the file and the record.
    """
    task, data_dir = str(expand_path(task)), expand_path(data_dir)
    spec, file = TASKS.get(task), None
    if spec is not None:
        _check_options(spec, target_type, level, target)
        split = find_split(spec, split)
        folder = data_dir / task
        if not folder.is_dir():
            raise InputError(
                f"{folder} does not exist. Run `esm2kit download flip {task}`, or copy FLIP's files into that folder.",
                code="task.absent",
                task=task,
                path=folder,
            )
    else:
        folder, split, file = find_custom_task(task, split, data_dir)
        kinds = {"target_type": target_type, "level": level, "target": target}
        how = {"split_by": split_by, "identity": identity, "split_seed": split_seed}
        other = _load_other_table(folder, split, file, kinds, how, pooled)
        if other is not None:
            return other
    rows, sources, dropped, unread = read_split(folder, split, file, target, needs_sets=not pooled)
    inferred: tuple[str, ...] = ()
    given = Counter(row.set for row in rows)
    if spec is None:
        name = _name_task(folder, file)
        declared = read_description(folder, name)
        if target is not None:
            name, declared = f"{name}_{format_column_names(target)}", {"unit": _find_unit(target)} | declared
        merged = "multilabel" in (target_type, declared.get("target"))
        rows = merge_rows(rows, sources["split"]) if merged else rows
        rows, columns = _halve(rows) if pooled else rows, list_columns(target)
        spec, inferred = infer_task(name, split, rows, sources, target_type, level, declared, columns)
    notes = [spec.note] if spec.note else []
    if split in spec.splits and spec.splits[split].note:
        notes.append(spec.splits[split].note)
    if spec.splits.get(split, Split()).light != "green":
        notes.append(f"FLIP marks this split {spec.splits[split].light}: do not use it to compare models")
    known_before = len(notes)
    notes += inferred
    if spec is not TASKS.get(spec.name):
        shown = target if isinstance(target, str | None) else ", ".join(target)
        logger.info("%s", describe_own_format(sources["split"], "sequences" in sources, shown))
    notes += _note_left_out(sources["split"], unread, dropped)
    if spec.level == "protein" and (masked := sum(row.mask is not None for row in rows)):
        notes.append(f"the masks of {masked} records are not used, because a mask belongs to targets per residue")
    data, unmeasured = _pack_targets(spec, split, rows, sources)
    notes += _check_letters(data)
    if unmeasured:
        notes.append(f"{unmeasured} residues have no measurement and are not scored")
    if pooled:
        return _pool(data, notes, given)
    if task not in TASKS and not len(data.rows("validation")):
        data = _choose_validation(data, split_by, identity, notes, split_seed)
    return _finish(data, notes, sources["split"], known_before)


def _note_left_out(source: Source, unread: tuple[str, ...], dropped: int) -> list[str]:
    """Note the columns or fields, the other test sets and the records that are not read."""
    notes = []
    if unread:
        what = "columns" if source.is_table else "header fields"
        notes.append(f"{what} that are not read: {', '.join(unread)}")
    if source.test_set:
        notes.append(f"the test set is {source.test_set}; those of other names are left out")
    if dropped:
        notes.append(f"{dropped} records of {source.path.name} belong to no set of this split and were dropped")
    return notes


def _load_other_table(
    folder: Path, split: str, file: Path | None, kinds: dict[str, Any], how: dict[str, Any], pooled: bool
) -> TaskData | None:
    """Load a task whose file is of pairs of proteins, or a table of another project; None for other files."""
    files = [file] if file else [folder / f"{split}{ending}" for ending in ENDINGS]
    path = next((path for path in files if has_pairs(path, needs_sequences=True)), None)
    if path is not None:
        found = read_pairs(path, None, kinds["target"], None, kinds["target_type"])
        name = _name_task(folder, file)
        return _load_pairs(found, name, split, kinds["target_type"], kinds["level"], **how, pooled=pooled)
    table = find_task_table(folder, split, file)
    if table is None:
        return None
    if pooled:
        return load_pooled_labels(table.path, set=table.set_column or None, **kinds)
    return load_labels(table.path, set=table.set_column or None, **kinds, **how)


def _finish(data: TaskData, notes: list[str], source: Source, known_before: int = 0) -> TaskData:
    """Check the sets and log the notes, except the first ones, which are known without reading the files."""
    _check_sets(data, source)
    data, task = _compare_with_flip(data, notes), data.task
    what = (
        f"{'any of ' if task.is_multilabel else ''}{task.num_outputs} {'labels' if task.is_multilabel else 'values'}"
        if task.has_columns
        else f"one {task.target}"
    )
    kind = f"{what} per {task.level}, scored by {task.metric}"
    logger.info("task %s, split %s: %s; %s", task.name, data.split, _format_sizes(data), kind)
    for note in data.notes[known_before:]:
        logger.info("task %s: %s", task.name, note)
    return data


def _format_sizes(data: TaskData) -> str:
    return ", ".join(f"{name} {size}" for name, size in data.sizes.items())


def load_labels(
    labels: Path,
    fasta: Path | None = None,
    id: str | None = None,
    target: str | Sequence[str] | None = None,
    set: str | None = None,
    target_type: TargetType | None = None,
    level: Level | None = None,
    split_by: SplitBy = "auto",
    identity: float = 0.5,
    split_seed: int = 0,
) -> TaskData:
    """Join a table of measurements with sequences, and divide the proteins into train, validation and test.

    Columns that are not named are inferred; a note states which were read, how many proteins were joined, and what was
    left out. Without a column of sets, a tenth of the proteins each is validation and test.

    Args:
        labels: CSV, TSV or Excel file (`file.xlsx:Sheet` chooses a sheet).
        fasta: sequences. None reads them from a column of the table.
        id: column with the names of the proteins.
        target: column of the targets, or several. A unit in the name of a single one, as in `Tm (C)`, is that of the
            task.
        set: column with train, validation or test.
        target_type: "class", "value" or "multilabel". None infers it from the targets.
        level: "protein" or "residue". None infers it from the targets.
        split_by: how proteins without a set are divided, as in `split.assign_sets`.
        identity: share of equal residues from which sequences are similar.
        split_seed: of the division.

    Returns:
        The checked task.

    Raises:
        InputError: a file, a column or a row is invalid, or nothing matches; the message names it.
    """
    if id is None and has_pairs(expand_path(labels), needs_sequences=fasta is None):
        paired = read_pairs(expand_path(labels), fasta, target, set, target_type)
        name = f"{_strip_suffixes(expand_path(labels))}_{format_column_names(paired.targets)}"
        how = {"split_by": split_by, "identity": identity, "split_seed": split_seed}
        return _load_pairs(paired, name, paired.set_column, target_type, level, **how)
    found = read_labels(labels, fasta, id, target, set, target_type)
    rows = found.rows if found.set_column else _halve(found.rows)
    data, notes = _pack_labels(found, rows, target_type, level)
    if not found.set_column:
        chosen = assign_sets(data.sequences, stratify(data), SHARES, split_by, identity, split_seed)
        task = dataclasses.replace(data.task, splits={chosen.name: Split()}, default_split=chosen.name)
        data = dataclasses.replace(data, task=task, split=chosen.name, sets=chosen.sets, split_method=chosen.method)
        notes += [f"{_format_sizes(data)}: {chosen.method} (seed {split_seed})", *describe_limit(chosen.check)]
    elif not len(data.rows("validation")):
        data = _choose_validation(data, split_by, identity, notes, split_seed)
    return _finish(data, notes, found.files["labels"])


def _load_pairs(
    found: PairFile,
    name: str,
    split: str,
    target_type: TargetType | None,
    level: Level | None,
    split_by: SplitBy,
    identity: float,
    split_seed: int,
    pooled: bool = False,
) -> TaskData:
    """Build a task of pairs from the records of its file, and divide them if the file has no sets."""
    source = found.files["split"]
    if level == "residue" or pooled:
        what = "level residue" if level == "residue" else "cross-validation"
        raise InputError(
            f"{source}: pairs of proteins do not work with {what}. Omit it.", code="pairs.option", path=source.path
        )
    rows = [pair.row for pair in found.records]
    assigned = all(row.set != UNASSIGNED for row in rows)
    rows = rows if assigned else _halve(rows)
    declared, columns = {"unit": _find_unit(found.targets)}, list_columns(found.targets)
    task, inferred = infer_task(name, split, rows, {"split": source}, target_type, "protein", declared, columns)
    data, _ = _pack_targets(task, split, rows, {"split": source})
    first, second = data.sequences, [pair.second for pair in found.records]
    groups, grouping = group_proteins(first, second, identity if split_by == "identity" else None)
    ids = [pair.first_id for pair in found.records], [pair.second_id for pair in found.records]
    files = {kind: given.path for kind, given in found.files.items() if given.path.is_file()}  # not a folder of them
    data = dataclasses.replace(data, pairs=Pairs(*ids, second, groups, grouping), files=files)
    notes = [*found.notes, *inferred, *_check_letters(dataclasses.replace(data, sequences=[*first, *second]))]
    if not assigned:
        chosen = assign_pair_sets(first, second, stratify(data), split_by, identity, split_seed)
        task = dataclasses.replace(task, splits={chosen.name: Split()}, default_split=chosen.name)
        data = dataclasses.replace(data, task=task, split=chosen.name, sets=chosen.sets, split_method=chosen.method)
        data = data.subset(np.flatnonzero(chosen.sets != ""))
        notes.append(f"{_format_sizes(data)}: {chosen.method} (seed {split_seed})")
    elif not len(data.rows("validation")) and len(data.rows("train")) > 1:
        train, sets = data.rows("train"), data.sets.astype("U10")
        pairs = [first[row] for row in train], [second[row] for row in train]
        sets[train] = choose_pair_validation(*pairs, stratify(data)[train], identity, split_seed)
        notes.append(f"no pair is marked as validation, so a tenth of train was chosen (seed {split_seed})")
        data = dataclasses.replace(data, sets=sets, split_method="validation: random pairs")
    notes.append(describe_overlap(data.pairs, data.sets))
    notes += find_repeated_pairs(data.keys, data.targets, data.sets)
    notes.append("intervals resample proteins: a pair counts as often as both of its proteins occur together")
    return _finish(data, notes, source)


def _pack_labels(
    found: LabelRecords, rows: list[TaskRecord], target_type: TargetType | None, level: Level | None
) -> tuple[TaskData, list[str]]:
    """Infer and pack the task of a table of labels, with notes; `rows` are its records with sets."""
    sources = {"split": found.files["labels"]}
    path = found.files["labels"].path
    name = f"{_strip_suffixes(path)}_{format_column_names(found.targets)}"
    declared, columns = {"unit": _find_unit(found.targets)}, list_columns(found.targets)
    if found.kind is not None:
        declared |= read_description(path.parent, _strip_suffixes(path))
    task, inferred = infer_task(name, found.set_column, rows, sources, target_type, level, declared, columns)
    task = dataclasses.replace(task, variants=found.kind is not None and found.kind.variants)
    data, unmeasured = _pack_targets(task, found.set_column, rows, sources)
    # a folder with a file per set is none of the files
    files = {kind: source.path for kind, source in found.files.items() if source.path.is_file()}
    data = dataclasses.replace(data, files=files)
    notes = [*found.notes, *inferred, *_check_letters(data)]
    if unmeasured:
        notes.append(f"{unmeasured} residues have no measurement and are not scored")
    return data, notes


def _halve(rows: list[TaskRecord]) -> list[TaskRecord]:
    """Set train or test by the sequences, for what is inferred from the labels of train and of the other sets."""
    places = sorted(range(len(rows)), key=lambda row: digest_sequence(rows[row].sequence))
    half = {place for number, place in enumerate(places) if number % 2}
    return [row._replace(set="test" if place in half else "train") for place, row in enumerate(rows)]


def _pool(data: TaskData, notes: list[str], given: Counter[str]) -> TaskData:
    """Put all records into train, for cross-validation, with the notes that do not depend on sets.

    Args:
        data: the task.
        notes: notes so far.
        given: set of the files -> number of its records.

    Returns:
        The task.
    """
    if len(given) > 1:
        sizes = ", ".join(f"{name} {given[name]}" for name in SET_NAMES if given[name])
        notes.append(f"cross-validation uses the proteins of all sets ({sizes})")
    notes += _find_contradictions(data)
    repeated = sum(count - 1 for count in Counter(data.ids).values())
    if repeated:
        notes.append(f"{repeated} records repeat an earlier id")
    logger.info("task %s: %s", data.task.name, format_count(len(data.ids), "protein"))
    for note in notes:
        logger.info("task %s: %s", data.task.name, note)
    sets = np.full(len(data.ids), "train")
    return dataclasses.replace(data, sets=sets, official=False, notes=tuple(dict.fromkeys(notes)))


def list_columns(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of several targets; empty for one target."""
    return () if isinstance(target, str | None) or len(target) < 2 else tuple(target)


def format_column_names(target: str | Sequence[str]) -> str:
    """Return the names of columns as a part of the name of a task; many columns are counted."""
    names = [format_column_name(name) for name in ([target] if isinstance(target, str) else target)]
    joined = "_".join(names)
    return joined if len(names) == 1 or len(joined) <= LONGEST_NAME else f"{names[0]}_and_{len(names) - 1}_more"


def _find_unit(target: str | Sequence[str]) -> str:
    """Return the unit in the name of a column; empty for several columns, whose names keep their units."""
    names = [target] if isinstance(target, str) else target
    return split_unit(names[0])[1] if len(names) == 1 else ""


def _strip_suffixes(path: Path) -> str:
    """Return the name of a table without its suffixes; that of a folder with a file per set is its own."""
    return path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem


def _name_task(folder: Path, file: Path | None) -> str:
    """Name a custom task after its file, or else its folder; FLIP2's folders of splits are in that of the data set."""
    if file is not None:
        return parse_split_name(file.name) or file.name
    return folder.absolute().parent.name if folder.name == SPLITS_FOLDER else folder.name


def check_single_proteins(data: TaskData, stage: str) -> TaskData:
    """Check that the records of a task are single proteins.

    Args:
        data: the task.
        stage: what does not support pairs, for the message.

    Returns:
        The task.

    Raises:
        InputError: they are pairs.
    """
    if data.pairs is not None:
        raise InputError(
            f"{data.files['split']} has pairs of proteins, which {stage} does not support. Train a probe of pairs with "
            "`esm2kit benchmark`.",
            code="pairs.stage",
            stage=stage,
            path=data.files["split"],
        )
    return data


def load_task_of(config: TaskConfig) -> TaskData:
    """Load the task, or the table of labels, that a stage's parameters name.

    Args:
        config: parameters of the stage. Several targets are those of one task.

    Returns:
        The checked task.

    Raises:
        InputError: the task, the split or a record is invalid.
    """
    kinds = {"target": _get_target(config), "target_type": config.target_type, "level": config.level}
    kinds |= {"split_by": config.split_by, "identity": config.identity, "split_seed": config.split_seed}
    if config.labels is None:
        return load_task(config.task, config.split, Path(config.data_dir), **kinds)
    return load_labels(config.labels, config.fasta, config.id, set=config.set, **kinds)


def load_pooled_task(config: TaskConfig, others: Sequence[str] = ()) -> TaskData:
    """Load all proteins of a task, or of a table of labels, for cross-validation; none needs a set.

    Args:
        config: parameters of the stage. Several targets are those of one task.
        others: columns of a table of labels that are not the target, such as folds or groups.

    Returns:
        The checked task, with all proteins in train.

    Raises:
        InputError: the task, the split or a record is invalid.
    """
    kinds = {"target": _get_target(config), "target_type": config.target_type, "level": config.level}
    if config.labels is None:
        data = load_task(config.task, config.split, Path(config.data_dir), **kinds, pooled=True)
    else:
        data = load_pooled_labels(config.labels, config.fasta, config.id, set=config.set, **kinds, others=others)
    check_one_target(data)
    return data


def check_one_target(data: TaskData) -> None:
    """Raise InputError if a protein has several targets, which folds do not support."""
    if data.targets.ndim > 1:
        raise InputError(
            f"task {data.task.name} has several targets per protein, which folds do not support. Name one target, or "
            "omit folds.",
            code="folds.several-targets",
            task=data.task.name,
        )


def load_pooled_labels(
    labels: Path,
    fasta: Path | None = None,
    id: str | None = None,
    target: str | None = None,
    set: str | None = None,
    target_type: TargetType | None = None,
    level: Level | None = None,
    others: Sequence[str] = (),
) -> TaskData:
    """Load all proteins of a table of labels, for cross-validation; none needs a set.

    Args:
        labels: as for `load_labels`.
        fasta: as for `load_labels`.
        id: as for `load_labels`.
        target: as for `load_labels`.
        set: as for `load_labels`.
        target_type: as for `load_labels`.
        level: as for `load_labels`.
        others: columns that are not the target, such as folds or groups.

    Returns:
        The checked task, with all proteins in train.

    Raises:
        InputError: a file, a column or a row is invalid, or nothing matches.
    """
    if has_pairs(expand_path(labels), needs_sequences=fasta is None):
        raise InputError(
            f"{labels}: pairs of proteins do not work with cross-validation. Omit --folds.",
            code="pairs.option",
            path=labels,
        )
    found = read_labels(labels, fasta, id, target, set, target_type, others, pooled=True)
    data, notes = _pack_labels(found, _halve(found.rows), target_type, level)
    return _pool(data, notes, Counter(row.set for row in found.rows))


def _get_target(config: TaskConfig) -> str | list[str] | None:
    """Return the target of a configuration, or several; None if it names none."""
    return config.target[0] if config.target and len(config.target) == 1 else config.target


def _check_options(
    task: Task, target_type: TargetType | None, level: Level | None, target: str | Sequence[str] | None
) -> None:
    """Raise InputError if the options contradict a FLIP task."""
    options = (("target_type", target_type, task.target), ("level", level, task.level), ("target", target, "target"))
    for option, found, fixed in options:
        if found not in (None, fixed):
            raise InputError(
                f"{task.name} is a FLIP task with {option} {fixed}, which cannot be changed to {found}. Omit {option}, "
                "or copy the files to a folder of another name.",
                code="task.fixed",
                task=task.name,
                option=option,
                found=found,
            )


def _pack_targets(task: Task, split: str, rows: list[TaskRecord], sources: dict[str, Source]) -> tuple[TaskData, int]:
    """Return the task and the number of residues without a measurement."""
    source = sources["split"]
    if not rows:
        raise InputError(f"{source}: no record belongs to a set", code="task.no-records", path=source.path)
    if task.has_columns:
        packed_PC = pack_columns(task, rows, source)
        return _build_data(task, split, rows, packed_PC, np.ones(len(rows), dtype=bool), sources), 0
    index = task.label_index()
    letters = {ord(label): place for label, place in index.items() if len(label) == 1}
    table = np.full(max(letters, default=0) + 2, -1, dtype=np.int64)
    table[list(letters)] = list(letters.values())
    targets, scored, unmeasured = [], [], 0
    for row in rows:
        if row.target is None:
            raise InputError(
                f"{source}: record {row.id!r} has no target", code="task.no-target", record=row.id, path=source.path
            )
        if task.level == "residue":
            values, measured = parse_residue_targets(task, row, table, source)
            targets.append(values)
            scored.append(parse_mask(row, source) & measured)
            unmeasured += int((~measured).sum())
        elif task.target == "value":
            targets.append([parse_number(row, row.target, source)])
            scored.append([True])
        else:
            spelling = row.target if row.target in index else row.target.replace(" ", "_").replace(".", "_")
            if spelling not in index:
                raise InputError(
                    f"{source}: record {row.id!r} has the unknown label {row.target!r}. "
                    f"Use one of {', '.join(task.labels)}.",
                    code="task.label",
                    record=row.id,
                    found=row.target,
                    known=task.labels,
                )
            targets.append([index[spelling]])
            scored.append([True])
    dtype = np.float64 if task.target == "value" else np.int64
    packed_N = np.concatenate(targets).astype(dtype)
    return _build_data(task, split, rows, packed_N, np.concatenate(scored).astype(bool), sources), unmeasured


def _build_data(
    task: Task,
    split: str,
    rows: list[TaskRecord],
    targets: np.ndarray,
    scored: np.ndarray,
    sources: dict[str, Source],
) -> TaskData:
    return TaskData(
        task=task,
        split=split,
        ids=[row.id for row in rows],
        sequences=[row.sequence for row in rows],
        sets=np.array([row.set for row in rows]),
        targets=targets,
        scored=scored,
        files={name: found.path for name, found in sources.items()},
    )


def _check_letters(data: TaskData) -> list[str]:
    """Check that the sequences are of proteins; return notes on those that are probably not."""
    letters = LetterCounts()
    file_letters = FileLetters(data.files.get("sequences", next(iter(data.files.values()))))
    for sequence in data.sequences:
        letters.add(sequence)
        file_letters.add(np.frombuffer(sequence.encode(), dtype=np.uint8))
    file_letters.check()
    return letters.describe()


def _find_contradictions(data: TaskData) -> list[str]:
    """Note sequences that have different targets in different records."""
    if data.task.level == "residue" or data.pairs is not None:
        return []
    first, differing, example = {}, set(), ""
    for row, sequence in enumerate(data.sequences):
        other = first.setdefault(sequence, row)
        if not np.array_equal(data.targets[other], data.targets[row], equal_nan=data.task.target == "value"):
            shown = [_format_target(data, place) for place in (other, row)]
            example = example or f"{data.ids[other]!r} with {shown[0]} and {data.ids[row]!r} with {shown[1]}"
            differing.add(sequence)
    if not differing:
        return []
    count = f"{format_count(len(differing), 'sequence')} {'has' if len(differing) == 1 else 'have'}"
    return [
        f"{count} different targets in different records, such as {example}: no model can predict both; correct or "
        "merge them"
    ]


def _format_target(data: TaskData, row: int) -> str:
    """Format the target of a protein for a message."""
    target, task = data.targets[row], data.task
    if task.is_multilabel:
        return repr(format_label_set(target, task.binary_labels))
    if task.columns:
        return ", ".join(f"{value:g}" for value in target)
    return task.labels[int(target)] if task.labels else f"{target:g}"


def _choose_validation(data: TaskData, split_by: SplitBy, identity: float, notes: list[str], seed: int) -> TaskData:
    """Move a tenth of train to validation, with a note, unless train has a single sequence."""
    train = data.rows("train")
    sequences, strata = [data.sequences[row] for row in train], stratify(data)[train]
    if len(set(sequences)) < 2:
        return data
    found = assign_sets(sequences, strata, VALIDATION_SHARES, split_by, identity, seed)
    sets = data.sets.astype("U10")
    sets[train] = found.sets
    chosen = f"{int((found.sets == 'validation').sum())} of {len(train)} train proteins"
    notes.append(f"no protein is marked as validation, so {chosen} were chosen ({found.method}; seed {seed})")
    notes += describe_limit(found.check)
    return dataclasses.replace(data, sets=sets, split_method=f"validation: {found.method}")


def stratify(data: TaskData) -> np.ndarray:
    """Return (P,) integers of similar proteins: by class, or by quantiles of the value or of the number of residues."""
    if data.task.is_multilabel:
        return stratify_columns(data.targets, multilabel=True)
    if data.task.level == "protein" and data.task.target == "class":
        return data.targets
    return build_strata(_sort_key(data))


def _check_sets(data: TaskData, source: Source) -> None:
    """Raise InputError for an empty set, or for a class that occurs in test but not in train."""
    for name in SET_NAMES:
        if not len(data.target_rows(name)):
            if proteins := data.sizes[name]:
                raise InputError(
                    f"{source}: the masks of the {name} set's {proteins} proteins leave no residue to score. Write "
                    "1 in the mask for each residue with a measurement.",
                    code="task.empty-mask",
                    set=name,
                    path=source.path,
                )
            if name == "validation":
                where = "with True in the column validation" if source.is_table else "with VALIDATION=True"
                fix = f"Mark some train records {where}; they are used for model selection"
            else:
                fix = f"Check {'the column set' if source.is_table else 'SET= in the headers'}"
            raise InputError(
                f"{source}: the {name} set is empty. {fix}.", code="task.empty-set", set=name, path=source.path
            )
    if data.task.columns:
        _check_columns(data, source)
    if data.task.target == "class":
        seen, tested = (np.unique(data.targets[data.target_rows(name)]) for name in ("train", "test"))
        names = data.task.labels
        if data.task.binary_labels:
            names = data.task.binary_labels
            rows = (data.targets[data.target_rows(name)] for name in ("train", "test"))
            bits = (y if data.task.is_multilabel else unpack_bits(y, len(names)) for y in rows)
            seen, tested = (np.flatnonzero(present.any(0)) for present in bits)
        absent = np.setdiff1d(tested, seen)
        if absent.size:
            raise InputError(
                f"{source}: class {names[absent[0]]!r} occurs in test but not in train. Merge or remove it.",
                code="task.unseen-class",
                label=names[absent[0]],
                path=source.path,
            )


def _check_columns(data: TaskData, source: Source) -> None:
    """Raise InputError for a column without a value in a set."""
    for name in SET_NAMES:
        empty = np.flatnonzero(np.isnan(data.targets[data.target_rows(name)]).all(0))
        if empty.size:
            column = data.task.columns[empty[0]]
            raise InputError(
                f"{source}: no {name} protein has a value in column {column!r}. Omit the column, or add values.",
                code="task.empty-column",
                column=column,
                set=name,
                path=source.path,
            )


def _find_constant_columns(data: TaskData) -> list[str]:
    """Note the targets that have a single value in train, from which nothing can be learned."""
    train_PC, names = data.targets[data.target_rows("train")], data.task.columns or data.task.binary_labels
    constant = [name for name, y in zip(names, train_PC.T, strict=True) if len(np.unique(y[~np.isnan(y)])) < 2]
    if not constant:
        return []
    return [f"train has a single value of {', '.join(constant[:5])}: the scores of this target are meaningless"]


def _compare_with_flip(data: TaskData, notes: list[str]) -> TaskData:
    """Compare the set sizes with FLIP's and add notes on duplicates and overlaps between the sets.

    Returns:
        The task with its notes, marked official if the sizes are FLIP's.

    Raises:
        InputError: the files are those of the other secondary_structure test set.
    """
    task, sizes = data.task, data.sizes
    expected = task.splits.get(data.split, Split())
    for other in TASKS.values():
        same = other.splits.get(data.split, Split())
        same_folder = (other.folder or other.name) == (task.folder or task.name)
        if task.name in TASKS and other.name != task.name and same_folder and sizes["test"] == same.test:
            raise InputError(
                f"{data.files['split']}: {same.test} test proteins are those of {other.name}, not of {task.name}. "
                f"Move these files to a folder named {other.name}.",
                code="task.other-test-set",
                task=task.name,
                found=other.name,
            )
    known = {"train": expected.train, "validation": expected.validation, "test": expected.test}
    wrong = {name: size for name, size in known.items() if size is not None and sizes[name] != size}
    official = TASKS.get(task.name) == task and not wrong
    if TASKS.get(task.name) == task and wrong:
        sizes_found = ", ".join(f"{name} {sizes[name]} instead of {size}" for name, size in wrong.items())
        notes.append(f"set sizes differ from FLIP's ({sizes_found}): not comparable with published scores")
    fitted, tested = (np.flatnonzero(chosen) for chosen in (data.sets != "test", data.sets == "test"))
    both = {data.ids[row] for row in fitted} & {data.ids[row] for row in tested}
    if both and data.pairs is None:
        notes.append(f"{len(both)} protein ids occur in both train and test")
    seen = {data.sequences[row] for row in fitted}
    shared = sum(data.sequences[row] in seen for row in tested)
    if shared and data.pairs is None:
        notes.append(f"the sequences of {shared} of {len(tested)} test proteins also occur in train or validation")
    notes += _find_contradictions(data)
    repeated = sum(count - 1 for count in Counter(data.ids).values())
    if repeated and data.pairs is None:
        notes.append(f"{repeated} records repeat an earlier id")
    classes = np.unique(data.targets[data.target_rows("train")], axis=0)
    if task.has_columns:
        notes += _find_constant_columns(data)
        return dataclasses.replace(data, official=official, notes=tuple(dict.fromkeys(notes)))
    if task.target == "class" and len(classes) == 1:
        notes.append(f"train has a single class, {task.labels[classes[0]]!r}: the scores are meaningless")
    if task.target == "value" and len(classes) == 1 and len(data.target_rows("train")) > 1:
        notes.append(f"train has a single value, {classes[0]:g}: the scores are meaningless")
    return dataclasses.replace(data, official=official, notes=tuple(dict.fromkeys(notes)))
