"""Uncertainty of a model's predictions: estimated on validation, stored with the model, and measured on test.

Classes have a temperature, where it helps on validation; values have conformal scores, from which intervals follow.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.tasks.calibration import CalibrationScores, Temperature, choose_temperature, score_calibration
from esm2kit.tasks.conformal import (
    ConformalScores,
    choose_scores,
    compare_distributions,
    count_needed_proteins,
    measure_coverage,
    merge_seeds,
)
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Interval, nan_to_none, unpack_bits

# Coverages of the curve of found against nominal coverage.
CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))
DIFFERENT = 0.001  # p value below which two sets have different distributions
UNLIKELY = 0.025  # chance of a coverage below which the promise does not hold


@dataclass(frozen=True)
class Uncertainty:
    """What validation says about the predictions of one model.

    Args:
        temperature: of the class probabilities; None for values.
        intervals: scores for intervals of values; None for classes.
    """

    temperature: Temperature | None = None
    intervals: ConformalScores | None = None

    @property
    def divisor(self) -> float:
        """Number by which logits are divided before they become probabilities: the temperature, if it helps."""
        return self.temperature.value if self.temperature and self.temperature.helps else 1.0

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible data, for the metadata of a model."""
        return {
            "temperature": self.temperature and self.temperature._asdict(),
            "intervals": self.intervals and self.intervals.describe(),
        }

    @classmethod
    def from_description(cls, described: Mapping[str, Any] | None) -> Self | None:
        """Build the uncertainty from what `describe` returned; None for files of earlier versions."""
        if described is None:
            return None
        temperature, intervals = described["temperature"], described["intervals"]
        return cls(
            temperature and Temperature(**temperature), intervals and ConformalScores.from_description(intervals)
        )


def select_truth(data: TaskData, set_name: str) -> np.ndarray:
    """Return the scored targets of a set: (M,) values or classes, or (M, L) binary labels."""
    truth_M, bits = data.targets[data.target_rows(set_name)], len(data.task.binary_labels)
    return unpack_bits(truth_M, bits) if bits else truth_M


def estimate_uncertainty(fitted: Fitted, data: TaskData) -> Uncertainty | None:
    """Estimate the uncertainty of a model from its predictions of the validation proteins.

    Args:
        fitted: Predictions of the model.
        data: The task.

    Returns:
        The uncertainty of the mean over seeds; None if the model has no probabilities, or did not predict validation,
        and for several targets per protein.
    """
    if data.task.has_columns:  # one temperature, or one interval, for all targets would promise nothing about each
        return None
    truth = select_truth(data, "validation")
    protein_M = number_proteins(data, "validation")
    if data.task.target == "class":
        logits_MC = fitted.validation_logits_MC
        return None if logits_MC is None else Uncertainty(choose_temperature(logits_MC, truth, protein_M))
    if fitted.validation_SM.shape[1:] != truth.shape:
        return None
    return Uncertainty(intervals=choose_scores(truth, fitted.validation_SM, protein_M))


def describe_test_uncertainty(fitted: Fitted, data: TaskData, counts_RP: np.ndarray, coverage: float) -> dict[str, Any]:
    """Measure on test what validation promised.

    Args:
        fitted: Predictions of the model.
        data: The task.
        counts_RP: Bootstrap counts of the test proteins.
        coverage: Coverage of the intervals of values.

    Returns:
        The field `uncertainty` of a report's row; empty if there is none.
    """
    uncertainty = estimate_uncertainty(fitted, data)
    if uncertainty is None:
        return {}
    if uncertainty.temperature is not None:
        return _describe_calibration(uncertainty, fitted.test_logits_MC, data, counts_RP)
    return _describe_intervals(uncertainty.intervals, fitted.test_SM, data, coverage)


def _describe_interval(interval: Interval) -> dict[str, float | None]:
    return {name: nan_to_none(end) for name, end in interval._asdict().items()}


