"""The section of a report's page on the uncertainty of predictions, and its figures."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.report import Report, describe_row
from esm2kit.pages import build_figure, build_headers
from esm2kit.tasks.conformal import merge_seeds

LABELS = "binary labels"


def draw_uncertainty(report: Report, truth_M: np.ndarray, predicted_SM: np.ndarray) -> Callable[[], Axes] | None:
    """Return the function that plots the reliability diagram of classes, or the intervals of values.

    Args:
        report: The results.
        truth_M: (M,) scored test targets.
        predicted_SM: (S, M) predictions of the first row.

    Returns:
        The function; None if the first row has no uncertainty. Intervals without ends are left out.
    """
    found = get_shown_uncertainty(report)
    if not found:
        return None
    if report.task.target == "class":
        what = name_targets(report)
        happens = "share that is present" if what == LABELS else "share that is right"
        return lambda: plots.reliability_diagram(_list_curves(found), what, happens)
    unit = report.task.unit
    if report.task.columns:  # the first target
        known_N = np.flatnonzero(np.isfinite(truth_M[:, 0]))
        truth_M, predicted_SM = truth_M[known_N, 0], predicted_SM[:, known_N, 0]
        unit = report.task.columns[0]
    mean_M, spread_M = merge_seeds(predicted_SM[: found["num_seeds"]])
    if found["quantile"] is None:
        return lambda: plots.predicted_vs_true(truth_M, mean_M, unit)
    scale_M = spread_M + found["offset"] if found["by_spread"] else np.ones_like(mean_M)
    return lambda: plots.predicted_with_intervals(truth_M, mean_M, found["quantile"] * scale_M, unit)


def get_shown_uncertainty(report: Report) -> Mapping[str, Any]:
    """Return the uncertainty of the first row that a figure shows: that of the first of several targets."""
    found = report.first.uncertainty
    return found["columns"][report.task.columns[0]] if found.get("columns") else found


def name_targets(report: Report) -> str:
    """Return what a bin of the reliability diagram counts: proteins, pairs, residues or binary labels."""
    if report.task.num_bits or report.task.is_multilabel:
        return LABELS
    if report.task.pair_features:
        return "pairs"
    return "residues" if report.task.level == "residue" else "proteins"


def _list_curves(found: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Return the curves of the reliability diagram: the probabilities of the model, and those with its temperature."""
    curves = {"probabilities of the model": found["before"]}
    if found["after"]:
        use = "used" if found["used"] else "not used"
        curves[f"with the temperature {found['temperature']:.3g} ({use})"] = found["after"]
    if not found["used"]:  # the last curve is that of the probabilities that are used
        curves = dict(reversed(curves.items()))
    return {
        name: [(each["confidence"], each["accuracy"], each["share"]) for each in scores["bins"] if each["count"]]
        for name, scores in curves.items()
    }


def build_uncertainty_section(report: Report, truth_M: np.ndarray, predicted_SM: np.ndarray) -> list[dict[str, Any]]:
    """Build the section of the page: how sure the predictions are, with figures and a table of all rows.

    Args:
        report: The results.
        truth_M: (M,) scored test targets.
        predicted_SM: (S, M) predictions of the first row.

    Returns:
        The section; an empty list if the first row has no uncertainty.
    """
    found = get_shown_uncertainty(report)
    if not found:
        return []
    draw, name = draw_uncertainty(report, truth_M, predicted_SM), describe_row(report.first)
    name = f"{name} of {report.task.columns[0]}" if report.task.columns else name
    figures = []
    if report.task.target == "class":
        what = name_targets(report)
        caption = (
            f"Reliability of the {name} {_name_set(found)}: on the dashed line, {what} with a probability of 0.8 are "
        )
        caption += (
            f"{'present' if what == LABELS else 'right'} in 80% of all cases; below it the probabilities are too "
        )
        caption += f"sure. Bars and areas of the marks: share of the {what} in each bin."
        figures.append(build_figure(draw, f"Reliability diagram. {found['sentence']}", caption))
    elif found["quantile"] is not None:
        targets = "targets, each predicted without its fold" if found.get("out_of_fold") else "test targets"
        caption = f"Predictions of the {name} with their {found['coverage']:.0%} intervals, at most 150 sampled "
        caption += f"{targets}. An interval that contains the measured value crosses the dashed line."
        figures.append(build_figure(draw, f"Predictions with intervals. {found['sentence']}", caption))
        figures += _build_coverage_figure(found)
    table = _build_calibration_table(report) if report.task.target == "class" else _build_interval_table(report)
    sentence = report.first.uncertainty["sentence"]
    return [{"title": "How sure are the predictions?", "text": sentence, "table": table, "figures": figures}]


