"""A task's proteins, targets and sets, checked and packed, whichever files they came from."""

import dataclasses
import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.tasks.files import Source, TaskRecord, read_description, read_split
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.infer import find_custom_task, infer_task
from esm2kit.tasks.labels import is_integer, parse_mask, parse_number, parse_residue_targets
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.task import Split, Target, Task

logger = logging.getLogger(__name__)

SET_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskData:
    """One split of one task.

    Args:
        task: what is predicted and how it is scored.
        split: the split's name.
        ids: of the proteins (P); FLIP repeats a few.
        sequences: their residues (P).
        sets: (P,) "train", "validation" or "test".
        targets: packed: one a protein (P,), or one a residue, protein after protein (N,); classes are int64,
            values float64.
        scored: False where a target does not count (unresolved residues), packed like `targets`.
        files: the files it was read from.
        notes: what a reader of a score must know.
        official: the sizes are FLIP's, so that published figures may be compared with a score.
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

    @cached_property
    def num_residues(self) -> np.ndarray:
        """(P,) residues of every protein."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(P + 1,): protein i's targets are targets[offsets[i]:offsets[i + 1]]."""
        counts = np.ones(len(self.ids), np.int64) if self.task.level == "protein" else self.num_residues
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def protein_of_target(self) -> np.ndarray:
        """TaskRecord in `ids` that each target belongs to."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.offsets))

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of what is predicted on which proteins: ids, sequences, sets, targets and which of them count."""
        digest = hashlib.sha256(f"{self.task.name} {self.split} {self.task.labels}".encode())
        for lines in (self.ids, self.sequences, self.sets):
            digest.update("\n".join(lines).encode())
        digest.update(self.targets.tobytes() + self.scored.tobytes())
        return digest.hexdigest()

    def rows(self, set_name: str) -> np.ndarray:
        """Indices of a set's proteins."""
        return np.flatnonzero(self.sets == set_name)

    def target_rows(self, set_name: str) -> np.ndarray:
        """Indices of the targets of a set that count."""
        return np.flatnonzero((self.sets == set_name)[self.protein_of_target] & self.scored)

    @property
    def sizes(self) -> dict[str, int]:
        """Proteins in each set."""
        return {name: int((self.sets == name).sum()) for name in SET_NAMES}

    def subset(self, rows: np.ndarray) -> "TaskData":
        """The same task on some of its proteins."""
        keep = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in rows],
            sequences=[self.sequences[row] for row in rows],
            sets=self.sets[rows],
            targets=self.targets[keep],
            scored=self.scored[keep],
        )

    def limit_proteins(self, limit: int, seed: int = 0) -> "TaskData":
        """At most `limit` proteins of each set, drawn by class or by quantile so that each set keeps its make-up.

        The files stay as they are. Protein classes keep at least one protein each, even beyond the limit; values are
        drawn from ten quantiles; residue tasks from ten quantiles of residues.
        """
        generator = np.random.default_rng(seed)
        strata = self._assign_strata(limit)
        kept = []
        for name in SET_NAMES:
            rows = self.rows(name)
            kept.append(rows if len(rows) <= limit else _sample_strata(rows, strata[rows], limit, generator))
        chosen = self.subset(np.sort(np.concatenate(kept)))
        more = " and one of each class" if max(chosen.sizes.values()) > limit else ""
        note = f"a subset: at most {limit} proteins of each set{more} (seed {seed})"
        return dataclasses.replace(
            chosen, official=False, notes=(*self.notes, f"{note}; not comparable with published figures")
        )

    def _assign_strata(self, limit: int) -> np.ndarray:
        if self.task.level == "protein" and self.task.target == "class":
            return self.targets
        values = self.targets if self.task.level == "protein" else self.num_residues
        edges = np.quantile(values, np.linspace(0.1, 0.9, 9))
        return np.searchsorted(edges, values) * min(limit, 10) // 10  # no more strata than there is room for


