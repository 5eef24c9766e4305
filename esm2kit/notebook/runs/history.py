"""Runs of the notebooks for a reader: figures in words, silent cells, and two runs compared."""

import math
from typing import Any, NamedTuple

from esm2kit.notebook.runs.manifest import RunManifest

# Figures that tell how fast a machine was just then, not what came out: shown, never held against each other.
SPEEDS = ("_per_s", "_gflops", "_seconds")
# Set for kernels that nobody watches, so that widgets show their value instead.
HEADLESS = "ESM2KIT_HEADLESS"
# Names of figures as a page and a terminal say them; a name that is not here is said as it is.
METRIC_LABELS = {
    "matmul_gflops": "GFLOP/s of a matrix product",
    "validation_records": "validation records",
    "val_perplexity": "validation perplexity",
    "unigram_perplexity": "perplexity by frequency",
    "tokens_per_s": "tokens/s",
    "neighbours_share_label": "nearest neighbours with the same label",
    "layouts_apart": "relative difference of two layouts' losses",
    "mean_of_means_error": "gradient's error by mean of means",
    "loss_at_end": "loss at the end",
}
# A cell that works for longer without a line of output leaves its reader wondering.
MAX_SILENT_SECONDS = 30.0


class Difference(NamedTuple):
    """One name's two values; `beyond` the tolerance or not, None where they cannot be held against each other."""

    name: str
    before: Any
    after: Any
    beyond: bool | None


def silent_cells(manifest: RunManifest, seconds: float = MAX_SILENT_SECONDS) -> list[tuple[str, int, float]]:
    """The cells that worked for longer than so many seconds without a line of output, the longest silence first.

    Returns: notebook, code cell as counted in git, seconds of its longest silence.
    """
    found = [
        (notebook, int(cell), silent)
        for notebook, entry in manifest.notebooks.items()
        for cell, silent in entry.silent_seconds.items()
        if silent > seconds
    ]
    return sorted(found, key=lambda item: -item[2])


def describe_silent_cells(manifest: RunManifest, seconds: float = MAX_SILENT_SECONDS) -> str:
    """One line on the cells that printed nothing for too long; empty where there are none."""
    quiet = silent_cells(manifest, seconds)
    cells = ", ".join(f"{notebook} cell {cell} ({silent:.0f} s)" for notebook, cell, silent in quiet)
    return f"at work for over {seconds:g} s without a line, as on a busy machine: {cells}" if quiet else ""


def metric_label(name: str) -> str:
    """A figure's name in words, with the notebook's number before it where it had one."""
    number, _, rest = name.partition(" ")
    return f"{number} {METRIC_LABELS[rest]}" if rest in METRIC_LABELS else METRIC_LABELS.get(name, name)


def format_number(value: Any) -> str:
    """A number as a person reads it: four significant digits, whole numbers whole, thousands never as powers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def compare_runs(
    before: RunManifest, after: RunManifest, tolerance: float = 0.0
) -> tuple[list[Difference], list[Difference]]:
    """Parameters that differ, and figures that changed.

    Args:
        before: a manifest.
        after: another.
        tolerance: relative; figures that are closer are beyond=False.
    Returns: parameters, figures; both only where the two values are not equal. A name one run lacks is None there.
    """
    parameters = [
        Difference(name, one, other, True)
        for name, one, other in _paired(before.parameters, after.parameters)
        if one != other
    ]
    figures = []
    for name, one, other in _paired(before.figures, after.figures):
        if one == other:
            continue
        if name.endswith(SPEEDS):
            beyond = None
        elif one is None or other is None:
            beyond = True
        else:
            beyond = not math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0)
        figures.append(Difference(name, one, other, beyond))
    return parameters, figures


def _paired(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of text, each as wide as its widest cell."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )
