"""Tables of measurements as people have them: CSV, TSV and Excel, in several encodings and notations of numbers."""

import csv
import gzip
import io
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import openpyxl
import pyarrow as pa
from pyarrow import parquet

from esm2kit.core.errors import InputError
from esm2kit.core.files import UNREADABLE_ZIP, check_git_lfs
from esm2kit.tasks.labels import DECIMAL_COMMA, THOUSANDS, is_number
from esm2kit.tasks.sources import check_zip

# A unit at the end of a column's name: `Tm (C)`, `activity [U/mg]`. Notes such as (n=3) are not units.
UNIT = re.compile(r"(.*\S)\s*[(\[]([^()\[\]=]{1,20})[)\]]")
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "bars"}
# The line by which Excel names the separator.
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
# How spreadsheets keep text that looks like a number: ="007".
TEXT_FORMULA = re.compile(r'="(.*)"')
# `measurements.xlsx:Sheet 2`
SHEET = re.compile(r"(.+\.xls[xm]):(.+)", re.IGNORECASE)
# Digits in groups of three, separated by blanks or apostrophes.
GROUPS = re.compile(r"([+-]?\d{1,3})((?:[ ’']\d{3})+)([.,]\d+)?")
# A text that is a unit, alone or in a product: °C, mg/ml, kcal mol-1, (%), a.u.
_ATOM = r"(?:[pnuµμmckMG]?(?:g|l|L|m|M|mol|s|K|J|cal|Da|U|IU|V|A|W|Hz|Pa|bar)|min|h|hrs?|hours?|days?|sec|seconds?|%|‰"
_ATOM += (
    r"|[°º] ?[CFK]|℃|deg(?:rees)?|degC|Å|ppm|ppb|a\.?u\.?|arb\. ?units?|OD\d*|RFU|RLU|cpm|cps|fold|counts?|units?|pH"
)
_ATOM += r"|log(?:2|10)?|ln|1)(?:(?:\^|\*\*)?[-−+]?\d+|[⁻⁺]?[⁰¹²³⁴-⁹]+)?"
UNIT_TEXT = re.compile(rf"[(\[]?(?:{_ATOM})(?: ?[/·⋅*×] ?(?:{_ATOM})| (?:{_ATOM}))*[)\]]?")
# What cells of names and sequences have in a row of units, in lower case.
UNIT_LABELS = {"unit", "units", "[unit]", "[units]", "(unit)", "(units)", "einheit", "unité"}
PEEKED_ROWS = 1000  # that decide which columns have numbers
LONGEST_LABEL = 20  # letters of such a cell; a protein has more
MAX_BYTES = 1 << 28
PARQUET_START = b"PAR1"
ROWS_PER_BATCH = 1 << 14
# What zipfile and openpyxl raise for damaged or encrypted workbooks; errors of XML are SyntaxErrors.
UNREADABLE = (*UNREADABLE_ZIP, KeyError, IndexError, TypeError, AttributeError, OSError, EOFError, zlib.error)
UNREADABLE += (SyntaxError,)
# Cells without a value, in lower case.
MISSING = {"", "na", "n/a", "n.a.", "nan", "#n/a", "#na", "#nv", "null", "nd", "n.d."}
MISSING |= {"#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!"}
# Texts that stand for no value in a column of numbers, and may be classes elsewhere, such as + and -.
DASHES = {"-", "--", "–", "—", "?", "."}


class Table(NamedTuple):
    """The cells of a table as text, without blanks at their ends.

    Args:
        path: of the file.
        columns: names of the columns; `column 2` for one without a name.
        rows: cells of each row that is not empty, one per column.
        separator: between the cells of a row; empty for a workbook.
        notes: how the file was read, where it is not a plain UTF-8 table.
    """

    path: Path
    columns: list[str]
    rows: list[list[str]]
    separator: str
    notes: tuple[str, ...] = ()

    def find_column(self, name: str) -> int:
        """Find a column by its name.

        Args:
            name: of the column; case and blanks do not matter if the column is then unique, and a unit in brackets may
                be omitted. Another unit than the column's is another column.

        Returns:
            Its place.

        Raises:
            InputError: there is no such column, or it occurs twice.
        """
        found = find_same_columns(self.columns, name)
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{self.path}: {len(found)} columns are named {name!r}. Rename one of them.",
                code="table.repeated-column",
                column=name,
                path=self.path,
            )
        raise InputError(
            f"{self.path} has no column {name!r}; its columns are {', '.join(map(repr, self.columns))}.",
            code="table.no-column",
            column=name,
            path=self.path,
        )

    def cells(self, column: int) -> list[str]:
        """Return the cells of a column."""
        return [row[column] for row in self.rows]


