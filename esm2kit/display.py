"""What a notebook shows: a figure with its caption, and a benchmark report as a chart and a sentence."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from matplotlib.axes import Axes

from esm2kit import plots

CONSTANTS = ("majority", "mean")


def captioned(ax: Axes, caption: str) -> None:
    """Show a figure with a caption below it; the same words become the image's alternative text.

    Args:
        ax: any axes of the figure.
        caption: what the figure shows and what to see in it; Markdown, broken into lines as it likes.
    """
    figure, caption = ax.figure, " ".join(caption.split())
    display(figure, metadata={"image/png": {"alt": caption.replace("*", "").replace("`", "")}})
    display(Markdown(caption))
    plt.close(figure)


def score_chart(report: Mapping[str, Any], model: str = "this model") -> Axes:
    """A report's rows as points with their intervals, in the headline metric; the first row stands out.

    Args:
        report: as `esm2kit.report` describes it.
        model: what to call the model, whose own name is its checkpoint's.
    """
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["metrics"][metric]["value"] is not None]
    names = [row["name"].replace(report["model"]["name"], model) for row in rows]
    values, lows, highs = ([row["metrics"][metric][key] for row in rows] for key in ("value", "low", "high"))
    return plots.scores_beside_baselines(names, values, lows, highs, metric, names[:1])


def verdict(report: Mapping[str, Any], model: str = "this model") -> str:
    """How the first row compares with untrained model, probe and constant guess, pair by pair of test proteins."""
    wanted = [
        row["name"] for row in report["rows"] if row["kind"] in ("untrained", "probe") or row["name"] in CONSTANTS
    ]
    told = [comparison["sentence"] for comparison in report["comparisons"] if comparison["theirs"] in wanted]
    return "; ".join(told).replace(report["model"]["name"], model)


def best_baseline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline row of highest headline score; None where no baseline has one."""
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["kind"] == "baseline" and row["metrics"][metric]["value"] is not None]
    return max(rows, key=lambda row: row["metrics"][metric]["value"], default=None)
