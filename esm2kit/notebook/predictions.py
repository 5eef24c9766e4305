"""Figures of predictions: along a test protein next to the measured classes, and of new proteins."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.uncertainty_page import draw_uncertainty
from esm2kit.core.errors import InputError

MAX_CLASSES = 12  # with more, colours look alike
MAX_TRACKS = 6
FEWEST = 30  # targets of a test protein in the strip


def strip_chart(report: Report, ax: Axes | None = None) -> Axes:
    """Plot measured and predicted classes along a typical test protein: that with the median accuracy.

    Args:
        report: a benchmark or fine-tuning report of a task with one class per residue, read from its file.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes; the rows are named "measured" and "predicted".

    Raises:
        InputError: the task does not predict a class per residue, or has too many classes.
    """
    task = report.task
    if task.level != "residue" or task.target != "class" or not 1 < len(task.labels) <= MAX_CLASSES:
        raise InputError(
            f"task {task.name} has no strip of classes: that needs 2 to {MAX_CLASSES} classes per residue",
            code="strip.task",
            task=task.name,
        )
    with np.load(report.json.parent / report.files["predictions"]) as stored:
        truth_M, predicted_M = stored["truth"], stored[f"predicted/{report.first.name}"][0]
        ends_P = np.cumsum(stored["num_targets"])
    pieces = [slice(end - size, end) for end, size in zip(ends_P, np.diff(ends_P, prepend=0), strict=True) if size]
    pieces = [piece for piece in pieces if piece.stop - piece.start >= FEWEST] or pieces
    accuracies = [float((truth_M[piece] == predicted_M[piece]).mean()) for piece in pieces]
    typical = pieces[int(np.argsort(accuracies, kind="stable")[len(pieces) // 2])]
    tracks = {"measured": truth_M[typical], "predicted": predicted_M[typical]}
    ax = plots.residue_track(tracks, task.labels, ax=ax)
    ax.get_legend().set_title("class")
    ax.set(xlabel="measured residue", ylabel="")
    return ax


def uncertainty_chart(report: Report) -> Axes:
    """Plot how sure the first row is on test or out of fold: a reliability diagram of classes, or intervals of values.

    All labels of a multi-label task are one diagram; of several values, the first is plotted.

    Args:
        report: a benchmark or fine-tuning report that was read from its file.

    Returns:
        The axes.

    Raises:
        InputError: the report has no uncertainty: it is of an earlier version.
    """
    with np.load(report.json.parent / report.files["predictions"]) as stored:
        draw = draw_uncertainty(report, stored["truth"], stored[f"predicted/{report.first.name}"])
    if draw is None:
        raise InputError(
            f"{report.json} has neither intervals nor calibrated probabilities: an earlier version wrote it. Run the "
            "benchmark or the fine-tuning again.",
            code="report.no-uncertainty",
            path=report.json,
        )
    return draw()


def new_prediction_chart(predicted: Mapping[str, Any]) -> Axes:
    """Plot predictions of new proteins: a histogram, a bar per class, or the first proteins along their sequences.

    Args:
        predicted: the result of `predict` with a .tsv file.

    Returns:
        The axes.
    """
    about = json.loads(Path(predicted["manifest"]).read_text(encoding="utf-8"))
    classes = about["labels"] if about["target"] == "class" else []
    kinds = {"id": str} | ({"prediction": str} if classes else {})
    table = pd.read_csv(predicted["out"], sep="\t", dtype=kinds, keep_default_na=False)
    if about["level"] == "residue" and len(classes) <= MAX_CLASSES:
        first = {name: rows.prediction for name, rows in table.groupby("id", sort=False)}
        tracks = {name: first[name] for name in list(first)[:MAX_TRACKS]}
        if classes:
            tracks = {name: np.array([classes.index(each) for each in track]) for name, track in tracks.items()}
        return plots.residue_track({name: np.asarray(track) for name, track in tracks.items()}, classes, about["unit"])
    if "threshold" in about:  # of the labels of a multi-label task
        counts = Counter(label for text in table.prediction for label in text.split(";") if label)
        return plots.class_counts(dict.fromkeys(classes, 0) | counts, class_name="label")
    if about["labels"] and not classes:
        return plots.prediction_histograms({name: table[name].to_numpy() for name in about["labels"]}, {})
    if classes:
        what = "residues" if about["level"] == "residue" else "proteins"
        return plots.class_counts(dict.fromkeys(classes, 0) | Counter(table.prediction), what=what)
    return plots.prediction_histogram(table.prediction.to_numpy(), unit=about["unit"])
