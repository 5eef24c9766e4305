"""Format numbers of any size: fixed decimals where these show the number, otherwise an exponent."""

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
