"""Transfer labels from the nearest proteins, with a reliability index, and evaluate this by leaving each protein out.

The reliability index is that of goPredSim (Littmann et al. 2021, 10.1038/s41598-020-80786-0): the sum of the
similarities of the hits that have an annotation, divided by the number of hits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.sequences.homologs import Hits
from esm2kit.tasks.metrics import (
    Interval,
    Score,
    build_class_scorer,
    build_value_scorer,
    compute_paired_difference,
    nan_to_none,
    sample_counts,
    score_seeds,
)
from esm2kit.tasks.tables import find_same_columns

MAX_CLASSES_OF_INTEGERS = 9  # a column with more different integers is one of values
BINS = 5  # groups of reliability for the expected result
MIN_PER_BIN = 10
VECTORS = "vectors"


class Labels(NamedTuple):
    """The labels of the reference.

    Args:
        column: name in the table.
        type: class or value.
        names: the classes; empty for values.
        values_R: (R,) place of the class or the value of each protein; NaN without one.
    """

    column: str
    type: str
    names: tuple[str, ...]
    values_R: np.ndarray

    def format(self, value: float) -> str:
        """Write a label for a table; empty for NaN."""
        if np.isnan(value):
            return ""
        return self.names[int(value)] if self.type == "class" else f"{value:.7g}"


class Transferred(NamedTuple):
    """Labels of the queries.

    Args:
        values_Q: (Q,) as in `Labels`; NaN without a neighbour.
        reliability_Q: (Q,) reliability index of each.
    """

    values_Q: np.ndarray
    reliability_Q: np.ndarray


def choose_labels(columns: Mapping[str, Sequence[str | None]], target: str | None, type: str | None) -> Labels:
    """Choose the column of labels, and whether it has classes or values.

    Args:
        columns: name -> text per reference protein, None without a value.
        target: name of the column. None if there is only one.
        type: class or value. None: values if all are numbers, but not if they are few different integers.

    Returns:
        The labels.

    Raises:
        InputError: there is no such column, there are several, or a label is not a number.
    """
    found = list(columns)
    if target is not None:
        found = [found[place] for place in find_same_columns(list(columns), target)]
    if len(found) != 1:
        what = "no" if not found else f"{len(found)}"
        wanted = "" if target is None else f" named '{target}'"
        raise InputError(
            f"the table of labels has {what} columns of labels{wanted}: {', '.join(map(repr, columns))}. Choose one "
            "with --target.",
            code="neighbours.target",
            target=target,
            columns=list(columns),
        )
    texts = columns[found[0]]
    given = [text for text in texts if text is not None]
    numbers = [number for text in given if (number := _parse(text)) is not None]
    if type is None:
        few = len(set(numbers)) <= MAX_CLASSES_OF_INTEGERS and all(number.is_integer() for number in numbers)
        type = "value" if len(numbers) == len(given) and not few else "class"
    if type == "class":
        names = tuple(sorted(set(given)))
        place = {name: float(number) for number, name in enumerate(names)}
        return Labels(found[0], type, names, np.array([np.nan if text is None else place[text] for text in texts]))
    if len(numbers) < len(given):
        wrong = next(text for text in given if _parse(text) is None)
        raise InputError(
            f"column '{found[0]}' has the label '{wrong}', which is not a number. Correct it, or use --target_type "
            "class.",
            code="neighbours.number",
            column=found[0],
            found=wrong,
        )
    return Labels(found[0], type, (), np.array([np.nan if text is None else float(text) for text in texts]))


def _parse(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def compute_reliability(labels: Labels, hits: Hits) -> np.ndarray:
    """Compute the reliability index of the label of each hit.

    Args:
        labels: of the reference.
        hits: (Q, K) cosines.

    Returns:
        (Q, K): the similarities, at least 0, of all hits with the same class, divided by the number of hits; of all
        hits, if the labels are values; 0 where there is no hit.
    """
    present_QK = hits.rows_QK >= 0
    weight_QK = np.where(present_QK, np.maximum(hits.scores_QK, 0), 0.0)
    num_hits_Q = np.maximum(present_QK.sum(1), 1)
    label_QK = labels.values_R[hits.rows_QK]
    same_QKK = (label_QK[:, :, None] == label_QK[:, None]) if labels.type == "class" else np.ones((1, 1, 1), bool)
    return np.where(present_QK, (same_QKK * weight_QK[:, None]).sum(2) / num_hits_Q[:, None], 0.0)


def transfer_labels(labels: Labels, hits: Hits) -> Transferred:
    """Transfer the labels of the hits to the queries.

    Args:
        labels: of the reference.
        hits: (Q, K) similarities; negative ones have no weight.

    Returns:
        The class with the largest sum of similarities (of equal ones that of the nearest hit), or the mean value
        weighted by the similarities (the plain mean if all are 0).
    """
    present_QK = hits.rows_QK >= 0
    weight_QK = np.where(present_QK, np.maximum(hits.scores_QK, 0), 0.0)
    label_QK = np.where(present_QK, labels.values_R[hits.rows_QK], np.nan)
    reliability_QK = compute_reliability(labels, hits)
    if labels.type == "class":
        best_Q = np.argmax(reliability_QK.round(12), axis=1)
        values_Q = np.take_along_axis(label_QK, best_Q[:, None], axis=1)[:, 0]
        return Transferred(values_Q, np.take_along_axis(reliability_QK, best_Q[:, None], axis=1)[:, 0])
    weight_QK = np.where(weight_QK.sum(1, keepdims=True) > 0, weight_QK, present_QK)
    total_Q = weight_QK.sum(1)
    summed_Q = (weight_QK * np.where(present_QK, label_QK, 0)).sum(1)
    values_Q = np.divide(summed_Q, total_Q, out=np.full(len(total_Q), np.nan), where=total_Q > 0)
    return Transferred(values_Q, reliability_QK[:, 0])


class Evaluation(NamedTuple):
    """How well labels of the reference are found from the other reference proteins.

    Args:
        metric: accuracy, or spearman for values.
        num_proteins: number of proteins that were left out, one by one.
        scores: method -> score; `vectors` first.
        differences: other method -> how much better the vectors are.
        bins: of falling reliability: lowest index, number of proteins and `expected`, the accuracy or mean absolute
            error.
        verdict: sentences.
    """

    metric: str
    num_proteins: int
    scores: dict[str, Score]
    differences: dict[str, Interval]
    bins: list[dict[str, float]]
    verdict: str

    def find_expected(self, reliability: float) -> float | None:
        """Return the accuracy or mean absolute error of the reference proteins of about this reliability."""
        for each in self.bins:
            if reliability >= each["lowest"]:
                return each["expected"]
        return self.bins[-1]["expected"] if self.bins else None

    def to_json(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""

        def plain(interval: Interval) -> dict[str, float | None]:
            return {name: nan_to_none(value) for name, value in interval._asdict().items()}

        return {
            "metric": self.metric,
            "num_proteins": self.num_proteins,
            "scores": {name: plain(score.interval) for name, score in self.scores.items()},
            "vectors_better_by": {name: plain(interval) for name, interval in self.differences.items()},
            "reliability": self.bins,
        }


def evaluate_transfer(
    labels: Labels, rows: np.ndarray, hits: Mapping[str, Hits], resamples: int, seed: int = 0
) -> Evaluation:
    """Compare the transferred labels of reference proteins with their own.

    Args:
        labels: of the reference.
        rows: (N,) the proteins that were left out.
        hits: method -> hits of each of them among the others.
        resamples: bootstrap replicates of the proteins.
        seed: of the resamples.

    Returns:
        The scores, in the order of `hits`, and for classes of the most frequent class. A method without a hit predicts
        the most frequent class or the mean.
    """
    truth_N = labels.values_R[rows]
    known_R = labels.values_R[~np.isnan(labels.values_R)]
    is_class = labels.type == "class"
    constant = float(np.bincount(known_R.astype(int)).argmax()) if is_class else float(known_R.mean())
    transferred = {name: transfer_labels(labels, found) for name, found in hits.items()}
    predicted = {name: np.where(np.isnan(each.values_Q), constant, each.values_Q) for name, each in transferred.items()}
    if is_class:
        predicted["most frequent class"] = np.full(len(rows), constant)
    metric = "accuracy" if is_class else "spearman"
    counts_RP, protein_N = sample_counts(len(rows), resamples, seed), np.arange(len(rows))
    scores = {}
    for name, values_N in predicted.items():
        if is_class:
            codes = truth_N.astype(int), values_N.astype(int)
            scorer = build_class_scorer(*codes, protein_N, len(rows), len(labels.names))
        else:
            scorer = build_value_scorer(truth_N, values_N, protein_N)
        scores[name] = score_seeds([scorer], counts_RP)[metric]
    differences = {
        name: compute_paired_difference(metric, scores[VECTORS], score)
        for name, score in scores.items()
        if name != VECTORS
    }
    errors_N = (predicted[VECTORS] == truth_N).astype(float) if is_class else np.abs(predicted[VECTORS] - truth_N)
    bins = _bin_reliability(transferred[VECTORS].reliability_Q, errors_N)
    verdict = _write_verdict(metric, labels.column, scores, differences, len(rows))
    return Evaluation(metric, len(rows), scores, differences, bins, verdict)


def _bin_reliability(reliability_N: np.ndarray, results_N: np.ndarray) -> list[dict[str, float]]:
    """Average the results in groups of equal size by falling reliability."""
    num_bins = min(BINS, len(results_N) // MIN_PER_BIN)
    order = np.argsort(-reliability_N, kind="stable")
    return [
        {
            "lowest": float(reliability_N[part].min()),
            "num_proteins": len(part),
            "expected": float(results_N[part].mean()),
        }
        for part in (np.array_split(order, num_bins) if num_bins else [])
    ]


def _write_verdict(
    metric: str, column: str, scores: Mapping[str, Score], differences: Mapping[str, Interval], num_proteins: int
) -> str:
    """Describe the scores in plain English, and name the simpler methods that are as good."""

    def describe(name: str) -> str:
        value, low, high = scores[name].interval
        ends = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
        return f"{name} {value:.3f}{ends}"

    text = f"{column}, leaving each of {num_proteins:,} reference proteins out: {metric} of "
    text += ", ".join(describe(name) for name in scores) + "."
    better = [name for name, found in differences.items() if found.high < 0]
    worse = [name for name, found in differences.items() if found.low > 0]
    equal = [name for name in differences if name not in (*better, *worse)]
    if better:
        text += f" The simpler {_join(better)} {_verb(better, 'is', 'are')} better than the vectors: use {_it(better)}."
    if equal:
        text += (
            f" The vectors are not distinguishable from {_join(equal)}, so the simpler "
            f"{_verb(equal, 'method is', 'methods are')} as good here."
        )
    if worse:
        text += f" The vectors are better than {_join(worse)}."
    return text


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(names: Sequence[str], one: str, several: str) -> str:
    return one if len(names) == 1 else several


def _it(names: Sequence[str]) -> str:
    return _verb(names, "it", "one of them")
