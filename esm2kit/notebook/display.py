"""Output of the notebooks: figures with captions, the progress of a stage, a benchmark report as chart and sentence."""

import logging
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.advice import advise_seeds
from esm2kit.benchmarking.report import (
    Comparison,
    Report,
    ReportRow,
    describe_row,
    format_difference,
    format_value,
    metric_name,
)
from esm2kit.benchmarking.sweep_page import plot_sweep
from esm2kit.embedding.maps import RESIDUES, field_name, protein_name
from esm2kit.notebook.captions import format_value as format_colour
from esm2kit.notebook.refresh import show
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Interval

SECONDS_BETWEEN_LINES = 5.0
UNTRAINED = "same probe on an untrained encoder"
TEXT_CELL = '<td style="text-align:left">'
LENGTH = field_name(RESIDUES)  # one column, also if the map is coloured by it


def captioned(ax: Axes, caption: str) -> None:
    """Show a figure with its caption below; the caption is also the alternative text of the image.

    Args:
        ax: any axes of the figure.
        caption: Markdown; line breaks are ignored.
    """
    show((ax, caption))


def neighbour_table(
    records: Sequence[Record], nearest_K: Sequence[int], cosine_K: np.ndarray, colour: str, values_P: np.ndarray
) -> HTML:
    """List the nearest neighbours of a protein with their names.

    Args:
        records: the proteins.
        nearest_K: indices of the neighbours, the nearest first.
        cosine_K: their cosine similarities.
        colour: name of the values that colour the map.
        values_P: (P,) these values.

    Returns:
        A table.
    """
    near = [records[place] for place in nearest_K]
    columns = {
        "": range(1, len(near) + 1),
        "protein": [record.id for record in near],
        "name": [protein_name(record.description) for record in near],
        colour: [format_colour(values_P[place]) for place in nearest_K],
        LENGTH: [f"{len(record.sequence):,}" for record in near],
        "cosine": [f"{cosine:.3f}" for cosine in cosine_K],
    }
    columns = {name: values for name, values in columns.items() if any(str(value) for value in values)}
    return HTML(pd.DataFrame(columns).to_html(index=False, border=0, justify="left").replace("<td>", TEXT_CELL))