def find_same_columns(columns: Sequence[str], name: str) -> list[int]:
    """Find the columns that a name means, by the first rule that finds one.

    Args:
        columns: their names.
        name: as for `Table.find_column`.

    Returns:
        Their places.
    """
    quantity, unit = split_unit(name)
    rules = (
        lambda column: column == name,
        lambda column: column.casefold().split() == name.casefold().split(),
        lambda column: split_unit(column)[0].casefold() == quantity.casefold() and unit in ("", split_unit(column)[1]),
    )
    for is_same in rules:
        if found := [place for place, column in enumerate(columns) if is_same(column)]:
            return found
    return []


def split_unit(column: str) -> tuple[str, str]:
    """Split the name of a column into the quantity and its unit.

    Args:
        column: name of a column.

    Returns:
        The quantity and the unit, which is empty if the name has none: `Tm (C)` -> `Tm`, `C`.
    """
    found = UNIT.fullmatch(column.strip())
    return (found[1], found[2].strip()) if found else (column.strip(), "")


def format_column_name(column: str) -> str:
    """Return the name of a column as a name of a task and of its folder: `Tm (C)` -> `Tm`."""
    name = re.sub(r"[^\w.-]+", "_", split_unit(column)[0]).strip("_.")
    return name or "target"


def read_table(path: Path) -> Table:
    """Read a table with a line of column names.

    The table is text, an Excel workbook or a Parquet file. Text may be separated by commas, semicolons, tabs or bars,
    compressed by gzip, and encoded as UTF-8, UTF-16 or Windows-1252. A line `sep=;`, comments and titles before the
    column names are passed over.

    Args:
        path: of a text table or an Excel workbook; `file.xlsx:Sheet` chooses a sheet.

    Returns:
        The table.

    Raises:
        InputError: there is no such file, or it is not a table.
    """
    sheet = SHEET.fullmatch(str(path))
    path, name = (Path(sheet[1]), sheet[2]) if sheet and not path.exists() else (path, "")
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {found}. Pass the table of labels.", code="table.absent", path=path)
    check_git_lfs(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        lines, notes = _read_workbook(path, name)
        separator = ""
    elif start == PARQUET_START:
        lines, notes, separator = _read_parquet(path), (), ""
    elif start == b"\xd0\xcf\x11\xe0":
        raise InputError(
            f"{path} is an Excel file of before 2007 (.xls), or has a password. Save it as .xlsx or CSV.",
            code="table.xls",
            path=path,
        )
    else:
        text, notes = decode_text(path)
        lines, separator = _split_text(text, path)
    columns, rows = _find_header(lines, path)
    return Table(path, columns, rows, separator, notes)


def read_first_rows(path: Path, num_rows: int) -> Table:
    """Read the first rows of a Parquet table.

    Args:
        path: of the table.
        num_rows: number of rows.

    Returns:
        The table.

    Raises:
        InputError: it is damaged, or has no rows.
    """
    columns, rows = _find_header(_read_parquet(path, num_rows), path)
    return Table(path, columns, rows, "")


def _read_parquet(path: Path, most: int | None = None) -> list[list[str]]:
    """Read the names of the columns and the rows of a Parquet table as text; lists as in `[1, 0, 1]`."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES >> 20} MiB. Split it.", code="table.size", path=path)
    try:
        with parquet.ParquetFile(path) as file:
            lines = [list(file.schema_arrow.names)]
            for batch in file.iter_batches(most or ROWS_PER_BATCH):
                columns = [map(_format_cell, column.to_pylist()) for column in batch.columns]
                lines += map(list, zip(*columns, strict=True))
                if most is not None:
                    break
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a Parquet table ({' '.join(str(error).split())}). Download it again.",
            code="table.damaged",
            path=path,
        ) from None
    return lines


def parse_table(text: str, path: Path) -> Table:
    """Parse the text of a table, or its first lines.

    Args:
        text: the text.
        path: of its file, for messages.

    Returns:
        The table.

    Raises:
        InputError: it is not a table.
    """
    lines, separator = _split_text(text, path)
    columns, rows = _find_header(lines, path)
    return Table(path, columns, rows, separator)


def decode_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Decode a text file, which may be compressed by gzip.

    Args:
        path: of the file, in UTF-8, UTF-16 or Windows-1252.

    Returns:
        Its text, and a note on an encoding other than UTF-8.

    Raises:
        InputError: it is damaged, too large or no text.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}).", code="table.damaged", path=path) from None
    if len(content) > MAX_BYTES:
        raise InputError(
            f"{path} has more than {MAX_BYTES >> 20} MiB. Split it, or write a task as FASTA.",
            code="table.size",
            path=path,
        )
    wide = next((name for mark, name in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")) if content[:2] == mark), "")
    if not wide and content[1:200:2].count(0) > content[:200:2].count(0) + 4:
        wide = "utf-16-le"
    for encoding in [wide] if wide else ["utf-8-sig", "cp1252"]:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            notes = {"utf-8-sig": (), "cp1252": ("read as Windows-1252, not UTF-8",)}.get(encoding, ("read as UTF-16",))
            return text, notes
    raise InputError(
        f"{path} is not a text table. Pass a CSV, a TSV or an Excel workbook (.xlsx).", code="table.encoding", path=path
    )


def _split_text(text: str, path: Path) -> tuple[list[list[str]], str]:
    """Split text into cells; also return the separator, by which most lines have as many cells as the first one."""
    first = next(iter(text.splitlines()), "")
    if named := SEPARATOR_LINE.fullmatch(first.strip()):
        return _parse_cells(text[len(first) :].lstrip("\r\n"), named[1], path), named[1]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")][:100]
    best, chosen = (0.0, 0), ""
    for separator in SEPARATORS:
        try:
            counts = [len(row) for row in csv.reader(lines, delimiter=separator, strict=True)]
        except csv.Error:  # a cell with line breaks, cut after 100 lines, or a text with a quotation mark
            counts = [line.count(separator) + 1 for line in lines]
        width = max(set(counts), key=counts.count, default=1)
        score = (counts.count(width) / len(counts), width) if width > 1 else (0.0, 0)
        if score > best:
            best, chosen = score, separator
    words = {len(line.split()) for line in lines}
    if not chosen and len(words) == 1 and min(words) > 1 and text[:1] not in "><{[":
        return [line.split() for line in text.splitlines()], " "
    if not chosen:
        found = lines[0][:60] if lines else ""
        remedy = "A table has a line of column names, and cells separated by commas, semicolons or tabs."
        raise InputError(
            f"{path}: the first line {found!r} has a single column. "
            + ("Pass a FASTA as fasta, and the table of measurements as labels." if found[:1] == ">" else remedy),
            code="table.single-column",
            path=path,
        )
    return _parse_cells(text, chosen, path), chosen


def _parse_cells(text: str, separator: str, path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as a table ({error}). Check it for an unmatched quotation mark.",
            code="table.quotes",
            path=path,
        ) from None


def _read_workbook(path: Path, sheet: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """Read a sheet of a workbook: its cells, and a note if there are other sheets."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
            if "xl/workbook.xml" not in archive.namelist():
                raise InputError(
                    f"{path} is an archive, but not an Excel workbook. Save the table as .xlsx or CSV.",
                    code="table.not-workbook",
                    path=path,
                )
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        filled = {page.title: lines for page in book.worksheets if (lines := list(_read_sheet(page)))}
        book.close()
    except (ValueError, *UNREADABLE) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read as a workbook ({error}). Save it again as .xlsx or CSV.",
            code="table.damaged",
            path=path,
        ) from None
    if sheet and sheet not in filled:
        raise InputError(
            f"{path} has no sheet {sheet!r} with cells; it has {', '.join(map(repr, filled)) or 'none'}.",
            code="table.sheet",
            found=sheet,
            allowed=tuple(filled),
            path=path,
        )
    if not sheet and len(filled) > 1:
        raise InputError(
            f"{path} has {len(filled)} sheets with cells ({', '.join(filled)}). Name one, such as "
            f"'{path}:{next(iter(filled))}'.",
            code="table.which-sheet",
            allowed=tuple(filled),
            path=path,
        )
    return filled.get(sheet or next(iter(filled), ""), []), (f"sheet {sheet!r}",) if sheet else ()


