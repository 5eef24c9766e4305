"""Reading a task's files, in any form they come: FLIP's FASTA, CSV and zip, biotrainer's one FASTA, the user's own.

Sequence letters are checked here; labels live in the same FASTA syntax but are no residues, which is why this reader
is its own.
"""

import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml

from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import IS_RESIDUE_BYTE

# KEY=value pairs; a value runs to the next key, so it may hold spaces, slashes and signs.
ATTRIBUTE = re.compile(r"(?:^|\s)([A-Z_]+)=(.*?)(?=\s+[A-Z_]+=|\s*$)")
SETS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
# Not part of the split: FLIP's `nan`, biotrainer's `pred`, CSV's blank.
DROPPED_SETS = {"", "nan", "none", "pred", "prediction"}
TRUE, FALSE = {"true", "1", "yes"}, {"false", "0", "no", "", "nan", "none"}
# What a split's file ends in; of several in one folder the first counts.
ENDINGS = (".fasta", ".fa", ".fasta.gz", ".fa.gz", ".csv", ".csv.gz")
AUXILIARY = ("sequences", "mask", "resolved")
MAX_ZIP_BYTES = 8 << 30
# Deflate cannot exceed 1,032; FLIP's most repetitive CSV, variants of one protein, stays below 200.
MAX_ZIP_RATIO = 400


class Source(NamedTuple):
    """A file, or a member of a zip."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def is_table(self) -> bool:
        """Whether it is a CSV, whose users know no headers after '>'."""
        return (self.member or self.path.name).endswith((".csv", ".csv.gz"))


class TaskRecord(NamedTuple):
    """One protein as its file tells it; `target` and `mask` are None where the file is silent."""

    id: str
    sequence: str
    target: str | None
    set: str
    mask: str | None


def check_zip(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that would write outside a folder or that inflates beyond reason.

    Raises: InputError naming the member.
    """
    total = 0
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or (name.parts and ":" in name.parts[0]):
            raise InputError(
                f"{path}: member {member.filename!r} points outside the archive; get the file again",
                code="zip.path",
                member=member.filename,
                path=path,
            )
        total += member.file_size
        if member.file_size > max(MAX_ZIP_RATIO * member.compress_size, 1 << 20) or total > MAX_ZIP_BYTES:
            raise InputError(
                f"{path}: member {member.filename!r} would inflate from {member.compress_size} to {member.file_size} "
                "bytes; this is no FLIP archive",
                code="zip.size",
                member=member.filename,
                path=path,
            )