def _describe_scores(scores: CalibrationScores) -> dict[str, Any]:
    found = {name: _describe_interval(getattr(scores, name)) for name in ("ece", "ece_equal_mass", "brier", "nll")}
    bins = [asdict(each) for each in scores.bins]
    return found | {"by_chance": scores.by_chance, "is_chance": bool(scores.is_chance), "bins": bins}


def _describe_calibration(
    uncertainty: Uncertainty, logits_MC: np.ndarray, data: TaskData, counts_RP: np.ndarray
) -> dict[str, Any]:
    """Describe the calibration of test probabilities before and after division of the logits by the temperature."""
    fit = uncertainty.temperature
    inputs = (logits_MC, select_truth(data, "test"), number_proteins(data), counts_RP)
    before = score_calibration(*inputs)
    after = None if fit.value is None else score_calibration(*inputs, fit.value)
    return {
        "temperature": fit.value,
        "used": fit.helps,
        "gain": fit.gain and list(fit.gain),
        "num_validation": fit.num_proteins,
        "before": _describe_scores(before),
        "after": after and _describe_scores(after),
        "sentence": _write_calibration(fit, before, after),
    }


def _write_calibration(fit: Temperature, before: CalibrationScores, after: CalibrationScores | None) -> str:
    """Write the calibration error on test, and whether probabilities are scaled."""
    low, high = before.ece.low, before.ece.high
    text = f"Expected calibration error on test: {before.ece.value:.3f} [{low:.3f}, {high:.3f}]"
    text += f"; calibrated probabilities would have {before.by_chance:.3f} by chance on as many proteins"
    if fit.value is None:
        return f"{text}. The probabilities are left as they are: {fit.reason}."
    if not fit.helps:
        return f"{text}. The probabilities are left without the temperature of {fit.value:.3g}: {fit.reason}."
    return (
        f"{text}. With a temperature of {fit.value:.3g} it is {after.ece.value:.3f} [{after.ece.low:.3f}, "
        f"{after.ece.high:.3f}]. esm2kit predict uses this temperature: {fit.reason}."
    )


def _describe_intervals(
    scores: ConformalScores, predicted_SM: np.ndarray, data: TaskData, coverage: float
) -> dict[str, Any]:
    """Describe the coverage of the intervals on test."""
    truth_M, protein_M = select_truth(data, "test"), number_proteins(data)
    mean_M, spread_M = merge_seeds(predicted_SM)

    def measure(nominal: float) -> Any:
        half_M = scores.half_widths(nominal, spread_M)
        return measure_coverage(truth_M, mean_M, half_M, protein_M, nominal, scores.num_proteins)

    found = measure(coverage)
    points = [(nominal, measure(nominal)) for nominal in CURVE]
    doubt = _find_doubt(data, found.chance)
    about = {
        "num_validation": scores.num_proteins,
        "num_test": int(protein_M.max()) + 1,
        "num_seeds": len(predicted_SM),
    }
    sentence = _write_coverage(data, about | found._asdict(), doubt)
    return about | {
        "coverage": coverage,
        "found": _describe_interval(found.found),
        "mean_width": nan_to_none(found.mean_width),
        "quantile": nan_to_none(scores.quantile(coverage)),
        "by_spread": scores.by_spread,
        "offset": scores.offset,
        "holds": not doubt,
        "curve": [[nominal, point.found.value, nan_to_none(point.mean_width)] for nominal, point in points],
        "sentence": sentence,
    }


def _find_doubt(data: TaskData, chance: float | None) -> str:
    """Return why the promise does not hold on test, as a clause; empty if nothing speaks against it."""
    if data.task.name in TASKS and ("_vs_" in data.split or data.split in ("des_mut", "mut_des")):
        return f"the split {data.split} makes test proteins different from those of train and validation"
    validation, test = (_average_proteins(data, name) for name in ("validation", "test"))
    p = compare_distributions(validation, test)
    if p < DIFFERENT:
        return (
            "the measured values of test are distributed differently from those of validation (Kolmogorov-Smirnov "
            f"test, p = {p:.1g})"
        )
    if chance is not None and chance < UNLIKELY:
        return f"so low a coverage has a probability of {chance:.2g} for proteins like those of validation"
    return ""


