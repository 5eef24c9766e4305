"""Read a table of measurements or classes, to colour a map: CSV, TSV or Excel, joined with the proteins by id."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.sequences.fasta import Record


def read_columns(path: str | Path, records: Sequence[Record]) -> dict[str, list[str | None]]:
    """Read the columns of a table, in the order of the proteins.

    The column of ids is the one that names most of the proteins. Decimal commas are read as points in columns of
    numbers.

    Args:
        path: a .csv, .tsv or .txt file with any usual separator, or an Excel workbook; empty for no table.
        records: the proteins.

    Returns:
        Column -> a text per protein; None where the table has no value.

    Raises:
        InputError: the file cannot be read, or none of its columns has an id of the proteins.
    """
    if not str(path):
        return {}
    path = expand_path(path)
    if not path.is_file():
        raise InputError(
            f"labels {str(path)!r} is not a file: set labels to a table, or to an empty text for none",
            code="labels.absent",
            path=str(path),
        )
    try:
        if path.suffix.lower() in (".xlsx", ".xlsm"):
            table = pd.read_excel(path, dtype=str)
        else:
            table = pd.read_csv(path, sep=None, engine="python", dtype=str, encoding="utf-8-sig", keep_default_na=False)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a table ({' '.join(str(error).split())}): save it as CSV or Excel workbook",
            code="labels.unreadable",
            path=str(path),
        ) from None
    table = table.fillna("").map(str.strip)
    ids = [record.id for record in records]
    found = {name: len(set(table[name]) & set(ids)) for name in table.columns}
    best = max(found, key=found.get, default=None)
    if best is None or not found[best]:
        raise InputError(
            f"no column of {path.name} ({', '.join(map(str, table.columns))}) has an id of the FASTA file, such as "
            f"{ids[0]}",
            code="labels.no-id",
            path=str(path),
        )
    rows = table.drop_duplicates(best).set_index(best).reindex(ids)
    return {str(name): [_clean(value) for value in rows[name]] for name in rows.columns if _has_values(rows[name])}


def _has_values(column: pd.Series) -> bool:
    return any(_clean(value) is not None for value in column)


def _clean(value: object) -> str | None:
    """A text without a decimal comma; None for a missing value."""
    if not isinstance(value, str) or value.lower() in ("", "na", "nan", "n/a", "none"):
        return None
    head, comma, tail = value.partition(",")
    return f"{head}.{tail}" if comma and head.lstrip("+-−").isdigit() and tail.isdigit() else value
