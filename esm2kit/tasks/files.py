"""Read the records of a task's files: FLIP's FASTA and CSV, biotrainer's single FASTA, and custom files.

`sequences.fasta` does not read these files because FLIP stores labels as FASTA records as well. Sequences are checked
here.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from esm2kit.core.errors import InputError, find_closest
from esm2kit.core.files import check_git_lfs
from esm2kit.core.yaml_text import parse_yaml
from esm2kit.sequences.alphabet import IS_RESIDUE_BYTE, RESIDUE_LETTERS
from esm2kit.sequences.formats import (
    advise_on_letter,
    check_comment,
    check_first_line,
    check_sequence_format,
)
from esm2kit.sequences.headers import find_control_character, parse_header
from esm2kit.tasks.sources import ENDINGS, Source, find_source, open_text, parse_split_name

# The fields that are read, from headers and from tables.
FIELDS = ("TARGET", "SET", "VALIDATION", "MASK")
COLUMNS = ("sequence", "target", "set", "id", "validation", "mask")
# biotrainer's fields for the second protein of a pair.
PAIR_FIELDS = ("INTERACTOR", "SEQINTERACTOR")
# KEY=value pairs. A value ends at the next key, so it may contain spaces, slashes and signs.
KEY = rf"[A-Z_][A-Z0-9_]*|(?i:{'|'.join(FIELDS + PAIR_FIELDS)})"
ATTRIBUTE = re.compile(rf"(?:^|\s)({KEY})=(.*?)(?=\s+(?:{KEY})=|\s*$)")
SETS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
SETS |= {"training": "train", "dev": "validation", "testing": "test"}
NUMBERED_TEST = re.compile(r"test[-_ .]?\w+")  # biotrainer's further test sets
# Records outside the split: FLIP's `nan`, biotrainer's `pred`, an empty CSV cell.
DROPPED_SETS = {"", "nan", "none", "pred", "prediction"}
# also as spreadsheets write them in German and French
TRUE, FALSE = {"true", "1", "yes", "wahr", "vrai"}, {"false", "0", "no", "", "nan", "none", "falsch", "faux"}
# The line that Excel reads, and some programs write, before the header of a table.
EXCEL_SEPARATOR = re.compile(r'"?sep=.?"?', re.IGNORECASE)


class TaskRecord(NamedTuple):
    """One protein as read from its file; `target` and `mask` are None if the file does not have them.

    `cells` has the targets of a record with several ones.
    """

    id: str
    sequence: str
    target: str | None
    set: str
    mask: str | None
    cells: tuple[str, ...] = ()


class SplitRecords(NamedTuple):
    """One split as read from its files.

    Args:
        rows: records of the split.
        files: "split", and "sequences" and "mask" if they were read.
        dropped: number of records outside the split.
        unread: names of the header fields or columns that are not read.
    """

    rows: list[TaskRecord]
    files: dict[str, Source]
    dropped: int
    unread: tuple[str, ...] = ()


def read_records(source: Source) -> Iterator[tuple[str, str]]:
    """Read the records of a FASTA file.

    Args:
        source: the file.

    Yields:
        The header without '>', and the body; its lines are separated by newlines.

    Raises:
        InputError: there is text before the first header, a header has no id, or there is no record.
    """
    header: str | None = None
    body: list[str] = []
    with open_text(source) as text:
        for number, line in enumerate(text, 1):
            line = line.strip()
            if not line:
                continue
            if line[0] == ">":
                if header is not None:
                    yield header, "\n".join(body)
                header, body = line[1:].strip(), []
                if not parse_header(header).id:
                    raise InputError(
                        f"{source}: the header in line {number} has no id. Write it after '>'.",
                        code="task.no-id",
                        line=number,
                        path=source.path,
                    )
                continue
            check_comment(line, f"{source}: line {number}", source.path)
            if header is None:
                check_first_line(line, source.path)
                raise InputError(
                    f"{source}: line {number} precedes the first header. Start each record with '>' and an id.",
                    code="task.no-header",
                    line=number,
                    path=source.path,
                )
            body.append(line)
    if header is None:
        raise InputError(f"{source} contains no FASTA records", code="task.no-records", path=source.path)
    yield header, "\n".join(body)


def parse_attributes(header: str, source: Source) -> tuple[str, dict[str, str]]:
    """Split a header `id TARGET=... SET=... VALIDATION=... MASK=...` into the id and the attributes.

    Args:
        header: the header line without '>'.
        source: its file, for the message.

    Returns:
        The id, and the values by name. Names of fields that are read are in upper case.

    Raises:
        InputError: a field occurs twice, or belongs to a pair of proteins.
    """
    row_id, text = parse_header(header)
    found = [(key.upper(), value.strip()) for key, value in ATTRIBUTE.findall(text)]
    # a set, a flag and a mask have no blanks: what follows them is a comment, as in biotrainer's examples
    attributes = {key: value if key not in FIELDS[1:] else value.partition(" ")[0] for key, value in found}
    if len(attributes) < len(found):
        names = [key for key, _ in found]
        twice = next(key for key in names if names.count(key) > 1)
        raise InputError(
            f"{source}: record {row_id!r} has the field {twice}= twice. Keep one.",
            code="task.repeated-field",
            record=row_id,
            field=twice,
            path=source.path,
        )
    _check_pairs(attributes, row_id, source)
    return row_id, attributes


def _check_pairs(names: Iterable[str], row_id: str, source: Source) -> None:
    """Refuse a record of two proteins."""
    pair = next((name for name in names if name.upper() in PAIR_FIELDS), None)
    if pair is not None:
        found = f"has the column {pair}" if source.is_table else f"record {row_id!r} has the field {pair}="
        raise InputError(
            f"{source}: {found}: a target of a pair of proteins. Write all records as pairs, or a table with "
            "the columns sequence_a, sequence_b, target and set.",
            code="task.pair",
            record=row_id,
            field=pair,
            path=source.path,
        )


def _find_unread(names: Iterable[str], known: tuple[str, ...], source: Source) -> tuple[str, ...]:
    """List the fields that are not read, in order.

    Args:
        names: fields of the file.
        known: fields that are read.
        source: the file, for the message.

    Returns:
        The names, without repetitions.

    Raises:
        InputError: a name is probably a misspelt field that does not occur.
    """
    unread = tuple(dict.fromkeys(name for name in names if name and name not in known))
    absent = [name for name in known if name not in names]
    for name in unread:
        if meant := find_closest(name, absent, 0.85):
            raise InputError(
                f"{source}: the {'column' if source.is_table else 'field'} {name!r} is not known; did you mean "
                f"{meant!r}? Correct or rename it.",
                code="task.field",
                found=name,
                nearest=meant,
                path=source.path,
            )
    return unread


def parse_set(row_id: str, set_name: str, validation: str, source: Source) -> str | None:
    """Parse the set of a record.

    Args:
        row_id: the record's id, for the message.
        set_name: text of its set.
        validation: text of its validation flag, which only matters for train.
        source: its file, for the message.

    Returns:
        "train", "validation" or "test", or None for a record outside the split.

    Raises:
        InputError: the set or the flag is unknown.
    """
    name, flag = set_name.strip().lower(), validation.strip().lower()
    if source.test_set:  # of several test sets, the others are left out
        name = "test" if name == source.test_set.lower() else "" if is_test_set(name) else name
    if name in DROPPED_SETS:
        return None
    if name not in SETS:
        found = f"the set {set_name!r}" if source.is_table else f"SET={set_name!r}"
        further = f" If it is one of several test sets of a task, choose one, such as --split {set_name}."
        raise InputError(
            f"{source}: record {row_id!r} has {found}. Use train, val or test, or leave the set empty to omit the "
            f"record.{further if is_test_set(name) else ''}",
            code="task.set",
            record=row_id,
            found=set_name,
        )
    if flag not in TRUE | FALSE:
        found = f"the validation {validation!r}" if source.is_table else f"VALIDATION={validation!r}"
        raise InputError(
            f"{source}: record {row_id!r} has {found}. Use True or False.",
            code="task.validation",
            record=row_id,
            found=validation,
        )
    if flag in TRUE and SETS[name] == "test":
        raise InputError(
            f"{source}: record {row_id!r} is in the test set and marked for validation. Validation records are chosen "
            "from train: correct its set or its validation.",
            code="task.contradiction",
            record=row_id,
            found=(set_name, validation),
        )
    return "validation" if flag in TRUE else SETS[name]


def is_test_set(name: str) -> bool:
    """Whether a set that is neither train nor validation may be one of several test sets, such as test2 or casp12.

    Args:
        name: of the set.

    Returns:
        False for one that is probably a misspelt train, validation or test.
    """
    name = name.strip().lower()
    if name in DROPPED_SETS or (name in SETS and SETS[name] != "test"):
        return False
    return name in SETS or bool(NUMBERED_TEST.fullmatch(name)) or find_closest(name, list(SETS), 0.75) is None


def check_sequence(row_id: str, sequence: str, source: Source) -> str:
    """Check a sequence, convert it to upper case, and remove blanks and a trailing stop, as for FASTA files.

    Args:
        row_id: the record's id, for the message.
        sequence: amino-acid letters.
        source: the file, for the message.

    Returns:
        The clean sequence.

    Raises:
        InputError: the sequence is empty or has a character that is not an amino-acid letter.
    """
    sequence = "".join(sequence.split()).upper().removesuffix("*")
    if not sequence:
        raise InputError(
            f"{source}: record {row_id!r} has no sequence. Add it, or remove the record.",
            code="task.no-sequence",
            record=row_id,
        )
    codes = np.frombuffer(sequence.encode("ascii", errors="replace"), dtype=np.uint8)
    wrong = np.flatnonzero(~IS_RESIDUE_BYTE[codes])
    if wrong.size:
        check_sequence_format(f"{source}: record {row_id!r}", sequence, source.path, row_id, source.is_table)
        advice = (
            advise_on_letter(sequence[wrong[0]], sequence) or "Write X for an unknown residue, or remove the record."
        )
        raise InputError(
            f"{source}: record {row_id!r} has the invalid residue {sequence[wrong[0]]!r} at position {wrong[0] + 1}, "
            f"which is not one of {RESIDUE_LETTERS}. {advice}",
            code="task.residue",
            record=row_id,
            found=sequence[wrong[0]],
            residue=int(wrong[0]) + 1,
        )
    return sequence


def read_fasta_split(
    split: Source,
    sequences: Source | None,
    mask: Source | None,
    target: str | Sequence[str] | None = None,
    needs_sets: bool = True,
) -> SplitRecords:
    """Read a split in FASTA format.

    Args:
        split: FASTA with SET in the headers; the bodies are sequences, or residue labels for records without TARGET if
            `sequences` is given.
        sequences: FASTA with the sequences of a residue task in FLIP's format.
        mask: FASTA with 1 for each residue that is scored and 0 for the others.
        target: header field of the targets, or several. None is TARGET.
        needs_sets: whether every record must have a set. One without is in train otherwise.

    Returns:
        The records of the split. `files` has "sequences" only if a record needed it.

    Raises:
        InputError: a record is invalid.
    """
    by_id: dict[str, str] | None = None
    masks = _read_by_id(mask) if mask else {}
    rows, dropped, names, fields = [], 0, {}, _list_names(target, "TARGET", str.upper)
    for header, body in read_records(split):
        row_id, attributes = parse_attributes(header, split)
        names |= attributes
        if needs_sets and "SET" not in attributes:
            raise InputError(
                f"{split}: record {row_id!r} has no set. Add SET=train, SET=val or SET=test to its header, or pass "
                "a table of your measurements as labels.",
                code="task.no-set",
                record=row_id,
                path=split.path,
            )
        chosen = parse_set(row_id, attributes.get("SET", "train"), attributes.get("VALIDATION", ""), split)
        if chosen is None:
            dropped += 1
            continue
        cells = tuple(attributes.get(field, "") for field in fields)
        label, sequence = cells[0] or None, body
        if label is None and len(cells) == 1 and sequences is not None:
            by_id = _read_by_id(sequences) if by_id is None else by_id
            if row_id not in by_id:
                raise InputError(
                    f"{split}: record {row_id!r} is missing from {sequences}. Add its sequence there.",
                    code="task.not-in-sequences",
                    record=row_id,
                    path=split.path,
                )
            label, sequence = body, by_id[row_id]
        if masks and row_id not in masks:
            raise InputError(
                f"{split}: record {row_id!r} is missing from {mask}. Add its mask there.",
                code="task.not-in-mask",
                record=row_id,
                path=split.path,
            )
        sequence = check_sequence(row_id, sequence, split)
        if label is body:  # a line break separates labels only if they are separated elsewhere
            label = body if len(body.split()) == len(sequence) else body.replace("\n", "")
        cells = cells if len(cells) > 1 else ()
        rows.append(TaskRecord(row_id, sequence, label, chosen, attributes.get("MASK", masks.get(row_id)), cells))
    files = {"split": split, "sequences": sequences if by_id is not None else None, "mask": mask}
    absent = [field for field in fields if field not in names]
    if target is not None and absent:
        field = absent[0]
        found = ", ".join(name for name in names if name not in FIELDS) or "none"
        raise InputError(
            f"{split}: no header has the field {field}=, which target names; the other fields are {found}.",
            code="task.no-target-field",
            field=field,
            path=split.path,
        )
    unread = _find_unread(names, (*fields, *FIELDS[1:]), split)
    return SplitRecords(rows, {name: found for name, found in files.items() if found}, dropped, unread)


def _list_names(target: str | Sequence[str] | None, default: str, change: Callable[[str], str]) -> tuple[str, ...]:
    """Return the names of the columns or fields of the targets, as files write them."""
    names = [target or default] if isinstance(target, str | None) else target
    return tuple(change(name.strip()) for name in names)


def _read_by_id(source: Source) -> dict[str, str]:
    """Read the bodies of a FASTA file by id; an id may only be repeated with the same body."""
    bodies: dict[str, str] = {}
    for header, body in read_records(source):
        row_id, body = parse_header(header).id, "".join(body.split())
        if bodies.setdefault(row_id, body) != body:
            raise InputError(
                f"{source}: the id {row_id!r} occurs twice with different content. Give each record an id of its own, "
                "also in the file of the split.",
                code="task.repeated-id",
                record=row_id,
                path=source.path,
            )
    return bodies


def read_csv_split(split: Source, target: str | Sequence[str] | None = None, needs_sets: bool = True) -> SplitRecords:
    """Read a split in CSV format, with the columns sequence, target, set and, optionally, validation, id and mask.

    The delimiter is a comma, a semicolon or a tab, whichever the header line uses. Column names are not case-sensitive.
    A cell of the column id is the complete id, which may contain blanks.

    Args:
        split: the CSV file.
        target: column of the targets, or several. None is the one named target.
        needs_sets: whether there must be a column set. Without one, all records are in train otherwise.

    Returns:
        The records of the split, with ids `Sequence<row>` if there is no id column.

    Raises:
        InputError: a column is missing, a row has more fields than the header, or a value is invalid.
    """
    rows, dropped, labels = [], 0, _list_names(target, "target", str.lower)
    with open_text(split) as text:
        filled = (line for line in text if line.strip() and not EXCEL_SEPARATOR.fullmatch(line.strip()))
        columns, delimiter = _parse_columns(next(filled, ""), split, labels, needs_sets)
        for number, line in enumerate(csv.DictReader(text, columns, restval="", delimiter=delimiter, strict=True)):
            cells = {name: cell.strip() for name, cell in line.items() if name}
            row_id = " ".join(cells.get("id", "").split()) or f"Sequence{number}"
            if any(map(str.strip, line.get(None, ()))):
                found = f"record {row_id!r} in row {number + 1} has more than the {len(columns)} fields of the header"
                raise InputError(
                    f"{split}: {found}. Put quotation marks around values that contain {delimiter!r}.",
                    code="task.fields",
                    record=row_id,
                    row=number + 1,
                    path=split.path,
                )
            if find_control_character(row_id):
                raise InputError(
                    f"{split}: the id {row_id!r} in row {number + 1} contains a control character. Remove it.",
                    code="task.id",
                    record=row_id,
                    row=number + 1,
                    path=split.path,
                )
            chosen = parse_set(row_id, cells.get("set", "train"), cells.get("validation", ""), split)
            if chosen is None:
                dropped += 1
                continue
            if "id" in cells and not cells["id"].strip():
                raise InputError(
                    f"{split}: row {number + 1} has no id. Fill in the cell, or remove the column id from the table.",
                    code="task.no-id",
                    row=number + 1,
                    path=split.path,
                )
            sequence = check_sequence(row_id, cells["sequence"], split)
            values = tuple(cells[label] for label in labels) if len(labels) > 1 else ()
            rows.append(
                TaskRecord(row_id, sequence, cells[labels[0]] or None, chosen, cells.get("mask") or None, values)
            )
    return SplitRecords(
        rows,
        {"split": split},
        dropped,
        _find_unread(columns, (*labels, *(name for name in COLUMNS if name != "target")), split),
    )


def _parse_columns(header: str, split: Source, targets: tuple[str, ...], needs_sets: bool) -> tuple[list[str], str]:
    """Parse the header line of a CSV file.

    Args:
        header: the line.
        split: the file, for the message.
        targets: columns of the targets.
        needs_sets: whether the column set is needed.

    Returns:
        The column names in lower case, and the delimiter.

    Raises:
        InputError: a column is missing or occurs twice.
    """
    needed = ("sequence", *targets, *(("set",) if needs_sets else ()))

    def split_header(delimiter: str) -> list[str]:
        return [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]

    delimiter = max(",;\t", key=lambda found: (len(set(needed) & set(split_header(found))), header.count(found)))
    columns = split_header(delimiter)
    missing = [name for name in needed if name not in columns]
    twice = [name for name in dict.fromkeys((*needed, "set", "id", "validation", "mask")) if columns.count(name) > 1]
    if missing or twice:
        problem = f"lacks the column(s) {', '.join(missing)}" if missing else f"has the column {twice[0]} twice"
        found = header.strip() if len(header) < 200 else f"{header[:200]}..."
        raise InputError(
            f"{split}: the header {found!r} {problem}. Name the columns sequence, target, set and validation, or "
            "pass the table as labels, and a FASTA with the sequences as fasta.",
            code="task.columns",
            missing=tuple(missing),
            repeated=tuple(twice),
            path=split.path,
        )
    _check_pairs(columns, "", split)
    return columns, delimiter


def read_split(
    folder: Path,
    split: str,
    file: Path | None = None,
    target: str | Sequence[str] | None = None,
    needs_sets: bool = True,
) -> SplitRecords:
    """Read one split.

    Args:
        folder: of the split and, for a residue task, of its other files.
        split: name of the split; of the test set, if the file has another name.
        file: of the split. None selects the first one of that name in the folder.
        target: column or header field of the targets, or several. None is the one named target.
        needs_sets: whether every record must have a set. One without is in train otherwise.

    Returns:
        The records of the split, and the files that were read.

    Raises:
        InputError: there is no file of that name, or a record is invalid.
    """
    inner = "" if file is None or split == parse_split_name(file.name) else split
    source = (
        Source(file, test_set=inner) if file else find_source(folder, tuple(f"{split}{ending}" for ending in ENDINGS))
    )
    if source is None:
        raise InputError(
            f"{folder} contains neither {split}.fasta nor {split}.csv, nor a zip archive with one of them.",
            code="task.no-split",
            split=split,
            path=folder,
        )
    if source.is_table:
        return read_csv_split(source, target, needs_sets)
    return read_fasta_split(
        source,
        find_source(folder, ("sequences.fasta",)),
        find_source(folder, ("mask.fasta", "resolved.fasta")),
        target,
        needs_sets,
    )


def read_description(folder: Path, name: str) -> dict[str, Any]:
    """Read the entry of a custom task in `tasks.yaml`, in the task's folder or its parent.

    Possible keys are level, target, classes, metric, unit, description, computed (true for a property that was computed
    and not measured), source and licence.

    Args:
        folder: of the task.
        name: of the task.

    Returns:
        The entry, empty if there is none.

    Raises:
        InputError: the file is not valid.
    """
    for path in (folder / "tasks.yaml", folder.parent / "tasks.yaml"):
        if not path.is_file():
            continue
        check_git_lfs(path)
        try:
            listed = parse_yaml(path.read_text(encoding="utf-8"))["tasks"]
            found = [entry for entry in listed if entry["name"] == name]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            found = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else type(error).__name__
            raise InputError(
                f"{path} is not valid ({found}). It needs a list 'tasks' of entries with 'name'.",
                code="task.description",
                path=path,
            ) from None
        if found:
            return found[0]
    return {}