class _PrintHandler(logging.Handler):
    """Print progress lines, at most one every few seconds, and every warning."""

    shown = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record if it is a warning or enough time has passed."""
        now = time.monotonic()
        if record.levelno >= logging.WARNING or now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            print(record.getMessage(), flush=True)


def follow_progress() -> None:
    """Show the progress of the stages in the cell that runs them."""
    source = logging.getLogger("esm2kit")
    source.setLevel(logging.INFO)
    source.handlers, source.propagate = [_PrintHandler()], False


def label(row: ReportRow) -> str:
    """Describe a row of a report: what was trained, and on which features.

    Args:
        row: a row of a benchmark or fine-tuning report.

    Returns:
        A short noun phrase, such as "CNN probe on the frozen encoder".
    """
    return describe_row(row)


def score_chart(report: Report) -> Axes:
    """Plot the headline metric of every row with its confidence interval; the first row is highlighted.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        The axes.
    """
    rows = [row for row in report.rows if report.headline(row).value is not None]
    scores = [report.headline(row) for row in rows]
    values, lows, highs = ([getattr(score, end) for score in scores] for end in ("value", "low", "high"))
    names = [label(row) for row in rows]
    return plots.scores_with_baselines(names, values, lows, highs, metric_name(report.task.metric), names[:1])


def model_chart(reports: Mapping[str, Report]) -> Axes:
    """Plot the headline metric of the first row of several reports on the same test proteins.

    Args:
        reports: name of the model -> its report; the first is highlighted.

    Returns:
        The axes.
    """
    scores = [report.headline(report.first) for report in reports.values()]
    columns = ([getattr(score, end) for score in scores] for end in ("value", "low", "high"))
    metric = metric_name(next(iter(reports.values())).task.metric)
    return plots.scores_with_baselines(list(reports), *columns, metric, [next(iter(reports))])


def layer_chart(report: Report) -> Axes:
    """Plot the validation scores of all layers of a report, and the test score of the chosen one.

    Args:
        report: a benchmark report whose layer was chosen on validation.

    Returns:
        The axes.
    """
    return plot_sweep(report)


def confusion_chart(report: Report) -> Axes:
    """Plot the confusion matrix of the first row, or the most frequent confusions of a task with many classes.

    Args:
        report: a benchmark or fine-tuning report of a class task.

    Returns:
        The axes.
    """
    first = report.first
    if first.confusion:
        return plots.confusion_matrix(first.confusion, report.task.labels)
    return plots.confused_pairs([(pair["true"], pair["predicted"], pair["count"]) for pair in first.confused])


def prediction_chart(report: Report) -> Axes:
    """Plot the test predictions of the first row: against the measured values, or as a confusion matrix.

    A multi-label task has a bar per label. Of several values per protein, the first one is plotted.

    Args:
        report: a benchmark or fine-tuning report that was read from its file.

    Returns:
        The axes.
    """
    if report.task.is_multilabel:
        table = report.first.per_class
        scores = ({label: entry[key] for label, entry in table.items()} for key in ("f1", "support"))
        return plots.label_scores(*scores)
    if report.task.target == "class":
        return confusion_chart(report)
    with np.load(report.json.parent / report.files["predictions"]) as stored:
        truth, predicted = stored["truth"], stored[f"predicted/{report.first.name}"]
    truth, predicted = truth.reshape(len(truth), -1)[:, 0], predicted[0].reshape(len(truth), -1)[:, 0]
    known = np.isfinite(truth)
    return plots.predicted_vs_true(truth[known], predicted[known], report.task.unit)


def verdict(report: Report) -> str:
    """Compare the first row with its probe, the untrained encoder and the best baseline, on the same proteins.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        One sentence with paired differences and their confidence intervals.
    """
    best, metric = report.best_baseline, report.task.metric
    rows = {row.name: row for row in report.rows}
    relations = []
    for pair in report.comparisons:
        other = rows[pair.theirs]
        if other is best:
            value = report.headline(other).value
            relations.append(
                describe_difference(pair, f"the best baseline, {label(other)} ({format_value(metric, value)}),", metric)
            )
        # a constant prediction has no rank to compare and is not in the chart
        elif other.kind in ("probe", "untrained") or pair.metric != metric:
            name = UNTRAINED if other.kind == "untrained" else label(other)
            relations.append(describe_difference(pair, f"the {name}", metric))
    value = report.headline(report.first).value
    score = "no score" if value is None else format_value(metric, value)
    return f"The {label(report.first)} has {score}: {'; '.join(relations) or 'there is nothing to compare it with'}."


def describe_difference(pair: Comparison, other: str, metric: str) -> str:
    """Describe a paired comparison: better, worse, or no clear difference.

    Args:
        pair: a comparison of a report; a positive difference favours the first row.
        other: text for the row that the first row is compared with.
        metric: the headline metric; another metric is named in the text.

    Returns:
        A phrase with the difference and its confidence interval.
    """
    low, high = pair.low, pair.high
    unit = "" if pair.metric == metric else f" in {metric_name(pair.metric)}"
    sign = " (positive means a lower error)" if pair.metric in LOWER_IS_BETTER else ""
    if pair.difference is None:
        return f"no score to compare with {other.rstrip(',')}"
    ends = (math.nan if end is None else end for end in (low, high))
    difference = Interval(pair.difference, *ends)
    size, signed = (format_difference(pair.metric, difference, absolute) for absolute in (True, False))
    if low is None or high is None:
        return f"{signed}{unit}{sign} compared with {other.rstrip(',')}, in every bootstrap replicate"
    if low > 0:
        return f"better than {other} by {size}{unit}"
    if high < 0:
        return f"worse than {other} by {size}{unit}"
    return f"no clear difference{unit} from {other.rstrip(',')}: {signed}{sign}"


def beats_all(report: Report) -> bool:
    """Check whether the first row is better than every other row, with intervals that exclude zero.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        True if the lower end of every paired difference is positive.
    """
    return all(pair.low is not None and pair.low > 0 for pair in report.comparisons)


def summary(reports: Mapping[str, Report]) -> str:
    """Summarise several tasks: on how many the model beats every baseline, and where by the largest margin.

    Args:
        reports: task -> its report, whose first row is a probe.

    Returns:
        One sentence.
    """

    def margin(task: str) -> float:
        best = reports[task].best_baseline
        found = [pair.difference for pair in reports[task].comparisons if best and pair.theirs == best.name]
        return found[0] if found and found[0] is not None else -math.inf

    won = [task for task in reports if beats_all(reports[task])]
    task = max(won or reports, key=margin)
    report, best = reports[task], reports[task].best_baseline
    value, metric = report.headline(report.first).value, report.task.metric
    score = f"{metric_name(metric)} {'undefined' if value is None else format_value(metric, value)}"
    against = (
        f"; the best baseline, {label(best)}, has {format_value(metric, report.headline(best).value)}" if best else ""
    )
    count = f"on {len(won)} of {len(reports)} tasks, " if len(reports) > 1 else ""
    clear = "" if won else "do not clearly " if len(reports) == 1 else "clearly "
    most = (
        "on "
        if len(reports) == 1
        else "with the smallest gap on "
        if not won
        else "with the largest margin on "
        if len(won) > 1
        else ""
    )
    return f"The vectors {clear}beat every baseline {count}{most}{task}: {score}{against}."


def explain_finetuning(report: Report) -> str:
    """Explain whether fine-tuning beat the probe, the likely reason, and what to change.

    Args:
        report: a fine-tuning report, whose first row is the fine-tuned encoder.

    Returns:
        One to four sentences.
    """
    first = report.first
    probe = next((row.name for row in report.rows if row.kind == "probe"), None)
    pair = next((pair for pair in report.comparisons if pair.theirs == probe), None)
    if pair is None:
        return "The report has no probe on the frozen encoder to compare with."
    if pair.low is None:
        return (
            "The test proteins do not separate it from the probe on the frozen encoder: they are too few, or too easy."
        )
    if first.config["mode"] == "frozen":
        return "Only the head was trained, so this is a second probe; the two differ only in how they are trained."
    proteins = f"{report.task.sizes['train']:,} labelled proteins"
    if pair.low > 0:
        return f"It was worth it: {proteins} were enough to adapt the encoder beyond what a probe can read from it."
    conclusion = (
        "It was not worth it at these settings" if pair.high < 0 else "The test proteins do not show a clear gain"
    )
    return (
        f"{conclusion}: {proteins} are few for adapting an encoder, and the probe fits far fewer weights. "
        f"{advise_seeds(first.history)} An official `model` starts with more knowledge."
    )
