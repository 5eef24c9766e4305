"""What a notebook shows: figures with captions, a stage's progress, a benchmark report as a chart and a sentence."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from matplotlib.axes import Axes

from esm2kit import plots

SECONDS_BETWEEN_LINES = 5.0
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


class _Printed(logging.Handler):
    """Progress lines as ordinary output: one every few seconds, and every warning."""

    shown = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno >= logging.WARNING or now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            print(record.getMessage(), flush=True)


def follow_progress() -> None:
    """Show how the stages come along in the cell that runs them."""
    source = logging.getLogger("esm2kit")
    source.setLevel(logging.INFO)
    source.handlers, source.propagate = [_Printed()], False


def score_chart(report: Mapping[str, Any]) -> Axes:
    """A report's rows as points with their intervals, in the headline metric; the first row stands out.

    Args:
        report: as `esm2kit.report` describes it.
    """
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["metrics"][metric]["value"] is not None]
    names = [_plain(row["name"], report) for row in rows]
    values, lows, highs = ([row["metrics"][metric][key] for row in rows] for key in ("value", "low", "high"))
    return plots.scores_beside_baselines(names, values, lows, highs, metric, names[:1])


def verdict(report: Mapping[str, Any]) -> str:
    """How the first row compares with untrained model, probe and constant guess, pair by pair of test proteins."""
    wanted = [
        row["name"] for row in report["rows"] if row["kind"] in ("untrained", "probe") or row["name"] in CONSTANTS
    ]
    told = [_plain(pair["sentence"], report) for pair in report["comparisons"] if pair["theirs"] in wanted]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in told)


def _plain(text: str, report: Mapping[str, Any]) -> str:
    """The model's own name is its checkpoint's; here it is simply this model, its probe in brackets."""
    name = report["model"]["name"]
    text = text.replace(f"untrained {name}", "the untrained model").replace(name, "this model")
    probes = {row["name"].rpartition(", ")[2] for row in report["rows"] if row["kind"] in ("probe", "untrained")}
    for probe in probes:
        for model in ("this model", "the untrained model"):
            text = text.replace(f"{model}, {probe}", f"{model} ({probe})")
    return text


def best_baseline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline row of highest headline score; None where no baseline has one."""
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["kind"] == "baseline" and row["metrics"][metric]["value"] is not None]
    return max(rows, key=lambda row: row["metrics"][metric]["value"], default=None)
