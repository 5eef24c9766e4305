"""Scores of out-of-fold predictions, with intervals over groups of proteins and over training sets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from esm2kit.benchmarking.scores import Scorer, SeveralTargets
from esm2kit.tasks.column_metrics import SEPARATOR, build_column_scorer
from esm2kit.tasks.label_metrics import LABEL_METRICS
from esm2kit.tasks.metrics import CONFIDENCE, Interval, Score, build_value_scorer, compute_interval, score_seeds

# A correlation compares predictions with each other. Those of two folds come from two models, so it is the mean over
# folds; the other metrics are computed from all predictions together.
WITHIN_FOLDS = ("spearman", "pearson", "ndcg")
FEWEST_TARGETS = 5  # in every fold, for correlations within folds
LARGEST = 1 - 1e-12  # correlation whose scale is finite
LEAST = 1e-6  # error of a replicate, relative to that of all predictions
# Metrics as numbers without limits, on which intervals are symmetric, and the way back.
CORRELATION = (lambda x: np.arctanh(np.clip(x, -LARGEST, LARGEST)), np.tanh)
SCALES: dict[str, tuple[Callable, Callable]] = {
    "spearman": CORRELATION, "pearson": CORRELATION, "mcc": CORRELATION, "rmse": (np.log, np.exp),
}  # fmt: skip
# Other metrics have the scale of their own; the ends of their intervals are within these limits.
SHARES = (
    "accuracy",
    "balanced_accuracy",
    "ndcg",
    "binary_ap",
    "binary_auroc",
    *(name for name in LABEL_METRICS if name != "mcc"),
)
LIMITS = dict.fromkeys(SHARES, (0.0, 1.0)) | {"r2": (-math.inf, 1.0)}


class FoldArrays(NamedTuple):
    """The groups and the folds of predicted targets.

    Args:
        group_M: (M,) group of each target, numbered from 0.
        fold_RM: (R, M) fold of each target in each repeat, numbered from 0.
    """

    group_M: np.ndarray
    fold_RM: np.ndarray

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.group_M.max()) + 1

    def compute_widening(self) -> float:
        """Compute the factor by which bootstrap intervals of out-of-fold predictions are widened.

        The bootstrap resamples the predicted proteins and keeps the models. Its variance is about s^2 / K for K folds
        whose scores have the variance s^2. The scores of the folds are correlated, because their training sets overlap
        and each protein is used for training and for testing. Nadeau and Bengio replace 1 / K by 1 / K + n_test /
        n_train. The factor is the square root of the ratio: about 1.5 for 5 folds, and 1.45 for 10.

        Returns:
            The factor.

        Source:
            Nadeau and Bengio 2003, 10.1023/A:1024068626366.
        """
        ratios = []
        for fold_M in self.fold_RM:
            count_K = np.bincount(np.unique(np.stack([fold_M, self.group_M]), axis=1)[0])
            count_K = count_K[count_K > 0]
            ratios.append(len(count_K) * np.mean(count_K / (count_K.sum() - count_K)))
        return math.sqrt(1 + float(np.mean(ratios)))

    def compute_expansion(self) -> float:
        """Compute the factor by which bootstrap intervals are expanded because there are few groups.

        The variance of the replicates of a mean over G groups is (G - 1) / G of the unbiased estimate, and the normal
        quantile takes no account of its error. A t interval does both: it is sqrt(G / (G - 1)) t / z times as wide,
        with the 97.5th percentiles t of Student's distribution with G - 1 degrees of freedom and z of the normal one.
        The factor is 1.06 for 30 groups, and 1.01 for 200.

        Returns:
            The factor.

        Source:
            The expanded percentile interval of Hesterberg 2015, 10.1080/00031305.2015.1089789.
        """
        from scipy.stats import norm, t  # slow import

        upper = (1 + CONFIDENCE) / 2
        freedom = self.num_groups - 1
        return math.sqrt(self.num_groups / freedom) * float(t.ppf(upper, freedom) / norm.ppf(upper))


def average_within_folds(
    scorer: Scorer, truth_M: np.ndarray, predicted_M: np.ndarray, group_M: np.ndarray, fold_M: np.ndarray
) -> Scorer:
    """Replace the correlations of a scorer by their means over folds, weighted by the number of targets.

    Folds in which a correlation is undefined do not count. If a fold has too few targets, correlations are those of all
    predictions together, and undefined if the predictions of each fold are constant: a constant that is the mean of
    the other folds is the lower, the higher the values of its own fold are.

    Args:
        scorer: Scores all predictions together.
        truth_M: (M,) values.
        predicted_M: (M,) predicted values.
        group_M: (M,) group of each target.
        fold_M: (M,) fold of each target.

    Returns:
        A function from bootstrap counts (R, G) to metrics.
    """
    members = [np.flatnonzero(fold_M == fold) for fold in np.unique(fold_M)]
    if all(np.ptp(predicted_M[rows]) == 0 for rows in members):

        def mask(counts_RG: np.ndarray) -> dict[str, np.ndarray]:
            undefined = np.full(len(counts_RG), np.nan)
            return scorer(counts_RG) | dict.fromkeys(WITHIN_FOLDS, undefined)

        return mask
    if min(map(len, members)) < FEWEST_TARGETS:
        return scorer
    scorers = [build_value_scorer(truth_M[rows], predicted_M[rows], group_M[rows]) for rows in members]
    weight_K1 = np.array([[len(rows)] for rows in members], dtype=np.float64)

    def score(counts_RG: np.ndarray) -> dict[str, np.ndarray]:
        found = dict(scorer(counts_RG))
        with np.errstate(invalid="ignore", divide="ignore"):  # a replicate may have no protein of a fold
            parts = [each(counts_RG) for each in scorers]
        for name in WITHIN_FOLDS:
            value_KR = np.stack([part[name] for part in parts])
            defined_KR = np.isfinite(value_KR) * weight_K1
            total_R = defined_KR.sum(axis=0)
            summed_R = (np.where(defined_KR > 0, value_KR, 0.0) * defined_KR).sum(axis=0)
            found[name] = np.divide(summed_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)
        return found

    return score


def spread_thresholds(thresholds: Sequence[float], num_rows: int, fold_RM: np.ndarray) -> np.ndarray:
    """Return the threshold of each out-of-fold prediction of a multi-label task.

    Args:
        thresholds: One per repeat, fold and seed, in this order.
        num_rows: R x S, number of rows of predictions.
        fold_RM: (R, M) fold of each target.

    Returns:
        (R x S, M): the seeds of the first repeat, then those of the second one.
    """
    threshold_RKS = np.reshape(thresholds, (len(fold_RM), -1, num_rows // len(fold_RM)))
    return np.concatenate([of_KS[fold_M].T for of_KS, fold_M in zip(threshold_RKS, fold_RM, strict=True)])


def build_fold_scorers(
    scorers: Sequence[Scorer],
    truth_M: np.ndarray,
    predicted_SM: np.ndarray,
    arrays: FoldArrays,
    several: SeveralTargets | None = None,
) -> list[Scorer]:
    """Build the scorers of out-of-fold predictions from those of all predictions together.

    Args:
        scorers: One per row of predictions, which score all predictions together.
        truth_M: (M,) targets.
        predicted_SM: (R x S, M) predictions: the seeds of the first repeat, then those of the second one.
        arrays: Groups and folds.
        several: For several values per protein, which are (M, C).

    Returns:
        One scorer per row.
    """
    if truth_M.dtype.kind != "f":
        return list(scorers)
    per_repeat = len(predicted_SM) // len(arrays.fold_RM)
    if truth_M.ndim > 1:
        return [
            _build_column_scorer(truth_M, predicted_MC, arrays.group_M, arrays.fold_RM[row // per_repeat], several)
            for row, predicted_MC in enumerate(predicted_SM)
        ]
    return [
        average_within_folds(scorer, truth_M, predicted_M, arrays.group_M, arrays.fold_RM[row // per_repeat])
        for row, (scorer, predicted_M) in enumerate(zip(scorers, predicted_SM, strict=True))
    ]


def _build_column_scorer(
    truth_MC: np.ndarray, predicted_MC: np.ndarray, group_M: np.ndarray, fold_M: np.ndarray, several: SeveralTargets
) -> Scorer:
    """Build the scorer of several values per protein, each of which is scored as if it were the only one."""

    def build(truth_N: np.ndarray, predicted_N: np.ndarray, group_N: np.ndarray, rows: np.ndarray) -> Scorer:
        scorer = build_value_scorer(truth_N, predicted_N, group_N)
        return average_within_folds(scorer, truth_N, predicted_N, group_N, fold_M[rows])

    return build_column_scorer(truth_MC, predicted_MC, group_M, several.columns, several.spreads, build)


def score_folds(
    scorers: Sequence[Scorer],
    truth_M: np.ndarray,
    predicted_SM: np.ndarray,
    arrays: FoldArrays,
    counts_RG: np.ndarray,
    several: SeveralTargets | None = None,
) -> dict[str, Score]:
    """Score out-of-fold predictions.

    Args:
        scorers: One per row of predictions, which score all predictions together.
        truth_M: (M,) targets.
        predicted_SM: (R x S, M) predictions: the seeds of the first repeat, then those of the second one.
        arrays: Groups and folds.
        counts_RG: Bootstrap counts of the groups.
        several: For several values per protein.

    Returns:
        metric -> Score: the mean over repeats and seeds, with an interval over groups and training sets.
    """
    scores = score_seeds(build_fold_scorers(scorers, truth_M, predicted_SM, arrays, several), counts_RG)
    widening, expansion = arrays.compute_widening(), arrays.compute_expansion()
    wide = {}
    for name, score in scores.items():
        metric, slash, column = name.partition(SEPARATOR)  # the own score of one of several targets has both
        wide[name] = widen_score(metric, score, widening * expansion)
        if metric == "r2":
            wide[name] = _widen_r2(score, scores[f"rmse{slash}{column}"], widening, expansion)
    return wide


def _widen_r2(r2: Score, rmse: Score, widening: float, expansion: float) -> Score:
    """Widen the interval of R2, to whose variance the training sets contribute as to that of the errors.

    Resampling moves the errors and the variance of the values together, because proteins with extreme values have large
    errors, so that R2 varies less than the errors do. Another training set changes only the errors. The variance that
    Nadeau and Bengio add is therefore that of the errors, relative to the variance of the values.

    Returns:
        The score with twice as many replicates.
    """
    value, error = r2.interval.value, rmse.interval.value
    if r2.is_constant or not (math.isfinite(value) and error > 0 and np.isfinite(r2.replicates).all()):
        return widen_score("r2", r2, widening * expansion)
    with np.errstate(divide="ignore"):
        errors_R = (1 - value) * 2 * np.log(np.maximum(rmse.replicates, LEAST * error) / error)
    # the added part is independent of the first one, and is the same replicate in all models
    added_R = math.sqrt(widening**2 - 1) * np.roll(errors_R - errors_R.mean(), len(errors_R) // 2)
    offset_R = r2.replicates - r2.replicates.mean() - added_R
    return _mirror("r2", r2, value, expansion * offset_R, np.asarray)


def widen_score(metric: str, score: Score, factor: float) -> Score:
    """Widen the interval of a score around its value.

    The replicates are centred on the value, mirrored and stretched, on a scale without limits, so that differences of
    two scores are widened in the same way.

    Args:
        metric: Name of the metric.
        score: Score with bootstrap replicates.
        factor: Factor of the width.

    Returns:
        The score with twice as many replicates. One without an interval, or with that of the rule of three, keeps it.
    """
    value = score.interval.value
    forward, back = SCALES.get(metric, (np.asarray, np.asarray))
    with np.errstate(invalid="ignore", divide="ignore"):
        centre, scaled_R = forward(np.array(value)), forward(score.replicates)
    finite_R = scaled_R[np.isfinite(scaled_R)]
    if score.is_constant or not finite_R.size or not np.isfinite(centre):
        return replace(score, replicates=np.tile(score.replicates, 2))
    return _mirror(metric, score, centre, factor * (scaled_R - finite_R.mean()), back)


def _mirror(metric: str, score: Score, centre: float, offset_R: np.ndarray, back: Callable) -> Score:
    """Return a score with replicates on both sides of its value, `back` from the scale of the offsets."""
    value = score.interval.value
    replicates = back(np.concatenate([centre + offset_R, centre - offset_R]))
    found = compute_interval(value, replicates)
    lowest, highest = LIMITS.get(metric, (-math.inf, math.inf))
    low, high = (float(np.clip(end, lowest, highest)) for end in (found.low, found.high))
    return replace(score, interval=Interval(value, low, high), replicates=replicates)
