"""Score predictions and build the rows of a report."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import MAX_CONFUSED_PAIRS, MAX_CONFUSION_CLASSES, Metric, ReportRow, format_value
from esm2kit.tasks.column_metrics import build_column_scorer, group_by_column, is_mean
from esm2kit.tasks.label_metrics import (
    DEFAULT_THRESHOLD,
    build_binary_scorer,
    build_label_scorer,
    compute_per_label,
)
from esm2kit.tasks.metrics import (
    Score,
    build_class_scorer,
    build_value_scorer,
    compute_per_class,
    count_confused_pairs,
    count_confusions,
    nan_to_none,
    sample_counts,
    score_seeds,
    unpack_bits,
)
from esm2kit.tasks.pairs import sample_pair_counts
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]


class SeveralTargets(NamedTuple):
    """What the scores of several targets per protein require besides targets and predictions.

    Args:
        columns: Names of the values.
        spreads: Standard deviation of the training values of each.
        thresholds: Of each seed, the probability above which a label is predicted; (M, 1) if it is not the same for
            all proteins.
    """

    columns: Sequence[str] = ()
    spreads: Sequence[float] = ()
    thresholds: Sequence[float | np.ndarray] = ()

    @classmethod
    def from_task(cls, data: TaskData, thresholds: Sequence[float | np.ndarray] = ()) -> "SeveralTargets":
        """Return what a task's scores require; nothing for one target per protein."""
        spreads = TargetScale.from_values(data.targets[data.target_rows("train")]).spread if data.task.columns else ()
        return cls(data.task.columns, spreads, thresholds)


def build_scorers(
    target: str,
    num_classes: int,
    num_bits: int,
    truth_M: np.ndarray,
    predicted_SM: np.ndarray,
    protein_M: np.ndarray,
    several: SeveralTargets | None = None,
) -> list[Scorer]:
    """Build one scorer per seed.

    Args:
        target: "class" or "value".
        num_classes: Number of classes; 0 for values.
        num_bits: Number of binary labels that a class encodes; 0 if it encodes none.
        truth_M: (M,) targets, or (M, C) for several targets per protein.
        predicted_SM: (S, M) or (S, M, C) predictions, one row per seed; probabilities of labels.
        protein_M: (M,) protein of each target, numbered from 0.
        several: For several targets per protein.

    Returns:
        Functions from bootstrap counts (R, P) to the metrics of each replicate.
    """
    several = several or SeveralTargets()
    if truth_M.ndim == 2 and target == "value":
        return [
            build_column_scorer(truth_M, predicted_MC, protein_M, several.columns, several.spreads)
            for predicted_MC in predicted_SM
        ]
    if truth_M.ndim == 2:
        thresholds = several.thresholds or [DEFAULT_THRESHOLD] * len(predicted_SM)
        return [
            build_label_scorer(truth_M, probability_ML, protein_M, threshold)
            for probability_ML, threshold in zip(predicted_SM, thresholds, strict=True)
        ]
    if target == "value":
        return [build_value_scorer(truth_M, predicted_M, protein_M) for predicted_M in predicted_SM]
    num_proteins = int(protein_M.max()) + 1
    return [
        build_class_scorer(truth_M, predicted_M, protein_M, num_proteins, num_classes, num_bits)
        for predicted_M in predicted_SM
    ]


def build_task_scorers(
    task: Task,
    truth_M: np.ndarray,
    predicted_SM: np.ndarray,
    protein_M: np.ndarray,
    several: SeveralTargets | None = None,
) -> list[Scorer]:
    """Build one scorer per seed for the targets of a task; see `build_scorers`."""
    kinds = (task.target, len(task.labels), len(task.binary_labels))
    return build_scorers(*kinds, truth_M, predicted_SM, protein_M, several)


def compute_headline(
    task: Task, truth_M: np.ndarray, predicted_M: np.ndarray, several: SeveralTargets | None = None
) -> float:
    """Compute the headline metric of predictions (M,), or (M, C) for several targets; nan if it is undefined."""
    one_protein = np.zeros(len(truth_M), dtype=np.int64)
    several = several or SeveralTargets(task.columns, [1.0] * len(task.columns))
    scorer = build_scorers(
        task.target, len(task.labels), len(task.binary_labels), truth_M, predicted_M[None], one_protein, several
    )[0]
    return float(scorer(np.ones((1, 1), dtype=np.int32))[task.metric][0])


def score_validation(fitted: Fitted, data: TaskData) -> float | None:
    """Compute the mean over seeds of the headline metric on validation; None if undefined or not predicted."""
    truth_M = data.targets[data.target_rows("validation")]
    if not len(truth_M) or fitted.validation_SM.shape[1:] != truth_M.shape:
        return None
    found = [
        compute_headline(data.task, truth_M, row_M, SeveralTargets.from_task(data, [threshold]))
        for row_M, threshold in zip(fitted.validation_SM, fitted.thresholds, strict=True)
    ]
    return nan_to_none(float(np.mean(found)))


def number_proteins(data: TaskData, set_name: str = "test") -> np.ndarray:
    """Return the protein of each scored target of a set (M,), numbered from 0; records with one id are one protein."""
    ids = np.array(data.ids)[data.protein_of_target[data.target_rows(set_name)]]
    return np.unique(ids, return_inverse=True)[1].reshape(-1)


def sample_test_counts(data: TaskData, resamples: int, set_name: str = "test") -> np.ndarray:
    """Sample bootstrap replicates of a set's proteins: (R, P) counts; of pairs those of `sample_pair_counts`."""
    protein_M = number_proteins(data, set_name)
    if data.pairs is None:
        return sample_counts(int(protein_M.max()) + 1, resamples)
    first = np.unique(protein_M, return_index=True)[1]
    return sample_pair_counts(data.pairs.groups_P2[data.target_rows(set_name)][first], resamples)


def score_fitted(fitted: Fitted, data: TaskData, counts_RP: np.ndarray, set_name: str = "test") -> dict[str, Score]:
    """Compute all metrics of a model on test or validation, with bootstrap counts (R, P) of the set's proteins."""
    truth_M = data.targets[data.target_rows(set_name)]
    predicted_SM = fitted.test_SM if set_name == "test" else fitted.validation_SM
    bits = len(data.task.binary_labels)
    scorers = build_scorers(
        data.task.target,
        len(data.task.labels),
        bits,
        truth_M,
        predicted_SM,
        number_proteins(data, set_name),
        SeveralTargets.from_task(data, fitted.thresholds),
    )
    scores = score_seeds(scorers, counts_RP)
    if (
        data.pairs is not None
        and len(data.task.labels) == 2
        and set_name == "test"
        and fitted.test_logits_MC is not None
    ):
        score_M = np.diff(fitted.test_logits_MC, axis=1)[:, 0]
        scores |= score_seeds([build_binary_scorer(truth_M, score_M, number_proteins(data))], counts_RP)
    return scores


def format_score(metric: str, score: Score) -> str:
    """Format a score with its interval for the log, or state that it is undefined."""
    value, low, high = score.interval
    if not math.isfinite(value):
        return f"{metric} is undefined: the predictions or the targets are constant"
    between = f" [{format_value(metric, low, value)}, {format_value(metric, high, value)}]"
    return f"{metric} {format_value(metric, value)}" + (between if math.isfinite(low) else "")


def build_interval_notes(scores: Mapping[str, Mapping[str, Score]], resampled: str = "test proteins") -> list[str]:
    """Return a note on metrics that are equal in all bootstrap replicates.

    Args:
        scores: Model -> metric -> score.
        resampled: What the bootstrap resamples.

    Returns:
        One sentence, or an empty list if the accuracy of every model varies.
    """
    alike = [name for name, found in scores.items() if "accuracy" in found and found["accuracy"].is_constant]
    if not alike:
        return []
    num_proteins = scores[alike[0]]["accuracy"].num_proteins
    return [
        f"Every bootstrap replicate of the {num_proteins} {resampled} gives the same accuracy ({'; '.join(alike)}). "
        "Its interval comes from the rule of three. Other metrics that do not vary have no interval."
    ]


@dataclass(frozen=True)
class ScoredModel:
    """The predictions and scores of a model.

    Args:
        name: Name of the model.
        kind: See `ReportRow.kind`.
        note: How the model was fitted.
        config: Settings of the model.
        fitted: Predictions.
        scores: Scores from `score_fitted`.
        probe_file: See `ReportRow.probe_file`.
        validation: See `ReportRow.validation`.
        folds: See `ReportRow.folds`.
        repeats: How many rows of predictions each seed has: the repeats of a cross-validation.
    """

    name: str
    kind: str
    note: str
    config: Mapping[str, Any]
    fitted: Fitted
    scores: dict[str, Score]
    probe_file: str = ""
    validation: float | None = None
    folds: Sequence[float | None] = ()
    repeats: int = 1

    def to_row(self, data: TaskData, seeds: Sequence[int]) -> ReportRow:
        """Convert the model to a row of a report.

        Args:
            data: The task.
            seeds: Seeds of the predictions. The row omits them if the model does not depend on a seed.

        Returns:
            The row.
        """
        fitted = self.fitted
        table, confusion, confused = {}, [], []
        if data.task.is_multilabel:
            truth_ML = data.targets[data.target_rows("test")]
            table = compute_per_label(truth_ML, fitted.test_SM[0], data.task.binary_labels, fitted.thresholds[0])
        elif data.task.target == "class":
            table = _build_class_table(data, fitted.test_SM[0])
            confusion, confused = _build_confusions(data, fitted.test_SM[0])
        return ReportRow(
            name=self.name,
            kind=self.kind,
            note=self.note,
            config=self.config,
            seconds=round(fitted.seconds, 3),
            seeds=list(seeds) if len(fitted.test_SM) > self.repeats else [],
            selected=fitted.selected,
            metrics={metric: Metric.from_score(score) for metric, score in self.scores.items() if is_mean(metric)},
            per_target=group_by_column(
                {metric: Metric.from_score(score) for metric, score in self.scores.items()}, data.task.columns
            ),
            per_class=table,
            confusion=confusion,
            confused=confused,
            history={
                name: [[nan_to_none(loss) for loss in epoch] for epoch in curve]
                for name, curve in fitted.history.items()
            },
            validation=self.validation if self.folds else score_validation(fitted, data),
            probe_file=self.probe_file,
            folds=list(self.folds),
        )


def _build_class_table(data: TaskData, predicted_M: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute precision, recall, F1 and support of each label."""
    truth_M, bits = data.targets[data.target_rows("test")], data.task.binary_labels
    if not bits:
        return compute_per_class(truth_M, predicted_M, data.task.labels)
    truth_ML, predicted_ML = unpack_bits(truth_M, len(bits)), unpack_bits(predicted_M, len(bits))
    return {
        label: compute_per_class(truth_ML[:, bit], predicted_ML[:, bit], ("no", label))[label]
        for bit, label in enumerate(bits)
    }


def _build_confusions(data: TaskData, predicted_M: np.ndarray) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Compute the confusion matrix (K, K), or for many classes the most frequent confusions, as in `ReportRow`."""
    truth_M, labels = data.targets[data.target_rows("test")], data.task.labels
    if len(labels) <= MAX_CONFUSION_CLASSES:
        return count_confusions(truth_M, predicted_M, len(labels)).tolist(), []
    pairs = count_confused_pairs(truth_M, predicted_M, MAX_CONFUSED_PAIRS)
    return [], [{"true": labels[a], "predicted": labels[b], "count": count} for a, b, count in pairs]