def _sample_strata(rows: np.ndarray, strata: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """Every stratum in proportion, the largest remainders first, none left empty while there is room."""
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


def load_task(task: str, split: str | None, data_dir: Path, target: Target | None = None) -> TaskData:
    """Read and check one split.

    Args:
        task: a FLIP task (files in `<data_dir>/<task>/`), or the name or path of a folder or file of the user's own.
        split: None is FLIP's default, or the only one there is.
        data_dir: folder of task folders.
        target: "class" or "value" for a task of the user's own; by default it is read off the targets.
    Raises: InputError with the file, the record and the way out.
    """
    spec, file = TASKS.get(task), None
    if spec is not None:
        split = find_split(spec, split)
        folder = Path(data_dir) / task
        if not folder.is_dir():
            raise InputError(
                f"{folder} is absent: run `esm2kit download flip {task}`, or place FLIP's files there",
                code="task.absent",
                task=task,
                path=folder,
            )
    else:
        folder, split, file = find_custom_task(task, split, Path(data_dir))
    rows, sources, dropped = read_split(folder, split, file)
    guessed = False
    if spec is None:
        name = split if file else folder.name
        declared = read_description(folder, name)
        spec, guessed = infer_task(name, split, rows, sources, target, declared), not (target or declared.get("target"))
    notes = [spec.note] if spec.note else []
    if split in spec.splits and spec.splits[split].note:
        notes.append(spec.splits[split].note)
    if spec.splits.get(split, Split()).light != "green":
        notes.append(f"FLIP marks this split {spec.splits[split].light}: not for comparing models")
    known_before = len(notes)
    if guessed and spec.level == "protein" and spec.labels and all(map(is_integer, spec.labels)):
        notes.append(f"{len(spec.labels)} distinct integer targets are taken for classes; set target to value if not")
    if dropped:
        notes.append(
            f"{dropped} records of {sources['split'].path.name} are outside the split (no set) and were dropped"
        )
    data = _pack_targets(spec, split, rows, sources)
    _check_sets(data, sources["split"])
    data = _compare_with_flip(data, notes)
    sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
    kind = f"a {spec.target} for every {spec.level}, scored by {spec.metric}"
    logger.info("task %s, split %s: %s; %s", spec.name, split, sizes, kind)
    for note in data.notes[known_before:]:
        logger.info("task %s: %s", spec.name, note)
    return data


def _pack_targets(task: Task, split: str, rows: list[TaskRecord], sources: dict[str, Source]) -> TaskData:
    source = sources["split"]
    index = task.label_index()
    letters = {ord(label): place for label, place in index.items() if len(label) == 1}
    table = np.full(256, -1, dtype=np.int64)
    table[list(letters)] = list(letters.values())
    targets, scored = [], []
    for row in rows:
        if row.target is None:
            raise InputError(
                f"{source}: record {row.id!r} has no target", code="task.no-target", record=row.id, path=source.path
            )
        if task.level == "residue":
            values = parse_residue_targets(task, row, table, source)
            targets.append(values)
            scored.append(parse_mask(row, source) & (np.isfinite(values) if task.target == "value" else True))
        elif task.target == "value":
            targets.append([parse_number(row, row.target, source)])
            scored.append([True])
        else:
            spelling = row.target if row.target in index else row.target.replace(" ", "_").replace(".", "_")
            if spelling not in index:
                raise InputError(
                    f"{source}: record {row.id!r} has the label {row.target!r}; known are {', '.join(task.labels)}",
                    code="task.label",
                    record=row.id,
                    found=row.target,
                    known=task.labels,
                )
            targets.append([index[spelling]])
            scored.append([True])
    if not rows:
        raise InputError(f"{source} holds no record that belongs to a set", code="task.no-records", path=source.path)
    dtype = np.float64 if task.target == "value" else np.int64
    return TaskData(
        task=task,
        split=split,
        ids=[row.id for row in rows],
        sequences=[row.sequence for row in rows],
        sets=np.array([row.set for row in rows]),
        targets=np.concatenate(targets).astype(dtype),
        scored=np.concatenate(scored).astype(bool),
        files={name: found.path for name, found in sources.items()},
    )


def _check_sets(data: TaskData, source: Source) -> None:
    """An empty set, or a class the probe never sees, is an error here rather than a strange score later."""
    for name in SET_NAMES:
        if not len(data.target_rows(name)):
            if name == "validation":
                marked = "rows True in the column validation" if source.is_table else "records VALIDATION=True"
                fix = f"mark some train {marked}: models are chosen by them"
            else:
                fix = f"check {'the column set' if source.is_table else 'SET= in the headers'}"
            raise InputError(
                f"{source}: the {name} set is empty; {fix}", code="task.empty-set", set=name, path=source.path
            )
    if data.task.target == "class":
        seen, tested = (np.unique(data.targets[data.target_rows(name)]) for name in ("train", "test"))
        names = data.task.labels
        if data.task.binary_labels:
            names = data.task.binary_labels
            seen, tested = (np.flatnonzero(unpack_bits(classes, len(names)).any(0)) for classes in (seen, tested))
        absent = np.setdiff1d(tested, seen)
        if absent.size:
            raise InputError(
                f"{source}: class {names[absent[0]]!r} is in test but never in train; merge or drop it",
                code="task.unseen-class",
                label=names[absent[0]],
                path=source.path,
            )


def _compare_with_flip(data: TaskData, notes: list[str]) -> TaskData:
    """Compare sizes with FLIP's, refuse one secondary_structure test set under the other's name, name flaws."""
    task, sizes = data.task, data.sizes
    expected = task.splits.get(data.split, Split())
    for other in TASKS.values():
        theirs = other.splits.get(data.split, Split())
        same_folder = (other.folder or other.name) == (task.folder or task.name)
        if task.name in TASKS and other.name != task.name and same_folder and sizes["test"] == theirs.test:
            raise InputError(
                f"{data.files['split']} has {theirs.test} test proteins: that is {other.name}, not {task.name}; "
                f"put these files into a folder of that name",
                code="task.other-test-set",
                task=task.name,
                found=other.name,
            )
    known = {"train": expected.train, "validation": expected.validation, "test": expected.test}
    wrong = {name: size for name, size in known.items() if size is not None and sizes[name] != size}
    official = task.name in TASKS and not wrong
    if task.name in TASKS and wrong:
        sizes_found = ", ".join(f"{name} {sizes[name]} instead of {size}" for name, size in wrong.items())
        notes.append(f"not FLIP's own sizes ({sizes_found}): published figures are not comparable")
    fitted, tested = (np.flatnonzero(chosen) for chosen in (data.sets != "test", data.sets == "test"))
    both = {data.ids[row] for row in fitted} & {data.ids[row] for row in tested}
    if both:
        notes.append(f"{len(both)} protein ids are in train and in test")
    seen = {data.sequences[row] for row in fitted}
    same = sum(data.sequences[row] in seen for row in tested)
    if same:
        notes.append(f"{same} of {len(tested)} test proteins have a sequence that train or validation has too")
    repeated = sum(count - 1 for count in Counter(data.ids).values())
    if repeated:
        notes.append(f"{repeated} records repeat an earlier id")
    classes = np.unique(data.targets[data.target_rows("train")])
    if task.target == "class" and len(classes) == 1:
        notes.append(f"train has one class only, {task.labels[classes[0]]!r}: a constant is right, and no score counts")
    return dataclasses.replace(data, official=official, notes=tuple(dict.fromkeys(notes)))
