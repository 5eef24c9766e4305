"""What a notebook shows: figures with captions, a stage's progress, a benchmark report as a chart and a sentence."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.report import METRIC_NAMES, best_baseline, told_name
from esm2kit.tasks.metrics import LOWER_IS_BETTER

SECONDS_BETWEEN_LINES = 5.0
TWIN = "same probe on an untrained encoder"
PROBES = {"cnn": "CNN", "fnn": "FNN", "light_attention": "light attention"}


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


def label(row: Mapping[str, Any]) -> str:
    """A report's row as a person would name it: what was trained, and on what."""
    if row["kind"] == "finetuned":
        return f"fine-tuned encoder {row['name'][row['name'].rfind('(') :]}"
    probe = row["name"].rpartition(", ")[2]
    probe = f"{PROBES.get(probe, probe)} probe"
    on = {"probe": f"{probe} on the frozen encoder", "untrained": f"{probe} on an untrained encoder"}
    return on.get(row["kind"]) or told_name(row["name"])


def score_chart(report: Mapping[str, Any]) -> Axes:
    """A report's rows as points with their intervals, in the headline metric; the first row stands out.

    Args:
        report: as `esm2kit.benchmarking.report` describes it.
    """
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["metrics"][metric]["value"] is not None]
    values, lows, highs = ([row["metrics"][metric][key] for row in rows] for key in ("value", "low", "high"))
    names = [label(row) for row in rows]
    return plots.scores_beside_baselines(names, values, lows, highs, METRIC_NAMES.get(metric, metric), names[:1])


def verdict(report: Mapping[str, Any]) -> str:
    """How the first row compares, pair by pair of test proteins, with its probe, untrained twin and best rival."""
    first, best = report["rows"][0], best_baseline(report)
    rows = {row["name"]: row for row in report["rows"]}
    metric = report["task"]["metric"]
    told = []
    for pair in report["comparisons"]:
        other = rows[pair["theirs"]]
        if other is best:
            value = other["metrics"][metric]["value"]
            told.append(relation(pair, f"the best baseline, {label(other)} ({value:.3f}),", metric))
        # a constant has no rank to compare, and no place in the chart
        elif other["kind"] in ("probe", "untrained") or pair["metric"] != metric:
            told.append(relation(pair, f"the {TWIN if other['kind'] == 'untrained' else label(other)}", metric))
    value = first["metrics"][metric]["value"]
    figure = "no figure" if value is None else f"{value:.3f}"
    return f"The {label(first)} has {figure}: {'; '.join(told) or 'there is nothing to compare it with'}."


def relation(pair: Mapping[str, Any], other: str, metric: str) -> str:
    """Ahead, behind, or no clear difference: what a paired comparison shows of the first row, in words.

    Args:
        pair: one of a report's comparisons; a positive difference is better.
        other: what the first row is compared with.
        metric: the headline's; another one is named.
    """
    difference, low, high = pair["difference"], pair["low"], pair["high"]
    unit = "" if pair["metric"] == metric else f" in {METRIC_NAMES.get(pair['metric'], pair['metric'])}"
    sign = " (+ is lower, so better)" if pair["metric"] in LOWER_IS_BETTER else ""
    if difference is None:
        return f"no figure to hold against {other.rstrip(',')}"
    if low is None or high is None:
        return f"{difference:+.3f}{unit}{sign} from {other.rstrip(',')}, in every draw"
    if low > 0:
        return f"ahead of {other} by {difference:.3f} [{low:.3f}, {high:.3f}]{unit}"
    if high < 0:
        return f"behind {other} by {-difference:.3f} [{-high:.3f}, {-low:.3f}]{unit}"
    return f"no clear difference{unit} from {other.rstrip(',')}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]{sign}"


def beats_all(report: Mapping[str, Any]) -> bool:
    """Whether the first row is ahead of every other one, beyond what the draw of test proteins explains."""
    return all(pair["low"] is not None and pair["low"] > 0 for pair in report["comparisons"])


def summary(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence on all tasks: on how many the model is ahead of all that knows less, and where it is most so.

    Args:
        reports: task -> its report, the first row a probe.
    """

    def margin(task: str) -> float:
        best = best_baseline(reports[task])
        found = [pair["difference"] for pair in reports[task]["comparisons"] if best and pair["theirs"] == best["name"]]
        return found[0] if found and found[0] is not None else -math.inf

    ahead = [task for task in reports if beats_all(reports[task])]
    task = max(ahead or reports, key=margin)
    report, best = reports[task], best_baseline(reports[task])
    metric = report["task"]["metric"]
    value = report["rows"][0]["metrics"][metric]["value"]
    figure = f"{METRIC_NAMES.get(metric, metric)} {'undefined' if value is None else f'{value:.3f}'}"
    rival = f", where the best baseline, {label(best)}, has {best['metrics'][metric]['value']:.3f}" if best else ""
    count = f"on {len(ahead)} of {len(reports)} tasks, " if len(reports) > 1 else ""
    clear = "" if ahead else "do not clearly " if len(reports) == 1 else "clearly "
    most = "on " if len(reports) == 1 else "nearest to it on " if not ahead else "most so on " if len(ahead) > 1 else ""
    return f"The vectors {clear}beat everything that knows less {count}{most}{task}: {figure}{rival}."


def worth(report: Mapping[str, Any]) -> str:
    """What fine-tuning gave beyond the probe, at these figures, why, and what to change.

    Args:
        report: of a fine-tuning, its row first.
    """
    first = report["rows"][0]
    probe = next((row["name"] for row in report["rows"] if row["kind"] == "probe"), None)
    pair = next((pair for pair in report["comparisons"] if pair["theirs"] == probe), None)
    if pair is None:
        return "There is no probe on the frozen encoder to hold it against."
    if pair["low"] is None:
        return "The test proteins cannot tell it from the probe on the frozen encoder: they are too few, or too easy."
    if first["config"]["mode"] == "frozen":
        return "Only the head was trained: a probe by another road, and what differs is how the two are trained."
    proteins = f"{report['task']['sizes']['train']:,} labelled proteins"
    if pair["low"] > 0:
        return f"Worth it: {proteins} were enough to bend the encoder further towards the labels than a probe can read."
    kept, looks = first["selected"]["epoch"][0], len(first["history"].get("validation_loss", []))
    fewer = "fewer weights (`mode` lora or last_n), " if first["config"]["mode"] == "full" else ""
    why = (
        f"Validation was best at look {kept} of {looks}; after that it got no better, as when training labels are "
        f"learned by heart. Try {fewer}a lower `lr`, or more labels."
        if kept < looks
        else "Validation was still improving when it ended: give it more `epochs` first."
    )
    much = "Not worth it at these settings" if pair["high"] < 0 else "These proteins cannot tell if it was worth it"
    return (
        f"{much}: {proteins} are few to move an encoder with, and the probe reads the same vectors with far fewer "
        f"weights to fit. {why} An official `model` knows more to begin with, and has more to bend."
    )
