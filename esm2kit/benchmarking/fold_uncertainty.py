"""Uncertainty of out-of-fold predictions: each fold is checked with what the other folds say about it.

`esm2kit predict` uses the errors, or the temperature, of all folds together (`estimate_uncertainty`). Here each protein
has an interval, or a temperature, from the folds of the others, so that its own error has no part in it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from esm2kit.benchmarking.fold_scores import FoldArrays, widen_score
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.benchmarking.uncertainty import (
    CURVE,
    DIFFERENT,
    ColumnValues,
    Uncertainty,
    describe_interval,
    describe_temperature,
    estimate_uncertainty,
    select_truth,
    split_columns,
    write_columns,
)
from esm2kit.tasks.calibration import fit_temperature, score_calibration
from esm2kit.tasks.conformal import (
    ConformalScores,
    choose_scores,
    compute_binomial_interval,
    count_needed_proteins,
    merge_seeds,
)
from esm2kit.tasks.metrics import Interval, Score, compute_interval, nan_to_none
from esm2kit.tasks.task_data import TaskData


def describe_fold_uncertainty(
    held: Fitted, data: TaskData, folds: FoldArrays, counts_RG: np.ndarray, coverage: float
) -> dict[str, Any]:
    """Describe the calibration, or the intervals, of out-of-fold predictions.

    Args:
        held: Predictions of the first repeat as those of validation.
        data: The task with all proteins in validation.
        folds: Groups and folds of the targets.
        counts_RG: Bootstrap counts of the groups.
        coverage: Coverage of the intervals of values.

    Returns:
        The field `uncertainty` of a report's row; empty if there is none.
    """
    uncertainty = estimate_uncertainty(held, data, out_of_fold=True)
    if uncertainty is None:
        return {}
    fold_M, group_M = folds.fold_RM[0], folds.group_M
    if uncertainty.temperature is not None:
        return _describe_calibration(uncertainty, held.validation_logits_MC, data, fold_M, group_M, counts_RG)
    first_P = np.unique(number_proteins(data, "validation"), return_index=True)[1]
    columns = split_columns(data, "validation", held.validation_SM)
    found, widening = [], folds.compute_widening() * folds.compute_expansion()
    for scores, column in zip(uncertainty.intervals, columns, strict=True):
        fold_P, group_P = (each[first_P][column.place_P] for each in (fold_M, group_M))
        found.append(_describe_intervals(scores, column, data, fold_P, group_P, counts_RG, coverage, widening))
    if not data.task.columns:
        return found[0]
    named = dict(zip(data.task.columns, found, strict=True))
    return {"columns": named, "sentence": write_columns(named, coverage, "out-of-fold"), "out_of_fold": True}


def _describe_calibration(
    uncertainty: Uncertainty,
    logits_MC: np.ndarray,
    data: TaskData,
    fold_M: np.ndarray,
    group_M: np.ndarray,
    counts_RG: np.ndarray,
) -> dict[str, Any]:
    """Describe the calibration of out-of-fold probabilities before and after the temperature of the other folds."""
    fit, truth = uncertainty.temperature, select_truth(data, "validation")
    before, after = score_calibration(logits_MC, truth, group_M, counts_RG), None
    if fit.value is not None:
        scaled_MC = np.empty(logits_MC.shape)
        for fold in np.unique(fold_M):
            held = fold_M == fold
            scaled_MC[held] = logits_MC[held] / fit_temperature(logits_MC[~held], truth[~held])
        after = score_calibration(scaled_MC, truth, group_M, counts_RG)
    low, high = before.ece.low, before.ece.high
    text = f"Expected calibration error of the out-of-fold predictions: {before.ece.value:.3f} [{low:.3f}, {high:.3f}]"
    text += f"; calibrated probabilities would have {before.by_chance:.3f} by chance on as many proteins."
    if after is not None:
        ends = f"[{after.ece.low:.3f}, {after.ece.high:.3f}]"
        text += f" With the temperature of the other folds it is {after.ece.value:.3f} {ends}."
    if fit.helps:
        text += f" esm2kit predict uses the temperature of all folds, {fit.value:.3g}: {fit.reason}."
    else:
        text += f" The probabilities are left as they are: {fit.reason}."
    return describe_temperature(fit, before, after) | {"sentence": text, "out_of_fold": True}


def _describe_intervals(
    scores: ConformalScores,
    column: ColumnValues,
    data: TaskData,
    fold_P: np.ndarray,
    group_P: np.ndarray,
    counts_RG: np.ndarray,
    coverage: float,
    widening: float,
) -> dict[str, Any]:
    """Describe the coverage of intervals of which each comes from the errors in the other folds."""
    mean_N, spread_N = merge_seeds(column.predicted_SN)
    fold_N, error_N = fold_P[column.protein_N], np.abs(column.truth_N - mean_N)
    scores_of = {}
    for fold in np.unique(fold_N).tolist():
        other_N = fold_N != fold
        inputs = (column.truth_N[other_N], column.predicted_SN[:, other_N], column.protein_N[other_N])
        scores_of[fold] = choose_scores(*inputs)

    def choose_halves(nominal: float) -> np.ndarray:
        half_N = np.empty(len(fold_N))
        for fold, own in scores_of.items():
            half_N[fold_N == fold] = own.half_widths(nominal, spread_N[fold_N == fold])
        return half_N

    half_N = choose_halves(coverage)
    counts_RP, inside_N = counts_RG[:, group_P], error_N <= half_N
    curve = []
    for nominal in CURVE:
        nominal_N = choose_halves(nominal)
        share = float(_average_proteins(error_N <= nominal_N, column.protein_N).mean())
        curve.append([nominal, share, nan_to_none(2 * float(nominal_N.mean()))])
    width_N = spread_N + scores.offset if scores.by_spread else np.ones(len(error_N))
    p = compare_folds(error_N / width_N, fold_N, group_P[column.protein_N])
    about = {
        "num_validation": scores.num_proteins,
        "num_test": len(fold_P),
        "num_seeds": len(column.predicted_SN),
        "coverage": coverage,
        "found": describe_interval(_measure_share(inside_N, column.protein_N, counts_RP, group_P, widening)),
        "mean_width": nan_to_none(2 * float(half_N.mean())),
        "quantile": nan_to_none(scores.quantile(coverage)),
        "by_spread": scores.by_spread,
        "offset": scores.offset,
        "holds": not p < DIFFERENT,
        "curve": curve,
        "out_of_fold": True,
        "inside": [float(inside_N[fold_N == fold].mean()) for fold in scores_of],
    }
    return about | {"sentence": _write_coverage(about, data, p)}


def _average_proteins(inside_N: np.ndarray, protein_N: np.ndarray) -> np.ndarray:
    """Return the share of each protein's values (P,) that is inside its intervals."""
    return np.bincount(protein_N, inside_N) / np.bincount(protein_N)


