"""Uncertainty of a model's predictions: estimated on validation, stored with the model, and measured on test.

Classes have a temperature, where it helps on validation; values have conformal scores, from which intervals follow.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.tasks.calibration import CalibrationScores, Temperature, choose_temperature, score_calibration
from esm2kit.tasks.conformal import (
    ConformalScores,
    Coverage,
    choose_scores,
    compare_distributions,
    count_needed_proteins,
    measure_coverage,
    merge_seeds,
)
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Interval, nan_to_none, unpack_bits
from esm2kit.tasks.task_data import TaskData

# Coverages of the curve of found against nominal coverage.
CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))
DIFFERENT = 0.001  # p value below which two sets have different distributions
FEW_PROTEINS = 40  # of validation, below which its use for the choice of settings matters, see docs/measured.md
UNLIKELY = 0.025  # chance of a coverage below which the promise does not hold


@dataclass(frozen=True)
class Uncertainty:
    """What validation says about the predictions of one model.

    Args:
        temperature: of the class probabilities; None for values.
        intervals: scores for intervals of values, one for each value of a protein; empty for classes.
        out_of_fold: whether validation was cross-validation, by probes that were trained without the fold of each
            protein.
    """

    temperature: Temperature | None = None
    intervals: tuple[ConformalScores, ...] = ()
    out_of_fold: bool = False

    @property
    def divisor(self) -> float:
        """Number by which logits are divided before they become probabilities: the temperature, if it helps."""
        return self.temperature.value if self.temperature and self.temperature.helps else 1.0

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible data, for the metadata of a model."""
        return {
            "temperature": self.temperature and self.temperature._asdict(),
            "intervals": [scores.describe() for scores in self.intervals],
            "out_of_fold": self.out_of_fold,
        }

    @classmethod
    def from_description(cls, described: Mapping[str, Any] | None) -> Self | None:
        """Build the uncertainty from what `describe` returned; None for files of earlier versions."""
        if described is None:
            return None
        temperature, intervals = described["temperature"], described["intervals"]
        scores = tuple(map(ConformalScores.from_description, intervals))
        return cls(temperature and Temperature(**temperature), scores, described.get("out_of_fold", False))


def select_truth(data: TaskData, set_name: str) -> np.ndarray:
    """Return the scored targets of a set: (M,) or (M, C) values, (M,) classes, or (M, L) binary labels."""
    truth, bits = data.targets[data.target_rows(set_name)], len(data.task.binary_labels)
    return unpack_bits(truth, bits) if bits and not data.task.is_multilabel else truth


class ColumnValues(NamedTuple):
    """The measured and predicted values of one target of a set; a protein may have several.

    Args:
        truth_N: (N,) measured values.
        predicted_SN: (S, N) predictions.
        protein_N: (N,) protein of each value, numbered from 0.
        place_P: (P,) number of each of these proteins among all proteins of the set.
    """

    truth_N: np.ndarray
    predicted_SN: np.ndarray
    protein_N: np.ndarray
    place_P: np.ndarray

    @property
    def means_P(self) -> np.ndarray:
        """Mean of the measured values of each protein."""
        return np.bincount(self.protein_N, self.truth_N) / np.bincount(self.protein_N)


def split_columns(data: TaskData, set_name: str, predicted: np.ndarray) -> list[ColumnValues]:
    """Split values into those of each target, without the cells that were not measured.

    Args:
        data: The task.
        set_name: Name of the set.
        predicted: (S, M) predictions, or (S, M, C) of several values.

    Returns:
        One entry per target.
    """
    truth, protein_M = select_truth(data, set_name), number_proteins(data, set_name)
    columns = []
    for column in range(len(data.task.columns) or 1):
        where = (slice(None), column) if data.task.columns else slice(None)
        known_N = np.flatnonzero(np.isfinite(truth[where]))
        of_seeds = predicted[:, :, column] if data.task.columns else predicted
        place_P, protein_N = np.unique(protein_M[known_N], return_inverse=True)
        columns.append(ColumnValues(truth[where][known_N], of_seeds[:, known_N], protein_N.reshape(-1), place_P))
    return columns


def estimate_uncertainty(fitted: Fitted, data: TaskData, out_of_fold: bool = False) -> Uncertainty | None:
    """Estimate the uncertainty of a model from its predictions of the validation proteins.

    Args:
        fitted: Predictions of the model.
        data: The task.
        out_of_fold: Whether they are the out-of-fold predictions of a cross-validation.

    Returns:
        The uncertainty of the mean over seeds; None if the model has no probabilities, or did not predict validation.
    """
    truth, logits_MC = select_truth(data, "validation"), fitted.validation_logits_MC
    if data.task.target == "class":
        protein_M = number_proteins(data, "validation")
        if logits_MC is None:
            return None
        noun = "validation proteins"
        if out_of_fold:
            noun = f"{'proteins' if data.pairs is None else 'pairs'} of the cross-validation"
        return Uncertainty(choose_temperature(logits_MC, truth, protein_M, noun), out_of_fold=out_of_fold)
    if fitted.validation_SM.shape[1:] != truth.shape:
        return None
    columns = split_columns(data, "validation", fitted.validation_SM)
    scores = (choose_scores(each.truth_N, each.predicted_SN, each.protein_N) for each in columns)
    return Uncertainty(intervals=tuple(scores), out_of_fold=out_of_fold)


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
    sets = (split_columns(data, "validation", fitted.validation_SM), split_columns(data, "test", fitted.test_SM))
    pairs_RP = None if data.pairs is None else counts_RP
    found = [
        _describe_intervals(*each, data, coverage, pairs_RP) for each in zip(uncertainty.intervals, *sets, strict=True)
    ]
    if not data.task.columns:
        return found[0]
    columns = dict(zip(data.task.columns, found, strict=True))
    return {"columns": columns, "sentence": write_columns(columns, coverage)}


