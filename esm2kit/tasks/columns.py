"""Columns of a table of measurements or classes, joined with the proteins by id, to colour a map."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.files import check_sequence
from esm2kit.tasks.kinds import describe_kind, peek_kind, read_table_or_sets
from esm2kit.tasks.matching import Matches, RecordMatcher
from esm2kit.tasks.sources import Source
from esm2kit.tasks.tables import Table, is_numeric, list_missing, parse_numbers, read_table
from esm2kit.tasks.wild_types import add_sequences

logger = logging.getLogger(__name__)


def read_columns(path: str | Path, records: Sequence[Record], id: str | None = None) -> dict[str, list[str | None]]:
    """Read the columns of a table, in the order of the proteins.

    Args:
        path: CSV, TSV or Excel, see `read_table`, or a folder with a table per set; empty for no table.
        records: the proteins.
        id: column of the ids. None is the one that names most of the proteins, as for `--labels` of the stages.

    Returns:
        Column -> a text per protein, numbers with decimal points; None where the table has no value.

    Raises:
        InputError: the file cannot be read, none of its columns names a protein, or two with values have one name.
    """
    if not str(path):
        return {}
    table, matcher = read_table_or_sets(Path(expand_path(path))), RecordMatcher(list(records))
    matches = [matcher.match(table.cells(place)) for place in range(len(table.columns))]
    ids = max(range(len(matches)), key=lambda place: _count(matches[place])) if id is None else table.find_column(id)
    if not _count(matches[ids]):
        where = "no column" if id is None else f"no cell of column {id!r}"
        raise InputError(
            f"{where} of {table.path.name} ({', '.join(table.columns)}) has an id of the FASTA file, such as "
            f"{records[0].id}. Choose another table, or omit labels.",
            code="labels.no-id",
            path=table.path,
        )
    ids_T, rows_T = table.cells(ids), matches[ids].records
    unknown = [name for name, row in zip(ids_T, rows_T, strict=True) if row < 0]
    matched = len({row for row in rows_T if row >= 0})
    rest = f"; not found: {format_count(len(unknown), 'other row')}, such as {unknown[0]!r}" if unknown else ""
    if repeated := len(rows_T) - len(unknown) - matched:
        rest += f"; repeated proteins: {format_count(repeated, 'row')}, the first value counts"
    logger.info(
        "%s: column %r names %d of %d proteins%s", table.path.name, table.columns[ids], matched, len(records), rest
    )
    found: dict[str, list[str | None]] = {}
    for place, name in enumerate(table.columns):
        values = _place(table, place, matches[ids].records, len(records))
        if place == ids or all(value is None for value in values):
            continue
        if name in found:
            raise InputError(
                f"{table.path}: two columns are named {name!r}. Rename one of them.",
                code="table.repeated-column",
                column=name,
                path=table.path,
            )
        found[name] = values
    return found


class TableProteins(NamedTuple):
    """The proteins of a table of one of `kinds.KINDS`.

    Args:
        records: the proteins, in the order of the rows.
        columns: its other columns -> a text per protein, as `read_columns` returns them.
        target: column of the targets.
    """

    records: list[Record]
    columns: dict[str, list[str | None]]
    target: str


def read_table_proteins(path: Path) -> TableProteins | None:
    """Read the proteins of a table that another project published, and log how it is read.

    Args:
        path: of a file.

    Returns:
        The proteins; None for a file that is not a table of one of KINDS.

    Raises:
        InputError: the kind is not read, or a sequence is invalid.
    """
    source = Source(path)
    if not (path.is_file() and source.is_table) or (kind := peek_kind(path)) is None:
        return None
    table = add_sequences(read_table(path))
    sequence = table.find_column(kind.sequence)
    names = table.cells(table.find_column(kind.id)) if kind.id in table.columns else [""] * len(table.rows)
    names = [name.replace(" ", "_") or f"Sequence{row}" for row, name in enumerate(names)]
    sequences = [check_sequence(name, cell, source) for name, cell in zip(names, table.cells(sequence), strict=True)]
    records = [Record(name, name, residues) for name, residues in zip(names, sequences, strict=True)]
    rows = range(len(records))
    columns = {
        name: _place(table, place, rows, len(records))
        for place, name in enumerate(table.columns)
        if name not in (kind.sequence, kind.id)
    }
    logger.info("%s", describe_kind(kind, table, kind.target, kind.set))
    known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return TableProteins(records, known, kind.target)


def _count(matches: Matches) -> int:
    return len({row for row in matches.records if row >= 0})


def _place(table: Table, place: int, rows: Sequence[int], num_proteins: int) -> list[str | None]:
    """Order the cells of a column by protein; of several rows of one protein the first counts."""
    cells = table.cells(place)
    numeric = is_numeric(cells)
    if numeric:
        cells = parse_numbers(cells, table, table.columns[place])[0]
    missing = list_missing(cells, numeric)
    values: list[str | None] = [None] * num_proteins
    for row, cell in zip(rows, cells, strict=True):
        if row >= 0 and values[row] is None and cell.lower() not in missing:
            values[row] = cell
    return values
