"""Load a labelled task: read its files or a table, infer what is predicted, choose missing sets, and pack arrays."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.sequences.ids import digest_sequence
from esm2kit.sequences.similarity import describe_limit
from esm2kit.tasks.checks import check_letters, check_sets, compare_with_flip, find_contradictions
from esm2kit.tasks.config import TaskConfig
from esm2kit.tasks.files import TaskRecord, read_description, read_split
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.infer import SPLITS_FOLDER, find_custom_task, infer_task
from esm2kit.tasks.kinds import describe_own_format, find_task_table
from esm2kit.tasks.label_sets import merge_rows
from esm2kit.tasks.labels_table import UNASSIGNED, LabelRecords, read_labels
from esm2kit.tasks.pair_files import PairFile, has_pairs, read_pairs
from esm2kit.tasks.pairs import (
    Pairs,
    assign_pair_sets,
    choose_pair_validation,
    describe_overlap,
    find_repeated_pairs,
    group_proteins,
)
from esm2kit.tasks.sources import ENDINGS, Source, parse_split_name
from esm2kit.tasks.split import SHARES, VALIDATION_SHARES, assign_sets
from esm2kit.tasks.tables import format_column_name, split_unit
from esm2kit.tasks.targets import pack_targets
from esm2kit.tasks.task import Level, Split, SplitBy, TargetType, Task
from esm2kit.tasks.task_data import SET_NAMES, TaskData, stratify

logger = logging.getLogger(__name__)

LONGEST_NAME = 60  # characters of the names of several columns in the name of a task


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
    data, unmeasured = pack_targets(spec, split, rows, sources)
    notes += check_letters(data)
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
    check_sets(data, source)
    data, task = compare_with_flip(data, notes), data.task
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
    if level == "residue":
        raise InputError(
            f"{source}: pairs of proteins do not work with level residue. Omit it.",
            code="pairs.option",
            path=source.path,
        )
    given = [pair.row for pair in found.records]
    assigned = all(row.set != UNASSIGNED for row in given)
    rows = given if assigned and not pooled else _halve(given)
    declared, columns = {"unit": _find_unit(found.targets)}, list_columns(found.targets)
    task, inferred = infer_task(name, split, rows, {"split": source}, target_type, "protein", declared, columns)
    data, _ = pack_targets(task, split, rows, {"split": source})
    first, second = data.sequences, [pair.second for pair in found.records]
    groups, grouping = group_proteins(first, second, identity if split_by == "identity" else None)
    ids = [pair.first_id for pair in found.records], [pair.second_id for pair in found.records]
    files = {kind: given.path for kind, given in found.files.items() if given.path.is_file()}  # not a folder of them
    data = dataclasses.replace(data, pairs=Pairs(*ids, second, groups, grouping), files=files)
    notes = [*found.notes, *inferred, *check_letters(dataclasses.replace(data, sequences=[*first, *second]))]
    if pooled:
        notes += find_repeated_pairs(data.keys, data.targets, np.full(len(rows), "train"))
        return _pool(data, notes, Counter(row.set for row in given))
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
    data, unmeasured = pack_targets(task, found.set_column, rows, sources)
    # a folder with a file per set is none of the files
    files = {kind: source.path for kind, source in found.files.items() if source.path.is_file()}
    data = dataclasses.replace(data, files=files)
    notes = [*found.notes, *inferred, *check_letters(data)]
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
    noun = "protein" if data.pairs is None else "pair"
    if len(given) > 1:
        sizes = ", ".join(f"{name} {given[name]}" for name in SET_NAMES if given[name])
        notes.append(f"cross-validation uses the {noun}s of all sets ({sizes})")
    notes += find_contradictions(data)
    repeated = sum(count - 1 for count in Counter(data.ids).values())
    if repeated and data.pairs is None:
        notes.append(f"{repeated} records repeat an earlier id")
    logger.info("task %s: %s", data.task.name, format_count(len(data.ids), noun))
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
        return load_task(config.task, config.split, Path(config.data_dir), **kinds, pooled=True)
    return load_pooled_labels(config.labels, config.fasta, config.id, set=config.set, **kinds, others=others)


def load_pooled_labels(
    labels: Path,
    fasta: Path | None = None,
    id: str | None = None,
    target: str | Sequence[str] | None = None,
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
    if id is None and has_pairs(expand_path(labels), needs_sequences=fasta is None):
        paired = read_pairs(expand_path(labels), fasta, target, set, target_type)
        name = f"{_strip_suffixes(expand_path(labels))}_{format_column_names(paired.targets)}"
        how = {"split_by": "random", "identity": 0.0, "split_seed": 0}  # of sets, which are not used
        return _load_pairs(paired, name, paired.set_column, target_type, level, **how, pooled=True)
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
