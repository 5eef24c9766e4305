"""What a check of `esm2kit verify` found, its verdict, and the verdict of all checks together."""

import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from esm2kit.core.numbers import format_count

Verdict = Literal["passed", "failed", "reported", "not checked", "could not check"]
# exit codes of the command; 0, 1, 2 and 130 have their usual meaning
EXIT_CODES = {"passed": 0, "failed": 3, "could not check": 4}
SHOWN_DIGITS = 12  # of a digest, in the table
COLUMNS = ("check", "expected", "found", "tolerance", "verdict")


class Check(NamedTuple):
    """One line of the table.

    Args:
        name: what is checked.
        verdict: "passed", "failed", "reported" (without a published value), "not checked" (not asked for, or nothing to
            compare with), or "could not check" (asked for, but not possible here).
        expected: the expected value.
        found: the value found.
        tolerance: allowed difference.
        note: the source of the expected value, or the reason why nothing was compared.
        is_independent: whether the expected value comes from another program than esm2kit, and is an output of the
            model.
    """

    name: str
    verdict: Verdict
    expected: str = ""
    found: str = ""
    tolerance: str = ""
    note: str = ""
    is_independent: bool = False

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of the line, with digests cut short."""
        shown = [value[:SHOWN_DIGITS] if _is_digest(value) else value for value in (self.expected, self.found)]
        return self.name, *shown, self.tolerance, self.verdict


class Comparison(NamedTuple):
    """Two arrays of equal shape.

    Args:
        matches: whether all values agree within the tolerance.
        expected: the expected value where the difference exceeds its tolerance most, or is nearest to it.
        found: the value there.
    """

    matches: bool
    expected: float
    found: float


def compare_arrays(found: np.ndarray, expected: np.ndarray, atol: float, rtol: float) -> Comparison:
    """Compare two arrays of equal shape: |found - expected| <= atol + rtol x |expected| for every value."""
    excess = np.abs(found.astype(np.float64) - expected) - (atol + rtol * np.abs(expected))
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    return Comparison(bool(excess[worst] <= 0), float(expected[worst]), float(found[worst]))


def check_arrays(name: str, found: np.ndarray, expected: np.ndarray, atol: float, rtol: float, note: str) -> Check:
    """Compare an output of the model with that of another program; the line shows the values that differ most."""
    tolerance = f"{atol:g}" if not rtol else f"{atol:g} + {rtol:g} |x|"
    if found.shape != expected.shape:
        return Check(name, "failed", f"shape {expected.shape}", f"shape {found.shape}", tolerance, note, True)
    result = compare_arrays(found, expected, atol, rtol)
    verdict: Verdict = "passed" if result.matches else "failed"
    return Check(name, verdict, f"{result.expected:.7g}", f"{result.found:.7g}", tolerance, note, True)


def check_number(name: str, found: float, expected: float, tolerance: float, note: str, shown: str = "") -> Check:
    """Compare one number; `shown` is the text for the number found, such as one with an interval."""
    verdict: Verdict = "passed" if abs(found - expected) <= tolerance else "failed"
    return Check(name, verdict, f"{expected:.4g}", shown or f"{found:.4g}", f"{tolerance:.2g}", note, True)


def conclude(checks: Sequence[Check]) -> tuple[str, str]:
    """Combine the verdicts of all checks.

    Args:
        checks: the lines of the table.

    Returns:
        A key of EXIT_CODES, and a sentence.
    """
    names = {
        verdict: [check.name for check in checks if check.verdict == verdict]
        for verdict in ("passed", "failed", "reported", "not checked", "could not check")
    }
    others = [f"{len(found)} {verdict}" for verdict, found in list(names.items())[2:] if found]
    rest = f" ({', '.join(others)})" if others else ""
    if names["failed"]:
        counted = format_count(len(names["failed"]), "check")
        return "failed", f"failed: {counted} of {len(checks)}{rest}: {', '.join(names['failed'])}"
    if names["could not check"]:
        return "could not check", f"could not check: {', '.join(names['could not check'])}"
    if not any(check.is_independent and check.verdict == "passed" for check in checks):
        return "could not check", (
            "could not check: there is no output of another program to compare this model with. Install transformers "
            "or fair-esm, or pass reference outputs as --golden."
        )
    return "passed", f"passed: {format_count(len(names['passed']), 'check')}{rest}"


def format_table(checks: Sequence[Check]) -> str:
    """Format the checks as a table, each followed by its note."""
    rows = [COLUMNS, *(check.row for check in checks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, check in zip(rows, [None, *checks], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if check and check.note:
            lines += textwrap.wrap(check.note, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