def describe_interval(interval: Interval) -> dict[str, float | None]:
    """Describe an interval as JSON-compatible data."""
    return {name: nan_to_none(end) for name, end in interval._asdict().items()}


def describe_scores(scores: CalibrationScores) -> dict[str, Any]:
    """Describe calibration scores as JSON-compatible data."""
    found = {name: describe_interval(getattr(scores, name)) for name in ("ece", "ece_equal_mass", "brier", "nll")}
    bins = [asdict(each) for each in scores.bins]
    return found | {"by_chance": scores.by_chance, "is_chance": bool(scores.is_chance), "bins": bins}


def describe_temperature(
    fit: Temperature, before: CalibrationScores, after: CalibrationScores | None
) -> dict[str, Any]:
    """Describe a temperature, and the calibration before and after it, as fields of a report."""
    return {
        "temperature": fit.value,
        "used": fit.helps,
        "gain": fit.gain and list(fit.gain),
        "num_validation": fit.num_proteins,
        "before": describe_scores(before),
        "after": after and describe_scores(after),
    }


def _describe_calibration(
    uncertainty: Uncertainty, logits_MC: np.ndarray, data: TaskData, counts_RP: np.ndarray
) -> dict[str, Any]:
    """Describe the calibration of test probabilities before and after division of the logits by the temperature."""
    fit = uncertainty.temperature
    inputs = (logits_MC, select_truth(data, "test"), number_proteins(data), counts_RP)
    before = score_calibration(*inputs)
    after = None if fit.value is None else score_calibration(*inputs, fit.value)
    return describe_temperature(fit, before, after) | {"sentence": _write_calibration(fit, before, after)}


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
    scores: ConformalScores,
    validation: ColumnValues,
    test: ColumnValues,
    data: TaskData,
    coverage: float,
    pairs_RP: np.ndarray | None,
) -> dict[str, Any]:
    """Describe the coverage of the intervals of one target on test; of pairs with their bootstrap counts (R, P)."""
    mean_N, spread_N = merge_seeds(test.predicted_SN)
    counts_RP = None if pairs_RP is None else pairs_RP[:, test.place_P]

    def measure(nominal: float) -> Coverage:
        half_N = scores.half_widths(nominal, spread_N)
        number = scores.num_proteins
        return measure_coverage(test.truth_N, mean_N, half_N, test.protein_N, nominal, number, counts_RP)

    found = measure(coverage)
    points = [(nominal, measure(nominal)) for nominal in CURVE]
    doubt = _find_doubt(data, validation, test, found.chance)
    about = {
        "num_validation": scores.num_proteins,
        "num_test": int(test.protein_N.max()) + 1,
        "num_seeds": len(test.predicted_SN),
    }
    sentence = _write_coverage(data, about | found._asdict(), doubt)
    return about | {
        "coverage": coverage,
        "found": describe_interval(found.found),
        "mean_width": nan_to_none(found.mean_width),
        "quantile": nan_to_none(scores.quantile(coverage)),
        "by_spread": scores.by_spread,
        "offset": scores.offset,
        "holds": not doubt,
        "curve": [[nominal, point.found.value, nan_to_none(point.mean_width)] for nominal, point in points],
        "sentence": sentence,
    }


def _find_doubt(data: TaskData, validation: ColumnValues, test: ColumnValues, chance: float | None) -> str:
    """Return why the promise does not hold on test, as a clause; empty if nothing speaks against it."""
    if data.task.name in TASKS and ("_vs_" in data.split or data.split in ("des_mut", "mut_des")):
        return f"the split {data.split} makes test proteins different from those of train and validation"
    p = compare_distributions(validation.means_P, test.means_P)
    if p < DIFFERENT:
        return (
            "the measured values of test are distributed differently from those of validation (Kolmogorov-Smirnov "
            f"test, p = {p:.1g})"
        )
    if chance is not None and chance < UNLIKELY:
        return f"so low a coverage has a probability of {chance:.2g} for proteins like those of validation"
    return ""


