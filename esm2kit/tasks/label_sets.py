"""Several targets per protein: sets of labels in one cell, labels as columns of 0 and 1, and columns of values."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.tasks.files import TaskRecord
from esm2kit.tasks.labels import QUOTES, is_number, parse_number
from esm2kit.tasks.sources import Source
from esm2kit.tasks.tables import MISSING
from esm2kit.tasks.task import Target, TargetType, Task

# Separators of labels, in the order in which they are tried. Only the first two are taken for separators by themselves.
SEPARATORS = {";": "semicolons", "|": "bars", ",": "commas"}
CERTAIN = ";|"
BRACKETS = {"[": "]", "(": ")", "{": "}"}
# Part of the cells that list several labels from which they are labels, and not the names of classes.
ENOUGH = 0.05
ROUNDING = 1e-12  # relative deviation of values that are equal up to rounding
PRESENT = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}


class LabelSets(NamedTuple):
    """The labels of proteins.

    Args:
        sets: (P) labels of each protein, sorted; may be empty.
        labels: all labels, sorted.
        note: how they were read, for the log.
    """

    sets: list[tuple[str, ...]]
    labels: tuple[str, ...]
    note: str


def _strip_brackets(text: str) -> tuple[str, bool]:
    """Return a text without brackets around it, and whether it had any."""
    inner = text.strip()
    bracketed = len(inner) > 1 and BRACKETS.get(inner[0]) == inner[-1]
    return (inner[1:-1].strip() if bracketed else inner), bracketed


def split_label_set(text: str, separator: str) -> tuple[str, ...]:
    """Split the labels of a protein.

    Args:
        text: labels with a separator, possibly in brackets and with quotation marks; `[]` has no label.
        separator: of the labels.

    Returns:
        The different labels, sorted.
    """
    inner, _ = _strip_brackets(text)
    items = (" ".join(item.split()).strip(QUOTES).strip() for item in inner.split(separator))
    return tuple(sorted({item for item in items if item}))


def join_label_sets(first: str, second: str, separator: str) -> str:
    """Join the labels of two rows of one protein, without brackets."""
    return separator.join(sorted({*split_label_set(first, separator), *split_label_set(second, separator)}))


def find_separator(texts: Sequence[str], certain: bool) -> str | None:
    """Find the separator of the labels of a task.

    Args:
        texts: targets of the proteins.
        certain: whether to accept only a separator that is beyond doubt: a semicolon, a bar or a comma in brackets, as
            `_separates` describes. Otherwise commas between words are accepted too, and else the first separator that
            occurs.

    Returns:
        The separator; None without one.
    """
    for commas in ("bracketed",) if certain else ("bracketed", "words"):
        for separator in SEPARATORS:
            if _separates(texts, separator, commas):
                return separator
    occurring = (separator for separator in SEPARATORS if any(separator in _strip_brackets(text)[0] for text in texts))
    return None if certain else next(occurring, None)


def find_row_separator(texts: Sequence[str]) -> str:
    """Find the separator of labels where a protein has several rows; a semicolon if each row has one label.

    A name may contain commas and blanks, such as `transferase activity, acting on ester bonds`; such a comma separates
    no labels.

    Args:
        texts: targets of the rows.

    Returns:
        The separator.
    """
    return next((separator for separator in SEPARATORS if _separates(texts, separator, "words")), ";")


def _separates(texts: Sequence[str], separator: str, commas: Literal["bracketed", "words"]) -> bool:
    """Whether a separator is that of labels: texts that list several are common, and their labels occur elsewhere.

    Returns:
        True if at least two texts and 5% of all list several labels, of which most are in other texts as well and are
        not numbers. Commas count in brackets, or between words without blanks.
    """
    listed = [text for text in texts if separator in _strip_brackets(text)[0]]
    if separator not in CERTAIN:
        listed = [text for text in listed if _strip_brackets(text)[1] or (commas == "words" and _lists_words(text))]
    if len(listed) < max(2, ENOUGH * len(texts)):
        return False
    counts = Counter(label for text in texts for label in split_label_set(text, separator))
    parts = [split_label_set(text, separator) for text in listed]
    repeated = sum(all(counts[label] > 1 for label in labels) for labels in parts)
    numeric = sum(all(map(is_number, labels)) for labels in parts)
    return 2 * repeated > len(listed) and 2 * numeric <= len(listed)


def _lists_words(text: str) -> bool:
    return not any(" " in label for label in split_label_set(text, ","))


def read_label_sets(rows: Sequence[TaskRecord], source: Source, chosen: bool) -> LabelSets | None:
    """Read the labels of proteins from one text per protein.

    Args:
        rows: records of the split.
        source: the file, for the message.
        chosen: whether the user set the type of the targets to multilabel; otherwise only a separator beyond doubt is
            accepted.

    Returns:
        The labels; None if the texts are not sets of labels.

    Raises:
        InputError: a text lists 0 and 1 instead of labels.
    """
    texts = [row.target or "" for row in rows]
    separator = find_separator(texts, certain=not chosen)
    if separator is None and not chosen:
        return None
    sets = [split_label_set(text, separator or ";") for text in texts]
    labels = tuple(sorted({label for labels in sets for label in labels}))
    if set(labels) <= {"0", "1"}:
        row = next(row for row, text in zip(rows, texts, strict=True) if text)
        raise InputError(
            f"{source}: the target {row.target!r} of record {row.id!r} lists 0 and 1, and the names of the labels are "
            "not known. Write the names of the labels, or one column of 0 and 1 per label, named by --target a,b,c.",
            code="task.label-names",
            record=row.id,
            found=row.target,
            path=source.path,
        )
    separated = f", separated by {SEPARATORS[separator]}" if separator else ""
    other = "" if chosen else "; set target_type to class if each text is one class"
    return LabelSets(sets, labels, f"{_describe_sets(sets, labels)}{separated}{other}")


def _describe_sets(sets: Sequence[tuple[str, ...]], labels: Sequence[str]) -> str:
    """Describe how many labels there are, and how many proteins have."""
    num_labels, empty = sum(map(len, sets)), sum(not labels for labels in sets)
    none = f", {format_count(empty, 'protein')} without a label" if empty else ""
    return f"multi-label: {format_count(len(labels), 'label')}, {num_labels / max(len(sets), 1):.2g} per protein{none}"


def merge_rows(rows: Sequence[TaskRecord], source: Source) -> list[TaskRecord]:
    """Merge the rows of one protein, each of which has some of its labels.

    Args:
        rows: records; those of one protein have the same id, sequence and set.
        source: the file, for the message.

    Returns:
        One record per protein, in the order of the first rows, with the labels of all its rows.

    Raises:
        InputError: two rows of an id have different sequences or sets.
    """
    merged: dict[str, TaskRecord] = {}
    separator = find_row_separator([row.target or "" for row in rows])
    for row in rows:
        first = merged.setdefault(row.id, row)
        if (first.sequence, first.set) != (row.sequence, row.set):
            what = "sequences" if first.sequence != row.sequence else "sets"
            raise InputError(
                f"{source}: two records of {row.id!r} have different {what}. Give each protein an id of its own.",
                code="task.repeated-labels",
                record=row.id,
                path=source.path,
            )
        if first is not row:
            merged[row.id] = first._replace(target=join_label_sets(first.target or "", row.target or "", separator))
    return list(merged.values())


def infer_column_type(
    rows: Sequence[TaskRecord], columns: Sequence[str], target_type: TargetType | None, source: Source
) -> tuple[Target, str]:
    """Infer whether several columns are labels that are present (1) or absent (0), or values.

    Args:
        rows: records with one cell per column.
        columns: names of the columns.
        target_type: type that the user set; class and multilabel require cells of 0 and 1.
        source: the file, for the message.

    Returns:
        "class" for labels or "value", and a note for the log.

    Raises:
        InputError: a cell has another type.
    """
    cells = [(row, column, cell) for row in rows for column, cell in zip(columns, row.cells, strict=True)]
    filled = [(row, column, cell) for row, column, cell in cells if cell.lower() not in MISSING]
    other = next((entry for entry in filled if entry[2].lower() not in PRESENT), None)
    listed = ", ".join(columns)
    if target_type == "value" or (target_type is None and other is not None):
        wrong = next((entry for entry in filled if not is_number(entry[2])), None)
        if wrong is not None:
            _raise_cell(
                wrong, source, "is neither a number nor empty", "Several targets are values, or labels of 0 and 1"
            )
        missing = len(cells) - len(filled)
        note = f"several values per protein: {listed}"
        return "value", note + (f"; {format_count(missing, 'cell')} without a value, not trained on" if missing else "")
    empty = next((entry for entry in cells if entry[2].lower() in MISSING), None)
    wrong = other or empty
    if wrong is not None:
        _raise_cell(wrong, source, "is neither 0 nor 1", "A label is present (1) or absent (0) in each protein")
    sets = [
        tuple(column for column, cell in zip(columns, row.cells, strict=True) if PRESENT[cell.lower()]) for row in rows
    ]
    change = "" if target_type else "; set target_type to value if they are measured"
    return "class", f"{_describe_sets(sets, columns)}, from the columns {listed}{change}"


def _raise_cell(entry: tuple[TaskRecord, str, str], source: Source, problem: str, rule: str) -> None:
    row, column, cell = entry
    raise InputError(
        f"{source}: {cell!r} in column {column!r} of record {row.id!r} {problem}. {rule}: correct the cell, or name "
        "other columns as --target.",
        code="task.cell",
        record=row.id,
        column=column,
        found=cell,
        path=source.path,
    )


def pack_columns(task: Task, rows: Sequence[TaskRecord], source: Source) -> np.ndarray:
    """Build the targets of a task with several targets per protein.

    Args:
        task: the task, with `binary_labels` or `columns`.
        rows: records of the split.
        source: the file, for the message.

    Returns:
        (P, L) int64 0 or 1, or (P, C) float64 with nan for cells without a value.

    Raises:
        InputError: a label is unknown, a number is not valid, or a protein has no value in any column.
    """
    if task.columns:
        values_PC = np.full((len(rows), len(task.columns)), np.nan)
        for place, row in enumerate(rows):
            for column, cell in enumerate(row.cells):
                if cell.lower() not in MISSING:
                    values_PC[place, column] = parse_number(row, cell, source)
        empty = np.flatnonzero(np.isnan(values_PC).all(1))
        if empty.size:
            raise InputError(
                f"{source}: record {rows[empty[0]].id!r} has no value in any of the columns {', '.join(task.columns)}. "
                "Fill in a cell, or remove the row.",
                code="task.no-target",
                record=rows[empty[0]].id,
                path=source.path,
            )
        return values_PC
    labels_PL = np.zeros((len(rows), len(task.binary_labels)), dtype=np.int64)
    if rows and rows[0].cells:
        labels_PL[:] = [[PRESENT[cell.lower()] for cell in row.cells] for row in rows]
        return labels_PL
    separator = find_separator([row.target or "" for row in rows], certain=False) or ";"
    index = {label: place for place, label in enumerate(task.binary_labels)}
    for place, row in enumerate(rows):
        for label in split_label_set(row.target or "", separator):
            if label not in index:
                raise InputError(
                    f"{source}: record {row.id!r} has the unknown label {label!r}. Use some of {', '.join(index)}.",
                    code="task.label",
                    record=row.id,
                    found=label,
                    known=tuple(index),
                )
            labels_PL[place, index[label]] = 1
    return labels_PL


def format_label_set(present_L: np.ndarray, labels: Sequence[str]) -> str:
    """Format the labels of a protein: their names separated by semicolons, empty without a label."""
    return ";".join(label for label, present in zip(labels, present_L, strict=True) if present)


def stratify_columns(targets_PC: np.ndarray, multilabel: bool) -> np.ndarray:
    """Group similar proteins: by their rarest label, or by quantiles of the mean of their standardised values.

    Args:
        targets_PC: (P, C) labels, or values with nan.
        multilabel: whether they are labels.

    Returns:
        (P,) label that the fewest proteins have, C for proteins without one; or (P,) mean standardised values.
    """
    if multilabel:
        rarity_L = np.argsort(np.argsort(targets_PC.sum(0), kind="stable"), kind="stable")
        ranks_PL = np.where(targets_PC > 0, rarity_L, targets_PC.shape[1])
        return ranks_PL.min(1)
    known_PC = np.isfinite(targets_PC)
    num_C = np.maximum(known_PC.sum(0), 1)
    mean_C = np.where(known_PC, targets_PC, 0.0).sum(0) / num_C
    centred_PC = np.where(known_PC, targets_PC - mean_C, 0.0)
    spread_C = np.sqrt(np.square(centred_PC).sum(0) / num_C)
    varies_C = spread_C > ROUNDING * np.abs(mean_C)  # equal values say nothing about similarity
    used_PC = known_PC & varies_C
    return (centred_PC / np.where(varies_C, spread_C, 1.0) * used_PC).sum(1) / np.maximum(used_PC.sum(1), 1)
