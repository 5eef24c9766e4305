"""Readable runs of the notebooks: labels of metrics, cells without output, and the comparison of two runs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from esm2kit.notebook.runs.manifest import RunManifest

# Suffixes of metrics that measure speed: shown, but never compared.
SPEEDS = ("_per_s", "_gflops", "_seconds")
# Environment variable of headless kernels: widgets then show their value.
HEADLESS = "ESM2KIT_HEADLESS"
# Name of a metric -> its label on pages and in the terminal. Default: the name itself.
METRIC_LABELS = {
    "matmul_gflops": "matrix product (GFLOP/s)",
    "validation_records": "validation records",
    "val_perplexity": "validation perplexity",
    "unigram_perplexity": "unigram perplexity",
    "tokens_per_s": "training (tokens/s)",
    "neighbours_share_label": "nearest neighbours with the same label",
    "layouts_apart": "relative loss difference of two layouts",
    "mean_of_means_error": "gradient error, mean of means",
    "loss_at_end": "final loss",
    "structured_tolerates_less": "pairs in which the residue of a helix or strand tolerates less (chance 0.5)",
    "context_adds": "difference from scores by letter alone",
}
# Longest time without output that is not reported, in seconds.
MAX_SILENT_SECONDS = 30.0


class Difference(NamedTuple):
    """Two values of one name. `beyond`: they differ by more than the tolerance; None if they are not compared."""

    name: str
    before: Any
    after: Any
    beyond: bool | None


def find_silent_cells(manifest: RunManifest, seconds: float = MAX_SILENT_SECONDS) -> list[tuple[str, int, float]]:
    """Find the cells that printed nothing for a long time, longest first.

    Args:
        manifest: a run.
        seconds: longest time without output that is accepted.

    Returns:
        (notebook, number of the code cell as in git, longest time without output in seconds).
    """
    found = [
        (notebook, int(cell), silent)
        for notebook, entry in manifest.notebooks.items()
        for cell, silent in entry.silent_seconds.items()
        if silent > seconds
    ]
    return sorted(found, key=lambda item: -item[2])


def describe_silent_cells(manifest: RunManifest, seconds: float = MAX_SILENT_SECONDS) -> str:
    """Format the cells that printed nothing for a long time as one line.

    Args:
        manifest: a run.
        seconds: longest time without output that is accepted.

    Returns:
        The line; empty if there are no such cells.
    """
    found = find_silent_cells(manifest, seconds)
    cells = ", ".join(f"{notebook} cell {cell} ({silent:.0f} s)" for notebook, cell, silent in found)
    return f"no output for over {seconds:g} s, as on a busy machine: {cells}" if found else ""


def metric_label(name: str) -> str:
    """Convert the name of a metric into its label.

    Args:
        name: name, optionally preceded by the number of the notebook, such as "02 val_perplexity".

    Returns:
        The label, preceded by the same number.
    """
    number, _, rest = name.partition(" ")
    return f"{number} {METRIC_LABELS[rest]}" if rest in METRIC_LABELS else METRIC_LABELS.get(name, name)


def format_number(value: Any) -> str:
    """Format a number with four significant digits; integers and thousands in full.

    Args:
        value: a number; anything else is converted to text.

    Returns:
        Text such as "14.37", "21,414" or "4.7e-08".
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def split_speeds(figures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the results of a run from the speed of its machine.

    Args:
        figures: name -> metric, or the metrics of several runs.

    Returns:
        The results and the speeds, in their order.
    """
    speeds = {name: value for name, value in figures.items() if name.endswith(SPEEDS)}
    return {name: value for name, value in figures.items() if name not in speeds}, speeds


def compare_runs(
    before: RunManifest, after: RunManifest, tolerance: float = 0.0
) -> tuple[list[Difference], list[Difference]]:
    """Compare the parameters and metrics of two runs.

    Args:
        before: the first run.
        after: the second run.
        tolerance: relative difference up to which two metrics have beyond=False.

    Returns:
        Parameters that differ, metrics that changed. A value that one run lacks is None.
    """
    parameters = [
        Difference(name, one, other, True)
        for name, one, other in _pair_values(before.parameters, after.parameters)
        if one != other
    ]
    figures = []
    for name, one, other in _pair_values(before.figures, after.figures):
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


def _pair_values(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]


def format_table(heads: list[str], rows: list[list[str]]) -> str:
    """Format rows as columns of text, each as wide as its widest cell.

    Args:
        heads: column headings.
        rows: rows of cells.

    Returns:
        One line per row, headings first.
    """
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )
