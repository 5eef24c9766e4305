"""From predictions to what a report says of them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.metrics import Score, bits_of, class_scorer, confusions, finite, per_class, score_seeds, value_scorer
from esm2kit.tasks.task import Task

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]


def scorers_of(
    target: str, num_classes: int, num_bits: int, truth_M: np.ndarray, predicted_SM: np.ndarray, protein_M: np.ndarray
) -> list[Scorer]:
    """One scorer a seed.

    Args:
        target: "class" or "value".
        num_classes: of a class task.
        num_bits: binary labels a class stands for; 0 if none.
        truth_M: targets.
        predicted_SM: predictions, a row a seed.
        protein_M: which protein each target belongs to, from 0.
    """
    if target == "value":
        return [value_scorer(truth_M, predicted_M, protein_M) for predicted_M in predicted_SM]
    num_proteins = int(protein_M.max()) + 1
    return [
        class_scorer(truth_M, predicted_M, protein_M, num_proteins, num_classes, num_bits)
        for predicted_M in predicted_SM
    ]


def headline(task: Task, truth_M: np.ndarray, predicted_M: np.ndarray) -> float:
    """The task's headline metric of some predictions; nan where it is undefined."""
    one_protein = np.zeros(len(truth_M), dtype=np.int64)
    scorer = scorers_of(
        task.target, len(task.labels), len(task.binary_labels), truth_M, predicted_M[None], one_protein
    )[0]
    return float(scorer(np.ones((1, 1), dtype=np.int32))[task.metric][0])


def protein_numbers(data: TaskData) -> np.ndarray:
    """For every scored test target, its protein's number from 0; records of one id are one protein."""
    ids = np.array(data.ids)[data.protein_of_target[data.target_rows("test")]]
    return np.unique(ids, return_inverse=True)[1].reshape(-1)


def score_fitted(fitted: Fitted, data: TaskData, counts_RP: np.ndarray) -> dict[str, Score]:
    """All metrics of a model on the test set."""
    truth_M = data.targets[data.target_rows("test")]
    bits = len(data.task.binary_labels)
    scorers = scorers_of(data.task.target, len(data.task.labels), bits, truth_M, fitted.test_SM, protein_numbers(data))
    return score_seeds(scorers, counts_RP)


def note_on_draws(scores: dict[str, dict[str, Score]]) -> list[str]:
    """What a reader must know of intervals that no bootstrap can give: model -> metric -> score to a note, or none."""
    alike = [name for name, found in scores.items() if "accuracy" in found and found["accuracy"].is_same_in_every_draw]
    if not alike:
        return []
    num_proteins = scores[alike[0]]["accuracy"].num_proteins
    return [
        f"every draw of the {num_proteins} test proteins gives the same accuracy ({'; '.join(alike)}): its interval is "
        "the rule of three's, and other figures that no draw changes have none"
    ]


def metric_entry(score: Score) -> dict[str, Any]:
    """A metric of a row, as a report has it."""
    return {
        "value": finite(score.interval.value),
        "low": finite(score.interval.low),
        "high": finite(score.interval.high),
        "seeds": [finite(value) for value in score.seeds],
        "seed_spread": finite(score.seed_spread) or 0.0,
    }


def row_of(
    name: str,
    kind: str,
    fitted: Fitted,
    scores: dict[str, Score],
    data: TaskData,
    note: str,
    config: Any,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """A report's row."""
    truth_M, predicted_M = data.targets[data.target_rows("test")], fitted.test_SM[0]
    table: dict[str, dict[str, float]] = {}
    confusion: list[list[int]] = []
    if data.task.target == "class":
        labels, everyone = data.task.labels, np.zeros(len(truth_M), dtype=np.int64)
        matrix_KK = confusions(truth_M, predicted_M, everyone, 1, len(labels))[0]
        confusion = matrix_KK.tolist()
        table = per_class(matrix_KK, labels)
        if data.task.binary_labels:
            bits = len(data.task.binary_labels)
            truth_ML, predicted_ML = bits_of(truth_M, bits), bits_of(predicted_M, bits)
            table = {
                label: per_class(confusions(truth_ML[:, b], predicted_ML[:, b], everyone, 1, 2)[0], ("no", label))[
                    label
                ]
                for b, label in enumerate(data.task.binary_labels)
            }
    return {
        "name": name,
        "kind": kind,
        "note": note,
        "config": config,
        "seconds": round(fitted.seconds, 3),
        "seeds": list(seeds) if len(fitted.test_SM) > 1 else [],
        "selected": fitted.selected,
        "metrics": {metric: metric_entry(score) for metric, score in scores.items()},
        "per_class": table,
        "confusion": confusion,
        "history": {
            name: [[finite(loss) for loss in epoch] for epoch in curve] for name, curve in fitted.history.items()
        },
    }
