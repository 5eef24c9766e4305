"""Check the labelled proteins of a task, and note what a reader of its scores must know."""

import dataclasses
from collections import Counter

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.letters import FileLetters, LetterCounts
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.label_sets import format_label_set
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.sources import Source
from esm2kit.tasks.task import Split
from esm2kit.tasks.task_data import SET_NAMES, TaskData


def check_letters(data: TaskData) -> list[str]:
    """Check that the sequences are of proteins; return notes on those that are probably not."""
    letters = LetterCounts()
    file_letters = FileLetters(data.files.get("sequences", next(iter(data.files.values()))))
    for sequence in data.sequences:
        letters.add(sequence)
        file_letters.add(np.frombuffer(sequence.encode(), dtype=np.uint8))
    file_letters.check()
    return letters.describe()


def find_contradictions(data: TaskData) -> list[str]:
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


def check_sets(data: TaskData, source: Source) -> None:
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


def compare_with_flip(data: TaskData, notes: list[str]) -> TaskData:
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
    notes += find_contradictions(data)
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
