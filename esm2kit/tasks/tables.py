"""Tables of measurements as people have them: CSV, TSV and Excel, in several encodings and notations of numbers."""

import re

# A unit at the end of a column's name: `Tm (C)`, `activity [U/mg]`. Notes such as (n=3) are not units.
UNIT = re.compile(r"(.*\S)\s*[(\[]([^()\[\]=]{1,20})[)\]]")


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