@contextmanager
def open_text(source: Source) -> Iterator[io.TextIOBase]:
    """A file's text: plain, gzip, or a zip member read in place (nothing is unpacked)."""
    try:
        if source.member is not None:
            with zipfile.ZipFile(source.path) as archive:
                check_zip(archive, source.path)
                with archive.open(source.member) as raw:
                    yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None)
            return
        with open(source.path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        opener = gzip.open if packed else open
        with opener(source.path, "rt", encoding="utf-8-sig") as text:
            yield text
    except (zipfile.BadZipFile, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{source} is damaged ({error}); get the file again", code="task.damaged", path=source.path
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"{source} is no text in UTF-8; save it as UTF-8", code="task.encoding", path=source.path
        ) from None
    except csv.Error as error:
        raise InputError(
            f"{source} is no table that can be read ({error}); is a quote left open?",
            code="task.table",
            path=source.path,
        ) from None


def find_source(folder: Path, names: tuple[str, ...]) -> Source | None:
    """The first of some file names in a folder, or else inside a zip of that folder."""
    for name in names:
        if (folder / name).is_file():
            return Source(folder / name)
    for path in sorted(folder.glob("*.zip")):
        members = _list_members(path)
        for name in names:
            if name in members:
                return Source(path, members[name])
    return None


def _list_members(path: Path) -> dict[str, str]:
    """File name -> member of a zip, those of macOS left out."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
            return {PurePosixPath(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is damaged ({error}); get the file again", code="task.damaged", path=path) from None


def parse_split_name(file_name: str) -> str | None:
    """The split that a file of this name holds; None where it ends in none of ENDINGS."""
    return next((file_name.removesuffix(ending) for ending in ENDINGS if file_name.endswith(ending)), None)


def find_split_names(folder: Path) -> list[str]:
    """Names of the split files in a folder of the user's own, zips included.

    Raises: InputError for a damaged zip.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for path in folder.glob("*.zip"):
        names |= _list_members(path).keys()
    splits = {split for name in names if name[0] != "." and (split := parse_split_name(name))}
    return sorted(splits - set(AUXILIARY))


def read_records(source: Source) -> Iterator[tuple[str, str]]:
    """(header without '>', body with its lines joined) of every FASTA record.

    Raises: InputError for text before the first header, a header without id, or a file without records.
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
                    yield header, "".join(body)
                header, body = line[1:].strip(), []
                if not header:
                    raise InputError(
                        f"{source}: line {number} is a header without an id",
                        code="task.no-id",
                        line=number,
                        path=source.path,
                    )
            elif header is None:
                raise InputError(
                    f"{source}: line {number} comes before any '>' header",
                    code="task.no-header",
                    line=number,
                    path=source.path,
                )
            else:
                body.append(line)
    if header is None:
        raise InputError(f"{source} holds no FASTA record", code="task.no-records", path=source.path)
    yield header, "".join(body)


def parse_header(header: str) -> tuple[str, dict[str, str]]:
    """Id and attributes of `id TARGET=... SET=... VALIDATION=... MASK=...`."""
    name, _, rest = header.partition(" ")
    return name, {key: value.strip() for key, value in ATTRIBUTE.findall(rest)}


def parse_set(row_id: str, set_name: str, validation: str, source: Source) -> str | None:
    """train, validation, test, or None for a record outside the split.

    Raises: InputError for any other word.
    """
    name, flag = set_name.strip().lower(), validation.strip().lower()
    if name in DROPPED_SETS:
        return None
    if name not in SETS:
        found = f"the set {set_name!r}" if source.is_table else f"SET={set_name!r}"
        raise InputError(
            f"{source}: record {row_id!r} has {found}; known are train, val and test",
            code="task.set",
            record=row_id,
            found=set_name,
        )
    if flag not in TRUE | FALSE:
        found = f"the validation {validation!r}" if source.is_table else f"VALIDATION={validation!r}"
        raise InputError(
            f"{source}: record {row_id!r} has {found}; say True or False",
            code="task.validation",
            record=row_id,
            found=validation,
        )
    return "validation" if flag in TRUE and name == "train" else SETS[name]


def check_sequence(row_id: str, sequence: str, source: Source) -> str:
    """Upper case, without a trailing stop.

    Raises: InputError for an empty sequence or a letter that is no residue.
    """
    sequence = sequence.upper().removesuffix("*")
    if not sequence:
        raise InputError(f"{source}: record {row_id!r} has no sequence", code="task.no-sequence", record=row_id)
    codes = np.frombuffer(sequence.encode("ascii", errors="replace"), dtype=np.uint8)
    wrong = np.flatnonzero(~IS_RESIDUE_BYTE[codes])
    if wrong.size:
        raise InputError(
            f"{source}: record {row_id!r} has {sequence[wrong[0]]!r} at residue {wrong[0] + 1}",
            code="task.residue",
            record=row_id,
            found=sequence[wrong[0]],
            residue=int(wrong[0]) + 1,
        )
    return sequence


def read_fasta_split(split: Source, sequences: Source | None, mask: Source | None) -> tuple[list[TaskRecord], int]:
    """Rows of a FASTA split and the number of records outside it.

    Args:
        split: headers with SET; bodies are sequences, or residue labels where `sequences` is given.
        sequences: FASTA by id, of a residue task in FLIP's form.
        mask: FASTA by id, 1 for a residue that is scored.
    Raises: InputError naming file and record.
    """
    by_id = dict(_read_by_id(sequences)) if sequences else {}
    masks = dict(_read_by_id(mask)) if mask else {}
    rows, dropped = [], 0
    for header, body in read_records(split):
        row_id, attributes = parse_header(header)
        if "SET" not in attributes:
            raise InputError(
                f"{split}: record {row_id!r} has no SET=train|val|test in its header",
                code="task.no-set",
                record=row_id,
                path=split.path,
            )
        chosen = parse_set(row_id, attributes["SET"], attributes.get("VALIDATION", ""), split)
        if chosen is None:
            dropped += 1
            continue
        target, sequence = attributes.get("TARGET") or None, body
        if target is None and sequences is not None:
            if row_id not in by_id:
                raise InputError(
                    f"{split}: record {row_id!r} is not in {sequences}",
                    code="task.not-in-sequences",
                    record=row_id,
                    path=split.path,
                )
            target, sequence = body, by_id[row_id]
        if masks and row_id not in masks:
            raise InputError(
                f"{split}: record {row_id!r} is not in {mask}", code="task.not-in-mask", record=row_id, path=split.path
            )
        row_mask = attributes.get("MASK", masks.get(row_id))
        rows.append(TaskRecord(row_id, check_sequence(row_id, sequence, split), target, chosen, row_mask))
    return rows, dropped


def _read_by_id(source: Source) -> Iterator[tuple[str, str]]:
    return ((header.partition(" ")[0], body) for header, body in read_records(source))


def read_csv_split(split: Source) -> tuple[list[TaskRecord], int]:
    """Rows of `sequence,target,set,validation` (ids `Sequence<row>` unless a column `id` is there) and those outside.

    Commas, semicolons or tabs part the columns, as the header line has them; names of columns are read without case.
    Raises: InputError for a missing column, a row of more fields than the header, or a bad value.
    """
    rows, dropped = [], 0
    with open_text(split) as text:
        columns, delimiter = _parse_columns(next((line for line in text if line.strip()), ""), split)
        for number, line in enumerate(csv.DictReader(text, columns, restval="", delimiter=delimiter)):
            cells = {name: cell.strip() for name, cell in line.items() if name}
            row_id = cells.get("id") or f"Sequence{number}"
            if any(map(str.strip, line.get(None, ()))):
                found = f"record {row_id!r}, row {number + 1}, has more fields than the header's {len(columns)}"
                raise InputError(
                    f"{split}: {found}; put quotes around a value that holds {delimiter!r}",
                    code="task.fields",
                    record=row_id,
                    row=number + 1,
                    path=split.path,
                )
            chosen = parse_set(row_id, cells["set"], cells.get("validation", ""), split)
            if chosen is None:
                dropped += 1
                continue
            sequence = check_sequence(row_id, cells["sequence"], split)
            rows.append(TaskRecord(row_id, sequence, cells["target"] or None, chosen, cells.get("mask") or None))
    return rows, dropped


def _parse_columns(header: str, split: Source) -> tuple[list[str], str]:
    """Names of a table's columns, in lower case, and what parts them.

    Raises: InputError, with the header, for one that lacks a column or has it twice.
    """
    needed = ("sequence", "target", "set")

    def split_header(delimiter: str) -> list[str]:
        return [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]

    delimiter = max(",;\t", key=lambda found: (len(set(needed) & set(split_header(found))), header.count(found)))
    columns = split_header(delimiter)
    missing = [name for name in needed if name not in columns]
    twice = [name for name in (*needed, "id", "validation", "mask") if columns.count(name) > 1]
    if missing or twice:
        flaw = f"lacks the column(s) {', '.join(missing)}" if missing else f"has the column {twice[0]} twice"
        found = header.strip() if len(header) < 200 else f"{header[:200]}..."
        raise InputError(
            f"{split}: its first line, {found!r}, {flaw}; name them sequence, target, set and validation",
            code="task.columns",
            missing=tuple(missing),
            repeated=tuple(twice),
            path=split.path,
        )
    return columns, delimiter


def read_split(folder: Path, split: str, file: Path | None = None) -> tuple[list[TaskRecord], dict[str, Source], int]:
    """Rows of one split, the files they came from, and how many records the files keep outside it.

    Args:
        folder: where the split lies, and a residue task's other files.
        split: its name.
        file: the split itself, where it was named; else the first of that name in the folder.
    Raises: InputError if no file of that name is there.
    """
    source = Source(file) if file else find_source(folder, tuple(f"{split}{ending}" for ending in ENDINGS))
    if source is None:
        raise InputError(
            f"{folder} has neither {split}.fasta nor {split}.csv, nor a zip that holds one",
            code="task.no-split",
            split=split,
            path=folder,
        )
    files = {"split": source}
    if source.is_table:
        rows, dropped = read_csv_split(source)
        return rows, files, dropped
    sequences = find_source(folder, ("sequences.fasta",))
    mask = find_source(folder, ("mask.fasta", "resolved.fasta"))
    rows, dropped = read_fasta_split(source, sequences, mask)
    files |= {name: found for name, found in (("sequences", sequences), ("mask", mask)) if found}
    return rows, files, dropped


def read_description(folder: Path, name: str) -> dict[str, Any]:
    """What `tasks.yaml`, in a task's folder or the one above, says of a task of the user's own; empty if nothing.

    Keys it may hold: target, classes, metric, unit, description, computed (true for a property that was computed, not
    measured), source, licence.
    Raises: InputError if the file cannot be read.
    """
    for path in (folder / "tasks.yaml", folder.parent / "tasks.yaml"):
        if not path.is_file():
            continue
        try:
            listed = yaml.safe_load(path.read_text())["tasks"]
            found = [entry for entry in listed if entry["name"] == name]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no list of tasks with a name each ({type(error).__name__})",
                code="task.description",
                path=path,
            ) from None
        if found:
            return found[0]
    return {}
