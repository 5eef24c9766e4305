"""The section of a report's page on the choice of the layer and the pooling."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.report import Report, format_value, metric_name
from esm2kit.benchmarking.sweep_summary import LayerSweep
from esm2kit.pages import build_figure, build_headers


def plot_sweep(report: Report) -> Axes:
    """Plot the validation scores of all layers and poolings of a report, and the test score of the chosen one.

    Args:
        report: A report with a sweep.

    Returns:
        The axes.
    """
    sweep, curves = report.layer_sweep, {}
    names = _name_poolings(sweep)
    for point in sweep.points:
        ends = (math.nan if end is None else end for end in (point.value, point.low, point.high))
        curves.setdefault(names[point.pooling], []).append([point.layer, *ends])
    score = report.first.metrics[sweep.metric]
    test = [math.nan if end is None else end for end in (score.value, score.low, score.high)]
    return plots.layer_curves(
        {name: np.array(points, dtype=float) for name, points in curves.items()},
        metric_name(sweep.metric, report.task.unit),
        (names[sweep.best.pooling], sweep.best.layer),
        None if score.value is None else test,
    )


def build_sweep_sections(report: Report) -> list[dict[str, Any]]:
    """Build the sections of the page: the choice in words with the curve, and a table of the validation scores.

    Args:
        report: A report with a sweep.

    Returns:
        The sections for `render_page`.
    """
    sweep = report.layer_sweep
    several = len({point.pooling for point in sweep.points}) > 1
    alt = "Validation scores: " + "; ".join(
        f"layer {point.layer}{f', {point.pooling}' if several else ''} {format_value(sweep.metric, point.value)}"
        for point in sweep.points
    )
    noun = "pairs" if report.task.pair_features else "proteins"
    caption = f"{metric_name(sweep.metric)} on the validation {noun} by layer"
    caption += ", one line per pooling." if several else "."
    caption += " Bars: 95% confidence intervals. Circle: the chosen one. Diamond: its test score, the only one that "
    caption += "was computed."
    sections: list[dict[str, Any]] = [
        {
            "title": "Choice of the layer and the pooling" if several else "Choice of the layer",
            "text": f"{sweep.sentence} Test had no part in the choice. The validation score of the best of several is "
            "optimistic; the test score is not.",
            "figures": [build_figure(lambda: plot_sweep(report), alt, caption)],
        }
    ]
    return [*sections, {"title": "Validation scores by layer", "table": _build_table(sweep, noun)}]


def _build_table(sweep: LayerSweep, noun: str) -> dict[str, Any]:
    """Build a table with a row per layer and a column per pooling."""
    names = _name_poolings(sweep)
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for place, point in enumerate(sweep.points):
        low, high = (format_value(sweep.metric, end, point.value) for end in (point.low, point.high))
        between = "" if point.low is None else f"[{low}, {high}]"
        mark = " chosen" if place == sweep.chosen else "" if point.is_distinct else " ≈"
        cell = {"text": format_value(sweep.metric, point.value), "small": between + mark, "number": True}
        cells.setdefault(point.layer, {})[point.pooling] = cell
    rows = [
        {
            "marked": layer == sweep.best.layer,
            "cells": [
                {"text": str(layer), "number": True},
                *(found.get(pooling, {"text": ""}) for pooling in names),
            ],
        }
        for layer, found in cells.items()
    ]
    caption = f"{metric_name(sweep.metric)} on {sweep.proteins:,} validation {noun}. Brackets: 95% confidence interval."
    caption += " ≈: not distinguishable from the chosen one by the interval of the paired difference."
    return {"headers": build_headers(["layer", *names.values()], 0), "rows": rows, "caption": caption}


def _name_poolings(sweep: LayerSweep) -> dict[str, str]:
    """Return the name of each pooling for the figure and the table; `validation` if there is only one."""
    names = dict.fromkeys(point.pooling for point in sweep.points)
    return {name: name if len(names) > 1 else "validation" for name in names}