def _average_proteins(data: TaskData, set_name: str) -> np.ndarray:
    """Return the mean of the scored values of each protein of a set."""
    protein_M = number_proteins(data, set_name)
    sums_P = np.bincount(protein_M, data.targets[data.target_rows(set_name)])
    return sums_P / np.bincount(protein_M)


def _write_coverage(data: TaskData, found: Mapping[str, Any], doubt: str) -> str:
    """Write the coverage on test, and whether the promise holds there."""
    nominal, share, number = found["nominal"], found["found"], found["num_validation"]
    unit = f" {data.task.unit}" if data.task.unit else ""
    if math.isinf(found["mean_width"]):
        return (
            f"The {nominal:.0%} intervals have no ends: {number} validation proteins are too few (at least "
            f"{count_needed_proteins(nominal)})."
        )
    text = (
        f"The {nominal:.0%} intervals contain {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of the measured "
        f"values of {found['num_test']} test proteins; their mean width is {found['mean_width']:.4g}{unit}."
    )
    if doubt:
        return f"{text} The promise of {nominal:.0%} does not hold for this test set: {doubt}."
    return f"{text} {nominal:.0%} are promised for proteins like the {number} validation proteins."


def compute_ends(
    uncertainty: Uncertainty | None, predicted_M: np.ndarray, spread_M: np.ndarray | None, coverage: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the lower and upper ends of the intervals of predicted values.

    Args:
        uncertainty: That of the model.
        predicted_M: (M,) predictions.
        spread_M: (M,) standard deviation over seeds, None for a single seed.
        coverage: Share of new values that the intervals should contain.

    Returns:
        The ends, infinite if there were too few validation proteins; None for a model that has no intervals.
    """
    if uncertainty is None or uncertainty.intervals is None:
        return None
    half_M = uncertainty.intervals.half_widths(coverage, np.zeros_like(predicted_M) if spread_M is None else spread_M)
    return predicted_M - half_M, predicted_M + half_M


def describe_prediction(uncertainty: Uncertainty | None, target: str, coverage: float) -> str:
    """Describe in one sentence what the intervals or the probabilities of predictions mean.

    Args:
        uncertainty: That of the model; None for a file of an earlier version.
        target: "class" or "value".
        coverage: Share of new values that the intervals should contain.

    Returns:
        The sentence.
    """
    if uncertainty is None:
        what = "The probabilities are not calibrated" if target == "class" else "The predictions have no intervals"
        return f"{what}: an earlier version wrote this model. Train it again to add them."
    if target == "class":
        fit = uncertainty.temperature
        if fit.helps:
            return f"The probabilities are calibrated with a temperature of {fit.value:.3g}: {fit.reason}."
        return f"The probabilities are those of the model, without a temperature: {fit.reason}."
    scores = uncertainty.intervals
    if math.isinf(scores.quantile(coverage)):
        most = scores.num_proteins / (scores.num_proteins + 1)
        return (
            f"The intervals have no ends: {scores.num_proteins} validation proteins are too few for a coverage of "
            f"{coverage:.3g} (at least {count_needed_proteins(coverage)}). Choose a --coverage of at most "
            f"{math.floor(most * 1000) / 1000:g}."
        )
    width = "wider where the seeds disagree" if scores.by_spread else "all of the same width"
    return (
        f"The intervals (lower, upper) contain {coverage:.3g} of new values on average, for proteins like the "
        f"{scores.num_proteins} validation proteins of the training; they are {width}."
    )


def keep_first_seed(fitted: Fitted) -> Fitted:
    """Return the predictions of the first seed, for models that predict with one seed at a time."""
    return fitted._replace(test_SM=fitted.test_SM[:1], validation_SM=fitted.validation_SM[:1])
