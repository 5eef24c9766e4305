"""The part of a report's page that describes a cross-validation."""

import math
from typing import Any

import numpy as np

from esm2kit import plots
from esm2kit.benchmarking.report import Report, describe_row, format_value, metric_name
from esm2kit.core.numbers import format_count
from esm2kit.pages import build_figure, build_headers

MAX_ROWS = 200  # of the table of folds; report.json has all


def describe_folds(report: Report) -> str:
    """Describe the cross-validation of a report in one sentence."""
    folds = report.folds
    sizes = [fold.test for fold in folds.folds]
    size = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    repeats = f", divided {folds.repeats} times" if folds.repeats > 1 else ""
    groups = f"{format_count(folds.num_groups, 'group')} ({folds.method.rpartition('groups: ')[-1]})"
    proteins = format_count(report.task.sizes["test"], "pair" if report.task.pair_features else "protein")
    return f"{proteins} in {folds.num_folds} folds of {size}{repeats}. None of the {groups} is in two folds."


def build_fold_section(report: Report) -> dict[str, Any]:
    """Build the section with the score of each fold, as a figure and a table.

    Args:
        report: A report with folds.

    Returns:
        Title, text, figure and table.
    """
    folds, first, metric = report.folds, report.first, report.task.metric
    name = metric_name(metric, report.task.unit)
    score, num_folds = report.headline(first), folds.num_folds
    values = [math.nan if value is None else value for value in first.folds]
    overall = tuple(math.nan if end is None else end for end in (score.value, score.low, score.high))
    names = [fold.name for fold in folds.folds[:num_folds]]
    shown = "; ".join(format_value(metric, value) for value in first.folds[:50])
    figure = build_figure(
        lambda: plots.fold_scores(np.reshape(values, (folds.repeats, num_folds)), names, overall, name),
        f"{name} of the {describe_row(first)} in each fold: {shown}",
        f"{name} of the {describe_row(first)} in each fold, and over all folds with its 95% confidence interval.",
    )
    chosen = any(fold.selected for fold in folds.folds)
    rows = []
    for fold, value in list(zip(folds.folds, first.folds, strict=True))[:MAX_ROWS]:
        cells = [{"text": str(fold.repeat)}] if folds.repeats > 1 else []
        cells.append({"text": fold.name})
        cells += [{"text": f"{count:,}", "number": True} for count in (fold.test, fold.train, fold.validation)]
        cells.append({"text": format_value(metric, value), "number": True})
        cells += [{"text": fold.selected}] if chosen else []
        rows.append({"cells": cells})
    numbers = build_headers(
        ["test pairs" if report.task.pair_features else "test proteins", "train", "validation", name], 0
    )
    headers = [*([{"text": "repeat"}] if folds.repeats > 1 else []), {"text": "fold"}, *numbers]
    headers += [{"text": "chosen on validation"}] if chosen else []
    noun = "pair" if report.task.pair_features else "protein"
    text = (
        f"Each {noun} is predicted by a probe that was trained without its fold. Everything that is chosen is chosen "
        f"on validation {noun}s of the other folds. The interval is a bootstrap over groups of proteins, widened by a "
        f"factor of {folds.widening:.2f}, because the training sets of the folds overlap (Nadeau and Bengio 2003)"
    )
    few = f", and by a factor of {folds.expansion:.2f} for {format_count(folds.num_groups, 'group')} (Hesterberg 2015)."
    text += few if folds.expansion > 1 else "."
    if any(row.probe_file for row in report.rows):
        text += (
            f" For the prediction of other {noun}s, esm2kit predict uses a final probe that was fitted on all {noun}s, "
            "with the median of the settings that the folds chose. The scores here are those of probes that were "
            f"trained on fewer {noun}s."
        )
    return {"title": "Folds", "text": text, "figures": [figure], "table": {"headers": headers, "rows": rows}}
