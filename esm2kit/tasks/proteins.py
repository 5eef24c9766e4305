"""Read proteins with all columns of their table, to divide them into sets or to check sets that exist."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.sequences.fasta import Record, find_fasta_files, is_fasta_name, read_fasta
from esm2kit.tasks.columns import read_columns
from esm2kit.tasks.files import check_sequence, parse_attributes, parse_set, read_fasta_split
from esm2kit.tasks.kinds import FOLD, NATIVE, find_kind, read_table_or_sets
from esm2kit.tasks.labels import is_number
from esm2kit.tasks.labels_table import (
    FOLD_NAMES,
    SET_NAMES,
    TARGET_NAMES,
    VALIDATION_NAMES,
    find_name_column,
    find_sequence_column,
    find_set_column,
)
from esm2kit.tasks.sources import Source, find_source
from esm2kit.tasks.split import build_strata
from esm2kit.tasks.tables import MISSING, Table, is_numeric, parse_numbers, split_unit
from esm2kit.tasks.wild_types import add_sequences

SET_FIELDS = ("SET", "VALIDATION")  # of a FASTA header
PREVIOUS = "previous_"  # before the names of columns of an earlier division


class Proteins(NamedTuple):
    """Proteins and what their table says about them.

    Args:
        ids: (P) names.
        sequences: (P) residues in upper case.
        columns: name -> (P) cells as they were; empty where there is none.
        files: files that were read.
        notes: what was left out.
        sets: (P) name of the set or of the fold of each protein; empty if they were not asked for.
    """

    ids: list[str]
    sequences: list[str]
    columns: dict[str, list[str]]
    files: list[Path]
    notes: list[str]
    sets: Sequence[str] = ()

    def select(self, rows: Sequence[int]) -> "Proteins":
        """Return the proteins of some rows."""
        return self._replace(
            ids=[self.ids[row] for row in rows],
            sequences=[self.sequences[row] for row in rows],
            columns={name: [cells[row] for row in rows] for name, cells in self.columns.items()},
            sets=[self.sets[row] for row in rows] if self.sets else [],
        )


def read_proteins(fasta: Path | list[Path] | None, labels: Path | None, id: str | None = None) -> Proteins:
    """Read proteins from a FASTA, from a table with a column of sequences, or from both.

    Args:
        fasta: FASTA file, several, or a folder. Fields such as TARGET= of their headers are columns.
        labels: table. Proteins of the FASTA without a value in it are left out.
        id: column of the table with the names.

    Returns:
        The proteins. Columns of sets and folds of the table are named previous_set and so on.

    Raises:
        InputError: a file, a column or a record is invalid, or nothing matches.
    """
    if fasta is None:
        assert labels is not None
        return _read_table(read_table_or_sets(expand_path(labels)), id)
    files = find_fasta_files(fasta)
    records = [record for path in files for record in read_fasta(path)]
    if labels is None:
        return _read_headers(records, files)
    columns = read_columns(labels, records, id)
    cells = {rename_column(name): [value or "" for value in values] for name, values in columns.items()}
    cells = {name: values for name, values in cells.items() if not _are_sequences(values, records)}
    proteins = Proteins([r.id for r in records], [r.sequence for r in records], cells, [*files, Path(labels)], [])
    rows = [row for row in range(len(records)) if any(values[row] for values in cells.values())]
    if len(rows) < len(records):
        left = format_count(len(records) - len(rows), "protein")
        proteins.notes.append(f"left out without a value in {Path(labels).name}: {left} of the FASTA")
    return proteins.select(rows)


def _are_sequences(cells: Sequence[str], records: Sequence[Record]) -> bool:
    return all(cell.upper() == record.sequence for cell, record in zip(cells, records, strict=True) if cell)


def rename_column(column: str) -> str:
    """Return another name for a column that readers of the new table would take for its sets, names or sequences.

    That of an earlier division, previous_set, becomes previous_previous_set, so that a table can be divided repeatedly.
    """
    reserved = SET_NAMES | VALIDATION_NAMES | FOLD_NAMES | {"id", "sequence"}
    base = column.lower()
    while base.startswith(PREVIOUS):
        base = base.removeprefix(PREVIOUS)
    return f"{PREVIOUS}{column}" if base in reserved else column


def _read_headers(records: Sequence[Record], files: list[Path]) -> Proteins:
    """Read proteins and the KEY=value fields of their headers."""
    fields = [
        parse_attributes(record.description, Source(files[0]))[1] if "=" in record.description else {}
        for record in records
    ]
    names = dict.fromkeys(name for each in fields for name in each if name not in SET_FIELDS)
    columns = {name.lower(): [each.get(name, "") for each in fields] for name in names}
    return Proteins([r.id for r in records], [r.sequence for r in records], columns, files, [])


def _read_table(table: Table, id: str | None) -> Proteins:
    """Read proteins from a table with their sequences; rows without a sequence are left out."""
    table = add_sequences(table)
    kind = find_kind(table)
    known = kind not in (None, NATIVE)
    sequence = table.find_column(kind.sequence) if known else find_sequence_column(table, [id], required=True)
    name = table.find_column(id) if id is not None else find_name_column(table, sequence)
    rows = [row for row, cells in enumerate(table.rows) if cells[sequence]]
    ids = [(table.rows[row][name] if name >= 0 else "") or f"Sequence{row}" for row in rows]
    source = Source(table.path)
    sequences = [
        check_sequence(row_id, table.rows[row][sequence], source) for row_id, row in zip(ids, rows, strict=True)
    ]
    columns = {}
    for place, column in enumerate(table.columns):
        if place in (sequence, name):
            continue
        cells = table.cells(table.find_column(column))  # refuses a name that several columns have
        cells = parse_numbers(cells, table, column)[0] if is_numeric(cells) else cells
        columns[rename_column(column)] = [cells[row] for row in rows]
    notes = [f"{table.path.name}: read as {kind.name}: sequences from {kind.sequence}"] if known else []
    if len(rows) < len(table.rows):
        notes.append(f"left out without a sequence: {format_count(len(table.rows) - len(rows), 'row')}")
    if not rows:
        raise InputError(f"{table.path} has no row with a sequence.", code="split.no-sequences", path=table.path)
    return Proteins(ids, sequences, columns, [table.path], notes)


def read_divided_proteins(
    path: Path, fasta: Path | None = None, id: str | None = None, set: str | None = None
) -> Proteins:
    """Read proteins and the sets or folds into which someone has divided them.

    Args:
        path: table with a column of sets or folds, or a FASTA with SET= in its headers, as FLIP's.
        fasta: sequences of the table. None reads them from the table.
        id: column of the table with the names.
        set: column of the sets or folds. None is one with such a name.

    Returns:
        The proteins of the sets; others are left out. Sets are named train, validation and test, and folds as they are.

    Raises:
        InputError: there are no sets, or a file, a column or a record is invalid.
    """
    path = expand_path(path)
    if is_fasta_name(path.name):
        auxiliary = [
            find_source(path.parent, names) for names in (("sequences.fasta",), ("mask.fasta", "resolved.fasta"))
        ]
        found = read_fasta_split(Source(path), *auxiliary)
        columns = {"target": [row.target or "" for row in found.rows]}
        notes = [f"left out without a set: {format_count(found.dropped, 'record')}"] if found.dropped else []
        rows = found.rows
        return Proteins([r.id for r in rows], [r.sequence for r in rows], columns, [path], notes, [r.set for r in rows])
    table = read_table_or_sets(path)
    column = table.columns[_find_sets(table, set)]
    proteins = _read_table(table, id) if fasta is None else read_proteins(fasta, path, id)
    names = proteins.columns.pop(rename_column(column))
    if column.lower() in FOLD_NAMES or all(FOLD.fullmatch(name) for name in names):
        sets: list[str | None] = [*names]
    else:
        validation = next((name for name in table.columns if name.lower() in VALIDATION_NAMES), "")
        flags = proteins.columns.pop(rename_column(validation), [""] * len(names)) if validation else [""] * len(names)
        source = Source(table.path)
        triples = zip(proteins.ids, names, flags, strict=True)
        sets = [parse_set(row_id, name, flag, source) for row_id, name, flag in triples]
    rows = [row for row, name in enumerate(sets) if name]
    if len(rows) < len(sets):
        proteins.notes.append(f"left out without a set: {format_count(len(sets) - len(rows), 'protein')}")
    return proteins._replace(sets=[name or "" for name in sets]).select(rows)


def _find_sets(table: Table, name: str | None) -> int:
    """Find the column of the sets, or of the folds."""
    if name is not None:
        return table.find_column(name)
    place = find_set_column(table, None)
    folds = (number for number, column in enumerate(table.columns) if column.lower() in FOLD_NAMES)
    place = place if place >= 0 else next(folds, -1)
    if place < 0:
        raise InputError(
            f"{table.path} has no column of sets or folds; its columns are {', '.join(map(repr, table.columns))}. Name "
            "it with --set.",
            code="split.no-sets",
            path=table.path,
            columns=tuple(table.columns),
        )
    return place


class Strata(NamedTuple):
    """The groups of proteins with similar labels.

    Args:
        numbers: (P,) number of the group.
        column: name of the column of the labels; empty without one.
        numeric: whether the labels are numbers.
        note: why there are no labels; empty if there are.
    """

    numbers: np.ndarray
    column: str = ""
    numeric: bool = False
    note: str = ""


def choose_strata(proteins: Proteins, target: str | None = None) -> Strata:
    """Choose the column of the labels, and build the groups of similar ones.

    Args:
        proteins: the proteins with the columns of their table.
        target: the column. None is the only column of numbers, or of classes, or the one with a name such as target.

    Returns:
        Classes, or quantiles of numbers; proteins without a label are a group of their own.

    Raises:
        InputError: there is no such column, or it has neither numbers nor classes.
    """
    columns = proteins.columns
    kinds = {name: _classify(cells, proteins.sequences) for name, cells in columns.items()}
    if target is not None:
        table = Table(proteins.files[-1], list(columns), [], "")
        column = table.columns[table.find_column(target)]
        if not kinds[column]:
            raise InputError(
                f"column {column!r} of {table.path} has neither numbers nor classes that occur several times. Choose "
                "another column with --target.",
                code="split.target",
                column=column,
                path=table.path,
            )
    else:
        column = ""
        for kind in ("number", "class"):
            found = [name for name in columns if kinds[name] == kind and not name.startswith(PREVIOUS)]
            named = [name for name in found if split_unit(name)[0].lower() in TARGET_NAMES]
            if len(found) == 1 or len(named) == 1:
                column = (named if len(named) == 1 else found)[0]
            if found:
                break
        if not column:
            listed = ", ".join(map(repr, found))
            note = f"each of the columns {listed} may be the labels; choose with --target" if found else "no labels"
            return Strata(np.zeros(len(proteins.ids), dtype=np.int64), note=note)
    cells = columns[column]
    missing_P = np.array([_is_missing(cell) for cell in cells])
    if kinds[column] == "number":
        value_P = np.array(
            [np.nan if no_value else float(cell) for cell, no_value in zip(cells, missing_P, strict=True)]
        )
        number_P = np.full(len(cells), -1)
        number_P[~missing_P] = build_strata(value_P[~missing_P])
    else:
        number_P = np.where(missing_P, -1, np.unique(cells, return_inverse=True)[1])
    return Strata(number_P, column, kinds[column] == "number")


def _is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


def _classify(cells: Sequence[str], sequences: Sequence[str]) -> str:
    """Return whether cells are numbers or classes; empty if they are neither, all equal, or labels of residues."""
    filled = [cell for cell in cells if not _is_missing(cell)]
    values = set(filled)
    of_residues = all(len(cell) in (0, len(sequence)) for cell, sequence in zip(cells, sequences, strict=True))
    if len(values) < 2 or of_residues:
        return ""
    if all(is_number(cell) and math.isfinite(float(cell)) for cell in filled):
        return "number" if len(values) > 2 or len(filled) < 5 else "class"
    return "class" if 2 * len(values) <= len(filled) else ""