def _measure_share(
    inside_N: np.ndarray, protein_N: np.ndarray, counts_RP: np.ndarray, group_P: np.ndarray, widening: float
) -> Interval:
    """Return the share of values inside their intervals, every protein once, with a 95% interval.

    It is that of the scores: a bootstrap over groups, widened for other training sets and for few groups.
    """
    share_P, total_R = _average_proteins(inside_N, protein_N), counts_RP.sum(axis=1)
    replicates, value = (counts_RP @ share_P)[total_R > 0] / total_R[total_R > 0], float(share_P.mean())
    if np.ptp(replicates) == 0:  # all values, or none
        number = len(np.unique(group_P))
        return compute_binomial_interval(round(value * number), number)
    score = Score(compute_interval(value, replicates), (value,), replicates, len(share_P))
    return widen_score("accuracy", score, widening).interval


def compare_folds(error_N: np.ndarray, fold_N: np.ndarray, group_N: np.ndarray) -> float:
    """Return the p value of the Kruskal-Wallis test that errors have one distribution in all folds.

    Args:
        error_N: Errors.
        fold_N: Fold of each.
        group_N: Group of each. The errors of a group depend on each other, so its mean is compared.

    Returns:
        The p value; nan for a single fold, or for errors that are all equal.
    """
    from scipy.stats import kruskal

    first_G, place_N = np.unique(group_N, return_index=True, return_inverse=True)[1:]
    mean_G = np.bincount(place_N, error_N) / np.bincount(place_N)
    parts = [mean_G[fold_N[first_G] == fold] for fold in np.unique(fold_N)]
    if len(parts) < 2 or np.ptp(mean_G) == 0:
        return math.nan
    return float(kruskal(*parts).pvalue)


def _write_coverage(found: Mapping[str, Any], data: TaskData, p: float) -> str:
    """Write the coverage in the folds, and whether all folds have such errors."""
    share, number, nominal = found["found"], found["num_validation"], f"{found['coverage']:.0%}"
    noun, unit = "proteins" if data.pairs is None else "pairs", f" {data.task.unit}" if data.task.unit else ""
    needed = count_needed_proteins(found["coverage"])
    if found["quantile"] is None:
        return f"The {nominal} intervals have no ends: {number} {noun} are too few (at least {needed})."
    if found["mean_width"] is None:
        return (
            f"The {nominal} intervals of esm2kit predict come from the errors of all {number} {noun}. Their coverage "
            f"was not checked, because the other folds of a fold have fewer than {needed} {noun}."
        )
    text = (
        f"The {nominal} intervals, each from the errors in the other folds, contain {share['value']:.1%} "
        f"[{share['low']:.1%}, {share['high']:.1%}] of the measured values of {number} {noun} "
        f"({min(found['inside']):.0%} to {max(found['inside']):.0%} in a fold); their mean width is "
        f"{found['mean_width']:.4g}{unit}."
    )
    if not found["holds"]:
        return (
            f"{text} The promise of {nominal} does not hold for every fold: their errors are distributed differently "
            f"(Kruskal-Wallis test, p = {p:.1g})."
        )
    text += " esm2kit predict uses the errors of all folds."
    return f"{text} {nominal} are expected, but not proved, for {noun} like these."