def write_columns(columns: Mapping[str, Mapping[str, Any]], coverage: float, which: str = "test") -> str:
    """Write the coverage of several targets, and for which the promise does not hold.

    Args:
        columns: Target -> its entry in `ReportRow.uncertainty`.
        coverage: Coverage of the intervals.
        which: What was predicted: "test", or "out-of-fold".

    Returns:
        The sentences.
    """
    ended = [name for name, found in columns.items() if found["mean_width"] is not None]
    order = sorted(ended, key=lambda name: columns[name]["found"]["value"])
    shares = [f"{columns[name]['found']['value']:.1%} ({name})" for name in order]
    values = "measured test values" if which == "test" else "measured values of the fold that is left out"
    text = ""
    if len(order) == 1:
        text = f"The {coverage:.0%} intervals contain {shares[0]} of the {values}."
    elif order:
        text = f"The {coverage:.0%} intervals contain between {shares[0]} and {shares[-1]} of the {values}."
    wrong = [name for name, found in columns.items() if not found["holds"]]
    endless = [name for name, found in columns.items() if found["mean_width"] is None]
    where = "for this test set" if which == "test" else "for every fold"
    text += f" The promise does not hold {where} in {', '.join(wrong)}." if wrong else ""
    few = "validation proteins" if which == "test" else "proteins in the other folds"
    text += f" Too few {few}, so that intervals have no ends: {', '.join(endless)}." if endless else ""
    return text.strip()


def _write_coverage(data: TaskData, found: Mapping[str, Any], doubt: str) -> str:
    """Write the coverage on test, and whether the promise holds there."""
    nominal, share, number = found["nominal"], found["found"], found["num_validation"]
    noun = "proteins" if data.pairs is None else "pairs"
    unit = f" {data.task.unit}" if data.task.unit else ""
    if math.isinf(found["mean_width"]):
        return (
            f"The {nominal:.0%} intervals have no ends: {number} validation {noun} are too few (at least "
            f"{count_needed_proteins(nominal)})."
        )
    text = (
        f"The {nominal:.0%} intervals contain {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of the measured "
        f"values of {found['num_test']} test {noun}; their mean width is {found['mean_width']:.4g}{unit}."
    )
    if doubt:
        return f"{text} The promise of {nominal:.0%} does not hold for this test set: {doubt}."
    text = f"{text} {nominal:.0%} are promised for {noun} like the {number} validation {noun}."
    if number >= FEW_PROTEINS:
        return text
    return f"{text} These also chose the settings of the model; as they are few, expect up to 3 percentage points less."


def compute_ends(
    uncertainty: Uncertainty | None, predicted_MC: np.ndarray, spread_MC: np.ndarray | None, coverage: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the lower and upper ends of the intervals of predicted values.

    Args:
        uncertainty: That of the model.
        predicted_MC: (M, C) predictions of C targets.
        spread_MC: (M, C) standard deviation over seeds, None for a single seed.
        coverage: Share of new values that the intervals should contain.

    Returns:
        The ends (M, C), infinite if there were too few validation proteins; None for a model that has no intervals.
    """
    if uncertainty is None or not uncertainty.intervals:
        return None
    spread_MC = np.zeros_like(predicted_MC) if spread_MC is None else spread_MC
    halves = [
        scores.half_widths(coverage, spread_M)
        for scores, spread_M in zip(uncertainty.intervals, spread_MC.T, strict=True)
    ]
    half_MC = np.stack(halves, axis=1)
    return predicted_MC - half_MC, predicted_MC + half_MC


def describe_prediction(uncertainty: Uncertainty | None, target: str, coverage: float, noun: str = "proteins") -> str:
    """Describe in one sentence what the intervals or the probabilities of predictions mean.

    Args:
        uncertainty: That of the model; None for a file of an earlier version.
        target: "class" or "value".
        coverage: Share of new values that the intervals should contain.
        noun: What is predicted: proteins, or pairs of them.

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
    proteins = "proteins of the cross-validation" if uncertainty.out_of_fold else f"validation {noun}"
    smallest = min(uncertainty.intervals, key=lambda scores: scores.num_proteins)
    if math.isinf(smallest.quantile(coverage)):
        most = smallest.num_proteins / (smallest.num_proteins + 1)
        which = "The intervals" if len(uncertainty.intervals) == 1 else "Some intervals"
        return (
            f"{which} have no ends: {smallest.num_proteins} {proteins} are too few for a coverage of "
            f"{coverage:.3g} (at least {count_needed_proteins(coverage)}). Choose a --coverage of at most "
            f"{math.floor(most * 1000) / 1000:g}."
        )
    varying = sum(scores.by_spread for scores in uncertainty.intervals)
    width = "wider where the seeds disagree" if varying else "all of the same width"
    if 0 < varying < len(uncertainty.intervals) or len(uncertainty.intervals) > 1:
        width = f"wider where the seeds disagree for {varying} of {len(uncertainty.intervals)} targets"
    proteins = (
        "proteins of the cross-validation, whose errors are those of probes trained without them"
        if uncertainty.out_of_fold
        else f"validation {noun} of the training"
    )
    return (
        f"The intervals (lower, upper) contain {100 * coverage:.4g}% of new values on average, for {noun} like the "
        f"{smallest.num_proteins} {proteins}; they are {width}."
    )


def keep_first_seed(fitted: Fitted) -> Fitted:
    """Return the predictions of the first seed, for models that predict with one seed at a time."""
    return fitted._replace(test_SM=fitted.test_SM[:1], validation_SM=fitted.validation_SM[:1])