def _name_set(found: Mapping[str, Any]) -> str:
    """Return what was predicted: test, or each fold by the other folds."""
    return "out of fold" if found.get("out_of_fold") else "on test"


def _build_coverage_figure(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Build the figure of found against promised coverage; an empty list if no interval has ends."""
    finite = [point for point in found["curve"] if point[2] is not None]  # others contain everything
    if not finite:
        return []
    nominal, shares, _ = zip(*finite, strict=True)
    caption = "Share of the test values inside the intervals, for every promised share. Below the dashed line the "
    if found.get("out_of_fold"):
        caption = "Share of the values of a fold inside intervals from the errors in the other folds, for every "
        caption += "promised share, over all folds. The line is near the dashed one if the folds are alike; below it "
    caption += "intervals are too narrow."
    draw = partial(plots.coverage_curve, nominal, shares, found["coverage"], on=_name_set(found))
    return [build_figure(draw, caption, caption)]


def _list_rows(report: Report) -> list[tuple[str, Mapping[str, Any], bool]]:
    """List name, uncertainty and mark of the rows of a table: all models, or all targets of the first model."""
    if report.first.uncertainty.get("columns"):
        return [(name, found, False) for name, found in report.first.uncertainty["columns"].items()]
    rows = [row for row in report.rows if row.uncertainty]
    return [(report.row_names[row.name], row.uncertainty, row is report.first) for row in rows]


def _format_cell(interval: Mapping[str, float | None], digits: int = 3) -> dict[str, Any]:
    """Format a number with its interval below."""
    low, high = (f"{interval[end]:.{digits}f}" for end in ("low", "high"))
    return {"text": f"{interval['value']:.{digits}f}", "small": f"[{low}, {high}]", "number": True}


def _build_calibration_table(report: Report) -> dict[str, Any]:
    """Build the table of calibration scores, before and after the temperature."""
    rows = []
    for name, found, marked in _list_rows(report):
        used = " (used)" if found["used"] else ""
        temperature = "–" if found["temperature"] is None else f"{found['temperature']:.3g}{used}"
        after = (
            [_format_cell(found["after"][key]) for key in ("ece", "nll")]
            if found["after"]
            else [{"text": "–", "number": True}] * 2
        )
        before = [_format_cell(found["before"][key]) for key in ("ece", "nll", "brier")]
        chance = {"text": f"{found['before']['by_chance']:.3f}", "number": True}
        cells = [{"text": name}, before[0], chance, *before[1:], {"text": temperature, "number": True}, *after]
        rows.append({"marked": marked, "cells": cells})
    headers = [
        "model",
        "calibration error",
        "by chance",
        "NLL",
        "Brier score",
        "temperature",
        "calibration error after",
    ]
    out_of_fold = report.first.uncertainty.get("out_of_fold")
    where, over = ("out of fold", "groups of proteins") if out_of_fold else ("on test", "proteins")
    caption = f"Expected calibration error of 15 bins, negative log-likelihood (NLL, nats) and Brier score {where}; "
    caption += f"lower is better. Brackets: 95% confidence interval from a bootstrap over {over}. By chance: the "
    caption += "calibration error of calibrated probabilities on as many proteins. "
    if out_of_fold:
        caption += "After: with the temperature of the other folds. The temperature shown is that of all folds, which "
        caption += "esm2kit predict uses if it helps on folds that it was not fitted on."
    else:
        caption += "The temperature is fitted on validation, and used by esm2kit predict if it helps there."
    return {"headers": build_headers([*headers, "NLL after"]), "rows": rows, "caption": caption}


def _build_interval_table(report: Report) -> dict[str, Any]:
    """Build the table of the coverage and the width of intervals."""
    unit = f" ({report.task.unit})" if report.task.unit and not report.task.columns else ""
    rows = []
    for name, found, marked in _list_rows(report):
        width = "no ends" if found["mean_width"] is None else f"{found['mean_width']:.4g}"
        kind = "spread of the seeds" if found["by_spread"] else "constant"
        inside = _format_cell(found["found"]) if found["mean_width"] is not None else {"text": "–", "number": True}
        cells = [{"text": name}, inside, {"text": width, "number": True}, {"text": kind}]
        rows.append({"marked": marked, "cells": cells})
    first = "target" if report.task.columns else "model"
    shown = get_shown_uncertainty(report)
    values, errors = ("values", "in the other folds") if shown.get("out_of_fold") else ("test values", "on validation")
    headers = [*build_headers([first, f"share of {values} inside", f"mean width{unit}"])]
    caption = f"{shown['coverage']:.0%} intervals from the errors {errors}. Brackets: 95% "
    caption += "confidence interval. Narrower is better where as many values are inside."
    return {"headers": [*headers, {"text": "width from"}], "rows": rows, "caption": caption}
