"""What a notebook shows: figures with captions, a stage's progress, a benchmark report as a chart and a sentence."""

import logging
import math
import time
from collections.abc import Mapping

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.report import Comparison, Report, ReportRow, display_name, metric_name
from esm2kit.tasks.metrics import LOWER_IS_BETTER

SECONDS_BETWEEN_LINES = 5.0
UNTRAINED = "same probe on an untrained encoder"
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


class _PrintHandler(logging.Handler):
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
    source.handlers, source.propagate = [_PrintHandler()], False


def label(row: ReportRow) -> str:
    """A report's row as text: what was trained, and on what."""
    if row.kind == "finetuned":
        return f"fine-tuned encoder {row.name[row.name.rfind('(') :]}"
    probe = row.name.rpartition(", ")[2]
    probe = f"{PROBES.get(probe, probe)} probe"
    on = {"probe": f"{probe} on the frozen encoder", "untrained": f"{probe} on an untrained encoder"}
    return on.get(row.kind) or display_name(row.name)


def score_chart(report: Report) -> Axes:
    """A report's rows as points with their intervals, in the headline metric; the first row stands out."""
    rows = [row for row in report.rows if report.headline(row).value is not None]
    scores = [report.headline(row) for row in rows]
    values, lows, highs = ([getattr(score, end) for score in scores] for end in ("value", "low", "high"))
    names = [label(row) for row in rows]
    return plots.scores_with_baselines(names, values, lows, highs, metric_name(report.task.metric), names[:1])


def verdict(report: Report) -> str:
    """How the first row compares with its probe, the untrained encoder and the best baseline, on the same proteins."""
    best, metric = report.best_baseline, report.task.metric
    rows = {row.name: row for row in report.rows}
    relations = []
    for pair in report.comparisons:
        other = rows[pair.theirs]
        if other is best:
            value = report.headline(other).value
            relations.append(describe_difference(pair, f"the best baseline, {label(other)} ({value:.3f}),", metric))
        # a constant has no rank to compare, and no place in the chart
        elif other.kind in ("probe", "untrained") or pair.metric != metric:
            name = UNTRAINED if other.kind == "untrained" else label(other)
            relations.append(describe_difference(pair, f"the {name}", metric))
    value = report.headline(report.first).value
    score = "no figure" if value is None else f"{value:.3f}"
    return f"The {label(report.first)} has {score}: {'; '.join(relations) or 'there is nothing to compare it with'}."


def describe_difference(pair: Comparison, other: str, metric: str) -> str:
    """Ahead, behind, or no clear difference: what a paired comparison shows of the first row, in words.

    Args:
        pair: one of a report's comparisons; a positive difference is better.
        other: what the first row is compared with.
        metric: the headline's; another one is named.
    """
    difference, low, high = pair.difference, pair.low, pair.high
    unit = "" if pair.metric == metric else f" in {metric_name(pair.metric)}"
    sign = " (+ is lower, so better)" if pair.metric in LOWER_IS_BETTER else ""
    if difference is None:
        return f"no figure to compare with {other.rstrip(',')}"
    if low is None or high is None:
        return f"{difference:+.3f}{unit}{sign} from {other.rstrip(',')}, in every draw"
    if low > 0:
        return f"ahead of {other} by {difference:.3f} [{low:.3f}, {high:.3f}]{unit}"
    if high < 0:
        return f"behind {other} by {-difference:.3f} [{-high:.3f}, {-low:.3f}]{unit}"
    return f"no clear difference{unit} from {other.rstrip(',')}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]{sign}"


def beats_all(report: Report) -> bool:
    """Whether the first row is ahead of every other one, beyond what the draw of test proteins explains."""
    return all(pair.low is not None and pair.low > 0 for pair in report.comparisons)


def summary(reports: Mapping[str, Report]) -> str:
    """One sentence on all tasks: on how many the model is ahead of every baseline, and where it is most so.

    Args:
        reports: task -> its report, the first row a probe.
    """

    def margin(task: str) -> float:
        best = reports[task].best_baseline
        found = [pair.difference for pair in reports[task].comparisons if best and pair.theirs == best.name]
        return found[0] if found and found[0] is not None else -math.inf

    ahead = [task for task in reports if beats_all(reports[task])]
    task = max(ahead or reports, key=margin)
    report, best = reports[task], reports[task].best_baseline
    value = report.headline(report.first).value
    score = f"{metric_name(report.task.metric)} {'undefined' if value is None else f'{value:.3f}'}"
    against = f", where the best baseline, {label(best)}, has {report.headline(best).value:.3f}" if best else ""
    count = f"on {len(ahead)} of {len(reports)} tasks, " if len(reports) > 1 else ""
    clear = "" if ahead else "do not clearly " if len(reports) == 1 else "clearly "
    most = "on " if len(reports) == 1 else "nearest to it on " if not ahead else "most so on " if len(ahead) > 1 else ""
    return f"The vectors {clear}beat every baseline {count}{most}{task}: {score}{against}."


def explain_finetuning(report: Report) -> str:
    """What fine-tuning gave beyond the probe, at these figures, why, and what to change.

    Args:
        report: of a fine-tuning, its row first.
    """
    first = report.first
    probe = next((row.name for row in report.rows if row.kind == "probe"), None)
    pair = next((pair for pair in report.comparisons if pair.theirs == probe), None)
    if pair is None:
        return "There is no probe on the frozen encoder to compare it with."
    if pair.low is None:
        return "The test proteins cannot tell it from the probe on the frozen encoder: they are too few, or too easy."
    if first.config["mode"] == "frozen":
        return "Only the head was trained: a probe by another road, and what differs is how the two are trained."
    proteins = f"{report.task.sizes['train']:,} labelled proteins"
    if pair.low > 0:
        return f"Worth it: {proteins} were enough to bend the encoder further towards the labels than a probe can read."
    kept, looks = first.selected["epoch"][0], len(first.history.get("validation_loss", []))
    fewer = "fewer weights (`mode` lora or last_n), " if first.config["mode"] == "full" else ""
    why = (
        f"Validation was best at look {kept} of {looks}; after that it got no better, as when training labels are "
        f"learned by heart. Try {fewer}a lower `lr`, or more labels."
        if kept < looks
        else "Validation was still improving when it ended: give it more `epochs` first."
    )
    much = "Not worth it at these settings" if pair.high < 0 else "These proteins cannot tell if it was worth it"
    return (
        f"{much}: {proteins} are few to move an encoder with, and the probe reads the same vectors with far fewer "
        f"weights to fit. {why} An official `model` knows more to begin with, and has more to bend."
    )
