"""Format numbers of any size, with fixed decimals where these show the number, and numbers of things."""

import math


def format_decimals(value: float, decimals: int = 4) -> str:
    """Format a number with fixed decimals, or with an exponent if that shows too few digits or too many.

    Args:
        value: the number, of which 0, nan and inf have their usual text.
        decimals: digits after the point.

    Returns:
        Such as 2.8757 or 1.2346e-09, with 4 decimals.
    """
    size = abs(value)
    fixed = not math.isfinite(size) or size == 0 or 10.0 ** (1 - decimals) <= size < 1e6
    return f"{value:.{decimals}{'f' if fixed else 'e'}}"


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things, with the noun in the singular for one.

    Args:
        count: the number.
        noun: in the singular.
        plural: the plural, if it is not the noun with an s.

    Returns:
        Such as "1 run" or "2,384 runs".
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
