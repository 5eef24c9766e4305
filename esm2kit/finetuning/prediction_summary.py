"""Summarise predictions while they are written: their spread or classes, and a plot."""

import math
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm2kit.core.files import atomic_path
from esm2kit.tasks.scaling import UNSCALED, TargetScale
from esm2kit.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PLOTTED = 200_000  # values in the histogram
MOST_TRACKS = 6  # proteins in the plot of a residue task
MOST_CLASSES = 12  # with more, the predicted residues are counted instead of plotted along the sequence


class PredictionSummary:
    """The predictions of a run, in memory that does not grow with the number of proteins.

    Args:
        task: The task.
        scale: Scale of the training values, so that values of any size can be summed.
    """

    def __init__(self, task: Task, scale: TargetScale = UNSCALED) -> None:
        self.task, self.scale = task, scale
        self.count, self.classes = 0, Counter()
        self.low, self.high, self.mean, self.squares = math.inf, -math.inf, 0.0, 0.0
        self.values: array[float] = array("d")
        self.tracks: dict[str, np.ndarray] = {}
        self.sets: Counter[bytes] = Counter()
        single = replace(task, columns=())
        scales = scale.columns if len(scale.columns) > 1 else scale.columns * len(task.columns)  # unscaled values
        self.columns = [PredictionSummary(single, own) for own in scales[: len(task.columns)]]

    def add(self, name: str, decided_M: np.ndarray) -> None:
        """Add the predictions of one protein: one, or one per residue.

        Args:
            name: Id of the protein.
            decided_M: Classes or values; (1, C) labels that are present or several values.
        """
        if self.task.has_columns:
            self._add_several(decided_M)
            return
        if not len(decided_M):
            return
        if self.task.level == "residue" and len(self.tracks) < MOST_TRACKS:
            self.tracks[name] = decided_M
        if self.task.target == "class":
            self.count += len(decided_M)
            for place, number in zip(*np.unique(decided_M, return_counts=True), strict=True):
                self.classes[self.task.labels[place]] += int(number)
            return
        self.low, self.high = min(self.low, float(decided_M.min())), max(self.high, float(decided_M.max()))
        # the update of the mean and of the sum of squares by a block, as in features.compute_column_moments
        scaled_M, total = self.scale.standardise(decided_M), self.count + len(decided_M)
        block_mean = float(scaled_M.mean())
        delta = block_mean - self.mean
        self.squares += float(np.square(scaled_M - block_mean).sum()) + delta**2 * self.count * len(decided_M) / total
        self.mean, self.count = self.mean + delta * len(decided_M) / total, total
        if len(self.values) < MOST_PLOTTED:
            self.values.extend(decided_M.tolist())

    def _add_several(self, decided_1C: np.ndarray) -> None:
        """Add the labels or the values of one protein."""
        self.count += 1
        for column, values in zip(self.columns, decided_1C.T, strict=bool(self.columns)):
            column.add("", values)
        if self.task.is_multilabel:
            self.sets[np.packbits(decided_1C[0].astype(bool)).tobytes()] += 1
            self.classes.update(self.task.binary_labels[place] for place in np.flatnonzero(decided_1C[0]))

    def describe(self) -> dict[str, Any]:
        """Return {"count", "classes"} for classes, or {"count", "low", "high", "mean", "deviation"} for values.

        A multi-label task has {"count", "labels", "without" (proteins without a label), "different" (sets of labels)},
        several values have {"count", "columns": {name: as for values}}.
        """
        if self.task.is_multilabel:
            empty = np.packbits(np.zeros(len(self.task.binary_labels), dtype=bool)).tobytes()
            counts = {"labels": dict(self.classes.most_common()), "without": self.sets[empty]}
            return {"count": self.count, **counts, "different": sum(map(bool, self.sets.values()))}
        if self.task.columns:
            described = zip(self.task.columns, (column.describe() for column in self.columns), strict=True)
            return {"count": self.count, "columns": dict(described)}
        if self.task.target == "class":
            return {"count": self.count, "classes": dict(self.classes.most_common())}
        if not self.count:
            return {"count": 0}
        deviation = math.sqrt(self.squares / self.count) * self.scale.spread
        mean = float(self.scale.restore(self.mean))
        return {"count": self.count, "low": self.low, "high": self.high, "mean": mean, "deviation": deviation}

    def write_plot(self, path: Path, labels: dict[str, Any]) -> Path | None:
        """Write a plot: a histogram of values, a bar per class, or the tracks along the first proteins' sequences.

        Args:
            path: SVG file.
            labels: Description of the training labels, for the histogram.

        Returns:
            The path; None without predictions.
        """
        if not self.count:
            return None
        import matplotlib as mpl  # slow imports that only a plot needs
        import matplotlib.pyplot as plt

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esm2kit", "text.parse_math": False}):
            figure = self._draw(labels)().figure
            with atomic_path(path) as part:
                figure.savefig(part, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        return path

    def _draw(self, labels: dict[str, Any]) -> "Callable[[], Axes]":
        """Return the function that plots the predictions."""
        from esm2kit import plots

        task = self.task
        if task.is_multilabel:
            return lambda: plots.class_counts(dict.fromkeys(task.binary_labels, 0) | self.classes, class_name="label")
        if task.columns:
            values = {name: np.array(column.values) for name, column in zip(task.columns, self.columns, strict=True)}
            return lambda: plots.prediction_histograms(values, labels.get("columns", {}))
        if task.level == "residue" and len(self.classes) <= MOST_CLASSES:
            return lambda: plots.residue_track(self.tracks, task.labels, task.unit)
        if task.target == "class":
            what = "residues" if task.level == "residue" else "proteins"
            return lambda: plots.class_counts(dict.fromkeys(task.labels, 0) | self.classes, what=what)
        return lambda: plots.prediction_histogram(np.array(self.values), labels, task.unit)
