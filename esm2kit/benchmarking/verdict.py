"""The verdict on predictions: one line in plain words, and warnings where predictions carry no information."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.baselines.fit import choose_constant, repeat_constant
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import display_name, format_value, metric_name
from esm2kit.benchmarking.scores import ScoredModel, score_fitted
from esm2kit.tasks.label_sets import format_label_set
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Score, compute_paired_difference
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

# Predictions of values have collapsed if they spread less than this share of the measured values.
SMALLEST_SPREAD = 0.2
FEWEST_PREDICTIONS = 5  # fewer say nothing about their spread
NAMES = {
    "probe": "the frozen probe",
    "untrained": "an untrained model",
    "composition": "amino-acid composition",
    "onehot_ridge": "a linear model of the sequence",
    "onehot_cnn": "a CNN of the sequence",
    "levenshtein_nearest": "the nearest training sequence",
    "blosum62_nearest": "the nearest training sequence",
    "degree": "how often each protein interacts",
}


class Verdict(NamedTuple):
    """What a user must know about predictions.

    Args:
        sentence: One line in plain words.
        warnings: One sentence each; empty if nothing is wrong.
    """

    sentence: str
    warnings: tuple[str, ...] = ()


def log_verdict(sentence: str, warnings: Sequence[str]) -> None:
    """Log the warnings and, as the last line, the verdict."""
    for warning in warnings:
        logger.warning("warning: %s", warning)
    logger.info("%s", sentence)


def score_constant(data: TaskData, counts_RP: np.ndarray) -> dict[str, Score]:
    """Score the constant prediction, the mean or the majority class of train, with bootstrap counts (R, P)."""
    constant_1M = repeat_constant(choose_constant(data), len(data.target_rows("test")))
    return score_fitted(Fitted(constant_1M, np.empty((1, 0))), data, counts_RP)


def evaluate(
    data: TaskData, first: ScoredModel, constant: Mapping[str, Score], others: Sequence[ScoredModel] = ()
) -> Verdict:
    """Compare a model with the constant prediction, the frozen probe and the best baseline on test.

    Args:
        data: The task.
        first: The model.
        constant: Scores of the constant prediction, from `score_constant` with the same bootstrap counts.
        others: The other models of the report.

    Returns:
        The verdict, with a warning if the predictions have collapsed or are not better than the constant.
    """
    task = data.task
    value = task.target == "value"
    truth_M = data.targets[data.target_rows("test")]
    shown = "r2" if value else task.metric
    numbers = [_format_score(shown, first.scores[shown])]
    if value:
        numbers = _describe_spreads(numbers[0], first.fitted.test_SM, truth_M, task.columns)
    groups: dict[str, list[str]] = {"better": [], "same": [], "worse": []}
    compared = "rmse" if value else task.metric
    constant_name = "the most frequent state of each label" if task.is_multilabel else "the majority class"
    groups[_compare(compared, first.scores, constant)].append("the mean of train" if value else constant_name)
    for other in _choose_others(task, first, others):
        metric = task.metric if np.isfinite(other.scores[task.metric].interval.value) else compared
        groups[_compare(metric, first.scores, other.scores)].append(_name(other))
    return Verdict(_write_sentence(groups, numbers), tuple(_list_warnings(data, first, constant)))


def _choose_others(task: Task, first: ScoredModel, others: Sequence[ScoredModel]) -> list[ScoredModel]:
    """Return the frozen probe, if the model is not the probe itself, and the best of the other baselines."""
    sign = -1 if task.metric in LOWER_IS_BETTER else 1
    chosen = [other for other in others if other.kind == "probe" and first.kind == "finetuned"]
    baselines = [
        other
        for other in others
        if other.kind == "baseline" and other.name not in ("mean", "majority")
        and np.isfinite(other.scores[task.metric].interval.value)
    ]  # fmt: skip
    best = max(baselines, key=lambda other: sign * other.scores[task.metric].interval.value, default=None)
    return chosen if best is None else [*chosen, best]


def _name(model: ScoredModel) -> str:
    return NAMES.get(model.kind) or NAMES.get(model.name) or display_name(model.name)


def _compare(metric: str, ours: Mapping[str, Score], theirs: Mapping[str, Score]) -> str:
    """Return whether we are better, the same or worse, by the 95% interval of the paired difference."""
    difference = compute_paired_difference(metric, ours[metric], theirs[metric])
    low, high = (end if np.isfinite(end) else difference.value for end in (difference.low, difference.high))
    return "better" if low > 0 else "worse" if high < 0 else "same"


def _format_score(metric: str, score: Score) -> str:
    value, low, high = score.interval
    if not np.isfinite(value):
        return f"{metric_name(metric)} is undefined"
    between = f" [{format_value(metric, low, value)}, {format_value(metric, high, value)}]" if np.isfinite(low) else ""
    return f"{metric_name(metric)} {format_value(metric, value)}{between}"


def _describe_spreads(score: str, predicted_SM: np.ndarray, truth_M: np.ndarray, columns: Sequence[str]) -> list[str]:
    """Describe the score and the spread of predictions; equal measured values have neither."""
    equal = [bool(np.nanmin(column_M) == np.nanmax(column_M)) for column_M in np.atleast_2d(truth_M.T)]
    if not any(equal):
        return [
            score,
            f"predictions spread {compare_spreads(predicted_SM, truth_M):.0%} as wide as the measured values",
        ]
    if all(equal):
        return ["all measured values are equal" + (" within each target" if columns else ""), score]
    names = ", ".join(repr(name) for name, is_equal in zip(columns, equal, strict=True) if is_equal)
    spread = compare_spreads(predicted_SM, truth_M)
    return [
        f"all measured values of {names} are equal",
        score,
        f"predictions of the other targets spread {spread:.0%} as wide as their measured values",
    ]


def _write_sentence(groups: Mapping[str, Sequence[str]], numbers: Sequence[str]) -> str:
    """Write the verdict: what is predicted better, equally well and worse."""
    better, same, worse = (" and ".join(groups[name]) for name in ("better", "same", "worse"))
    inside = f" ({'; '.join(numbers)})"
    if better:
        rest = [f"no better than {same}" if same else "", f"worse than {worse}" if worse else ""]
        rest = " and ".join(filter(None, rest))
        return f"Predicts better than {better}{inside}{', but ' if rest else ''}{rest}."
    if same:
        return f"Predicts no better than {same}{inside}{f', and worse than {worse}' if worse else ''}."
    return f"Predicts worse than {worse}{inside}."


def compare_spreads(predicted_SM: np.ndarray, truth_M: np.ndarray) -> float:
    """Return the standard deviation of predictions as a share of that of the measured values, the mean over seeds.

    It is nan if all measured values are equal. Of several targets, it is the mean over those whose measured values
    differ, each from the proteins with a value.
    """
    if truth_M.ndim == 2:
        known_CM = np.isfinite(truth_M).T
        shares = [
            compare_spreads(predicted_SM[:, known, column], truth_M[known, column])
            for column, known in enumerate(known_CM)
        ]
        return float(np.mean([share for share in shares if np.isfinite(share)] or np.nan))
    measured = TargetScale.from_values(truth_M).spread
    spreads = [TargetScale.from_values(predicted_M).spread for predicted_M in predicted_SM]
    return float(np.mean(spreads)) / measured if measured else float("nan")


def _list_warnings(data: TaskData, first: ScoredModel, constant: Mapping[str, Score]) -> list[str]:
    """Return a warning for each sign that the predictions carry no information."""
    task, predicted_SM = data.task, first.fitted.test_SM
    truth_M = data.targets[data.target_rows("test")]
    if task.target == "value":
        return _warn_about_values(first, compare_spreads(predicted_SM, truth_M), len(truth_M))
    warnings = []
    if task.is_multilabel:
        called_SML = np.stack([p > t for p, t in zip(predicted_SM, first.fitted.thresholds, strict=True)])
        if len(truth_M) >= FEWEST_PREDICTIONS and (called_SML == called_SML[:, :1]).all():
            same = format_label_set(called_SML[0, 0], task.binary_labels) or "no label"
            warnings.append(f"The predictions have collapsed: all {len(truth_M)} test proteins get {same}.")
    elif len(np.unique(predicted_SM)) == 1 and len(truth_M) >= FEWEST_PREDICTIONS:
        label = task.labels[int(predicted_SM.flat[0])]
        warnings.append(f"The predictions have collapsed: all {len(truth_M)} test targets are predicted as {label!r}.")
    ours, theirs = first.scores[task.metric].interval.value, constant[task.metric].interval.value
    if ours <= theirs:
        found = f"{metric_name(task.metric)} {format_value(task.metric, ours)}"
        rival = (
            "the most frequent state of each label in train" if task.is_multilabel else "the majority class of train"
        )
        short = "those states" if task.is_multilabel else "majority class"
        warnings.append(
            f"Not better than {rival} ({found}, {short} {format_value(task.metric, theirs)}): do not rely on these "
            "predictions."
        )
    return warnings


def _warn_about_values(first: ScoredModel, spread: float, num_test: int) -> list[str]:
    warnings, r2 = [], first.scores["r2"].interval.value
    if spread < SMALLEST_SPREAD and num_test >= FEWEST_PREDICTIONS:
        warnings.append(
            f"The predictions have collapsed: they spread {spread:.0%} as wide as the measured values. "
            "Use the values only to rank proteins, if at all."
        )
    if r2 <= 0:
        warnings.append(
            f"R² is {format_value('r2', r2)}: the mean of the measured values predicts as well. Do not rely on these "
            "predictions."
        )
    return warnings


def evaluate_new_predictions(
    task: Task, summary: Mapping[str, Any], labels: Mapping[str, Any], noun: str = "proteins"
) -> Verdict:
    """Compare predictions of new proteins with the training labels.

    Args:
        task: The task.
        summary: {"count", "low", "high", "deviation"} of predicted values, or {"count", "classes": {label: count}}.
        labels: Description of the training labels, see `saved_probe.describe_labels`. Empty if unknown.
        noun: What was predicted: proteins, or pairs of them.

    Returns:
        The verdict, with a warning if the predictions have collapsed.
    """
    what = "residues" if task.level == "residue" else noun
    count, unit = summary["count"], f" {task.unit}" if task.unit else ""
    if not count:
        return Verdict("No proteins were predicted.")
    if task.is_multilabel:
        return _evaluate_labels(summary)
    if task.columns:
        return _evaluate_columns(summary, labels)
    if task.target == "class":
        return _evaluate_classes(summary, labels, what)
    low, high, wide = (f"{summary[name]:.4g}" for name in ("low", "high", "deviation"))
    sentence = f"Predicted {count:,} {what} between {low} and {high}{unit}"
    measured = labels.get("deviation", 0.0)
    if not measured or count < FEWEST_PREDICTIONS:
        return Verdict(f"{sentence}.")
    share = summary["deviation"] / measured
    sentence += f"; their standard deviation, {wide}, is {share:.0%} of that of the training labels ({measured:.4g})."
    if share >= SMALLEST_SPREAD:
        return Verdict(sentence)
    warning = (
        f"The predictions have collapsed: they spread {share:.0%} as wide as the training labels. Look at the scores "
        "of this model on test before you use them."
    )
    return Verdict(sentence, (warning,))


def _evaluate_labels(summary: Mapping[str, Any]) -> Verdict:
    """Describe the labels of new proteins, with a warning if all proteins get the same ones."""
    total, empty = summary["count"], summary["without"]
    most = sorted(summary["labels"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{label} {number / total:.0%}" for label, number in most[:5])
    sentence = f"Predicted {total:,} proteins: {shown}{' and others' if most[5:] else ''}; {empty:,} without a label."
    if summary["different"] > 1 or total < FEWEST_PREDICTIONS:
        return Verdict(sentence)
    warning = (
        f"All {total:,} proteins get the same labels. Look at the scores of this model on test before you use them."
    )
    return Verdict(sentence, (warning,))


def _evaluate_columns(summary: Mapping[str, Any], labels: Mapping[str, Any]) -> Verdict:
    """Describe several predicted values, with a warning for each target whose predictions have collapsed."""
    found = {name: (entry["low"], entry["high"]) for name, entry in summary["columns"].items()}
    shown = "; ".join(f"{name} between {low:.4g} and {high:.4g}" for name, (low, high) in found.items())
    sentence, known = f"Predicted {summary['count']:,} proteins: {shown}.", labels.get("columns", {})
    collapsed = [
        name
        for name, entry in summary["columns"].items()
        if entry["deviation"] < SMALLEST_SPREAD * known.get(name, {}).get("deviation", 0.0)
    ]
    if not collapsed or summary["count"] < FEWEST_PREDICTIONS:
        return Verdict(sentence)
    warning = (
        f"The predictions of {', '.join(collapsed)} have collapsed: they spread less than {SMALLEST_SPREAD:.0%} as "
    )
    warning += "wide as the training labels. Look at the scores of this model on test before you use them."
    return Verdict(sentence, (warning,))


def _evaluate_classes(summary: Mapping[str, Any], labels: Mapping[str, Any], what: str) -> Verdict:
    counts, total = summary["classes"], summary["count"]
    most = sorted(counts.items(), key=lambda item: -item[1])
    names = (repr(label) if label.isdigit() else label for label, _ in most)  # '1' 60% instead of 1 60%
    shown = ", ".join(f"{name} {number / total:.0%}" for name, (_, number) in zip(names, most[:5], strict=False))
    sentence = f"Predicted {total:,} {what}: {shown}{' and others' if most[5:] else ''}."
    known = len(labels.get("classes", {}))
    if len(counts) > 1 or total < FEWEST_PREDICTIONS or known < 2:
        return Verdict(sentence)
    warning = f"All {total:,} {what} are predicted as {most[0][0]!r}, one of {known} classes of the training labels."
    return Verdict(sentence, (f"{warning} Look at the scores of this model on test before you use the predictions.",))