def _read_sheet(page: Any) -> Iterator[list[str]]:
    """Yield the rows of a sheet as text, without rows of empty cells."""
    page.reset_dimensions()  # some programs write wrong ones
    for row in page.iter_rows(values_only=True):
        cells = [_format_cell(value) for value in row]
        if any(cells):
            yield cells


def _format_cell(value: Any) -> str:
    """Format the value of a cell of a workbook; 52.0 is 52, as Excel shows it."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == datetime.min.time() else value.isoformat(" ")
    return repr(value) if isinstance(value, float) else str(value).strip()


def _find_header(lines: list[list[str]], path: Path) -> tuple[list[str], list[list[str]]]:
    """Find the column names after comments and titles, in the first row with two cells or more, and the rows below."""
    cells = [[_clean_cell(cell) for cell in line] for line in lines]
    cells = [line for line in cells if any(line)]
    starts = [number for number, line in enumerate(cells) if sum(map(bool, line)) > 1 and line[0][:1] != "#"]
    before = starts[0] - 1 if starts else -1
    # `#id <TAB> value` is a line of column names
    if starts and before >= 0 and cells[before][0][:1] == "#" and len(cells[before]) == len(cells[starts[0]]) > 1:
        starts[0] = before
        cells[before][0] = cells[before][0].lstrip("# ")
    if not starts or len(cells) == starts[0] + 1:
        raise InputError(
            f"{path} has no rows below its column names." if starts else f"{path} has no row with two or more cells.",
            code="table.no-rows",
            path=path,
        )
    header, rows = cells[starts[0]], cells[starts[0] + 1 :]
    while header and not header[-1] and all(not any(row[len(header) - 1 :]) for row in rows):
        header = header[:-1]
    width = len(header)
    for number, row in enumerate(rows, starts[0] + 2):
        if any(row[width:]):
            raise InputError(
                f"{path}: row {number} ({row[0][:30]!r}) has {len(row)} cells, the column names are {width}. Put "
                "quotation marks around cells that contain the separator, or name the column.",
                code="table.cells",
                row=number,
                found=len(row),
                expected=width,
                path=path,
            )
    rows = [[*row[:width], *[""] * (width - len(row))] for row in rows]
    _check_units_row(rows, path, starts[0] + 2)
    columns = [name or f"column {number}" for number, name in enumerate(header, 1)]
    return columns, rows


def _check_units_row(rows: list[list[str]], path: Path, number: int) -> None:
    """Raise InputError if the first row below the column names has the units of the columns.

    None of its cells is a number, although others in their columns are. Its other cells are empty, or all texts in the
    columns of numbers are units and no other cell may be a protein.

    Args:
        rows: cells of the rows.
        path: of the file, for the message.
        number: of the first row in the file.

    Raises:
        InputError: the first row is one of units.
    """
    first, others = rows[0], rows[1:PEEKED_ROWS]
    if any(is_numeric([cell]) for cell in first):
        return
    numeric = [is_numeric([row[place] for row in others]) for place in range(len(first))]
    empty = list_missing(first, True)
    values = [cell for cell, is_value in zip(first, numeric, strict=True) if is_value and cell.lower() not in empty]
    texts = [cell for cell, is_value in zip(first, numeric, strict=True) if not is_value and cell.lower() not in empty]
    if not values:
        return
    is_named = any(cell.lower() not in UNIT_LABELS for cell in texts)
    are_units = all(UNIT_TEXT.fullmatch(cell) for cell in values)
    if is_named and not (are_units and all(len(cell) < LONGEST_LABEL for cell in texts)):
        return
    shown = ", ".join(map(repr, dict.fromkeys(values[:3])))
    raise InputError(
        f"{path}: row {number} has units or comments ({shown}) instead of values. Write the units into the names of "
        "the columns, such as 'Tm (°C)', and remove the row.",
        code="table.units-row",
        row=number,
        found=tuple(values),
        path=path,
    )


def _clean_cell(cell: str) -> str:
    formula = TEXT_FORMULA.fullmatch(cell.strip())
    return " ".join((formula[1] if formula else cell).split())


def list_missing(cells: Sequence[str], numeric: bool) -> set[str]:
    """List the texts, in lower case, that stand for no value in a column of numbers or of texts."""
    if numeric:
        return MISSING | DASHES | {"none"}
    return MISSING if "+" in cells else MISSING | DASHES


def clean_number(text: str) -> str:
    """Write a number without blanks between its digits and with an ASCII sign; other texts are not changed."""
    plain = unicodedata.normalize("NFKC", text).strip()
    if plain[:1] in "−–‐" and plain[1:2].isdigit():
        plain = f"-{plain[1:]}"
    if found := GROUPS.fullmatch(plain):
        plain = found[1] + re.sub(r"\D", "", found[2]) + (found[3] or "")
    return plain if is_number(plain) or DECIMAL_COMMA.fullmatch(plain) or THOUSANDS.fullmatch(plain) else text


def parse_numbers(cells: Sequence[str], table: Table, column: str) -> tuple[list[str], str]:
    """Write the numbers of a column with decimal points; other cells are not changed.

    Commas are decimal commas or separators of thousands for the whole column. Where its numbers allow both, such as
    42,062, commas are decimal in a table separated by semicolons, as programs write where the comma is decimal, and
    separate thousands in one separated by commas.

    Args:
        cells: of the column.
        table: for its separator, and for the message.
        column: its name, for the message.

    Returns:
        The cells, and a note on the meaning of commas, empty without commas.

    Raises:
        InputError: commas have both meanings, or either.
    """
    plain = [clean_number(cell) for cell in cells]
    commas = [text for text in plain if "," in text and (DECIMAL_COMMA.fullmatch(text) or THOUSANDS.fullmatch(text))]
    if not commas:
        return plain, ""
    decimal = [text for text in commas if not THOUSANDS.fullmatch(text)]
    thousands = [text for text in commas if not DECIMAL_COMMA.fullmatch(text)]
    points = [text for text in plain if "." in text and "," not in text and is_number(text)]
    if not decimal and not thousands and not points and table.separator in (";", ","):
        (decimal if table.separator == ";" else thousands).extend(commas[:1])
    if (decimal and (thousands or points)) or not (decimal or thousands or points):
        other = (thousands or points or commas)[0]
        found = f"{decimal[0]!r} and {other!r}" if decimal else f"{other!r}"
        raise InputError(
            f"{table.path}: column {column!r} has {found}, where a comma may be a decimal comma or separate thousands. "
            "Write all numbers with a decimal point and without separators of thousands.",
            code="table.commas",
            column=column,
            found=other,
            path=table.path,
        )
    if decimal:
        parsed = [text.replace(".", "").replace(",", ".") if text in set(commas) else text for text in plain]
        return parsed, "decimal commas"
    return [text.replace(",", "") if text in set(commas) else text for text in plain], "commas between thousands"


def is_numeric(cells: Sequence[str]) -> bool:
    """Return whether most cells with a value are numbers, in any notation."""
    missing = list_missing(cells, True)
    plain = [clean_number(cell) for cell in cells if cell.lower() not in missing]
    numbers = sum(
        is_number(text) or (DECIMAL_COMMA.fullmatch(text) or THOUSANDS.fullmatch(text)) is not None for text in plain
    )
    return 2 * numbers > len(plain)
