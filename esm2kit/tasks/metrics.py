"""Metrics with protein-level bootstrap intervals.

A bootstrap replicate is a vector of counts: how often each protein was sampled. The metrics take these counts as
weights, so that one vectorised pass computes the point estimate (all counts are 1) and all replicates. Two models that
are scored with the same counts give a paired difference. Proteins are resampled, not residues, because the residues of
one protein are not independent.

Source: definitions of scikit-learn and scipy, including ties and absent classes; the tests compare with both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix

from esm2kit.tasks.scaling import find_exponent

CLASS_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc")
VALUE_METRICS = ("spearman", "pearson", "rmse", "r2", "ndcg")
LOWER_IS_BETTER = frozenset({"rmse"})
SHARES = ("accuracy", "subset_accuracy")  # of correct predictions, whose interval exists even if all are correct
HAVE_A_UNIT = frozenset({"rmse"})  # in the unit of the target, so that their size has no meaning of its own
CONFIDENCE = 0.95
ROUNDING = 1e-12  # replicates that differ by less, relative to their size, are equal
ROUNDED = 2.0**-50  # relative error of a value after a few operations in float64
# Elements of one block of (rows, replicates), 2 MB, so that a few blocks fit into the cache.
BLOCK = 1 << 18


class Interval(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One metric of one model.

    Args:
        interval: mean over seeds, and the protein-level bootstrap interval of this mean.
        seeds: the metric per seed.
        replicates: (R,) the mean over seeds per bootstrap replicate, for paired comparisons.
        num_proteins: number of proteins that were resampled.
    """

    interval: Interval
    seeds: tuple[float, ...]
    replicates: np.ndarray
    num_proteins: int

    @property
    def seed_spread(self) -> float:
        """Sample standard deviation over seeds; 0 for a single seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else 0.0

    @property
    def is_constant(self) -> bool:
        """Whether all replicates are equal, so that the bootstrap gives no interval."""
        return _is_constant(self.replicates, _find_scale(self.replicates))


def sample_counts(num_proteins: int, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Sample bootstrap replicates of the proteins.

    Args:
        num_proteins: P, number of proteins.
        num_resamples: R, number of replicates.
        seed: of the random numbers.

    Returns:
        (R, P) int32, how often each protein occurs in each replicate; each row sums to P.
    """
    generator = np.random.default_rng(seed)
    counts_RP = np.empty((num_resamples, num_proteins), dtype=np.int32)
    for row in counts_RP:
        row[:] = np.bincount(generator.integers(0, num_proteins, num_proteins), minlength=num_proteins)
    return counts_RP


def count_margins(
    truth_N: np.ndarray, predicted_N: np.ndarray, protein_N: np.ndarray, num_proteins: int, num_classes: int
) -> csr_matrix:
    """Count the hits, the true labels and the predicted labels of each class in each protein.

    These are the diagonal and the margins of the confusion matrices, all that the metrics require. Their size is that
    of the labels; that of the matrices grows with the square of the number of classes.

    Args:
        truth_N: (N,) true classes.
        predicted_N: (N,) predicted classes.
        protein_N: (N,) protein of each label.
        num_proteins: P, number of proteins.
        num_classes: K, number of classes.

    Returns:
        (3 K, P) sparse float64: K rows of hits, K rows of true labels, K rows of predicted labels.
    """
    hit_N = truth_N == predicted_N
    rows = np.concatenate([truth_N[hit_N], num_classes + truth_N, 2 * num_classes + predicted_N])
    columns = np.concatenate([protein_N[hit_N], protein_N, protein_N])
    return coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(3 * num_classes, num_proteins)).tocsr()


def count_confusions(truth_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the confusion matrix (K, K), indexed by [truth, predicted]."""
    counts = np.bincount(truth_N * num_classes + predicted_N, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def count_confused_pairs(truth_N: np.ndarray, predicted_N: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Count wrong predictions by pair of classes: the `most` frequent (truth, predicted, count), frequent ones first.

    Args:
        truth_N: (N,) true classes.
        predicted_N: (N,) predicted classes.
        most: maximum number of pairs.

    Returns:
        Pairs by falling count; those of equal count by class.
    """
    wrong = truth_N != predicted_N
    pairs, counts = np.unique(np.stack([truth_N[wrong], predicted_N[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(*map(int, pairs[:, place]), int(counts[place])) for place in order]


def compute_class_metrics(hit_RK: np.ndarray, true_RK: np.ndarray, predicted_RK: np.ndarray) -> dict[str, np.ndarray]:
    """Compute accuracy, balanced accuracy, macro-F1 and MCC from counts per class.

    As in scikit-learn, the macro-F1 ignores classes that occur neither in the truth nor in the predictions, the
    balanced accuracy ignores classes that do not occur in the truth, and an undefined MCC is 0.

    Args:
        hit_RK: (R, K) correctly predicted labels of each class in each replicate.
        true_RK: (R, K) true labels.
        predicted_RK: (R, K) predicted labels.

    Returns:
        metric -> (R,) values.
    """
    total_R = true_RK.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, f1 = hit_RK / true_RK, 2 * hit_RK / (true_RK + predicted_RK)
        covariance = hit_RK.sum(1) * total_R - (true_RK * predicted_RK).sum(1)
        spread = np.sqrt((total_R**2 - (true_RK**2).sum(1)) * (total_R**2 - (predicted_RK**2).sum(1)))
        mcc = np.where(spread > 0, covariance / spread, 0.0)
        return {
            "accuracy": hit_RK.sum(1) / total_R,
            "balanced_accuracy": _masked_mean(recall, true_RK > 0),
            "macro_f1": _masked_mean(f1, true_RK + predicted_RK > 0),
            "mcc": mcc,
        }


def _masked_mean(values_RK: np.ndarray, where_RK: np.ndarray) -> np.ndarray:
    return np.where(where_RK, values_RK, 0.0).sum(1) / where_RK.sum(1)


def compute_binary_metrics(margins_L3R2: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Compute F1 of the positive class, MCC and balanced accuracy, (R,) each, as means over L binary labels.

    Args:
        margins_L3R2: per binary label, the arguments of `compute_class_metrics` for its two classes, 0 and 1.

    Returns:
        metric -> (R,) values.
    """
    per_label = [compute_class_metrics(*margins_3R2) for margins_3R2 in margins_L3R2]
    hits, truly, called = np.stack(margins_L3R2, axis=2)[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(truly + called > 0, 2 * hits / (truly + called), 0.0)
    return {
        "macro_f1": f1.mean(1),
        "mcc": np.mean([metrics["mcc"] for metrics in per_label], axis=0),
        "balanced_accuracy": np.mean([metrics["balanced_accuracy"] for metrics in per_label], axis=0),
    }


def unpack_bits(classes_N: np.ndarray, num_bits: int) -> np.ndarray:
    """Split integer classes into their binary labels: (N, L) 0 or 1, lowest bit first."""
    return (classes_N[:, None] >> np.arange(num_bits)) & 1


def compute_per_class(
    truth_N: np.ndarray, predicted_N: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Compute precision, recall, F1 and support per class; a ratio with denominator 0 is 0."""
    hits_K, true_K, predicted_K = (
        np.bincount(classes, minlength=len(labels)).tolist()
        for classes in (truth_N[truth_N == predicted_N], truth_N, predicted_N)
    )
    return {
        label: {
            "precision": hit / predicted if predicted else 0.0,
            "recall": hit / true if true else 0.0,
            "f1": 2 * hit / (true + predicted) if true + predicted else 0.0,
            "support": float(true),
        }
        for label, hit, true, predicted in zip(labels, hits_K, true_K, predicted_K, strict=True)
    }


class Ranking(NamedTuple):
    """Values in ascending order, in G groups of equal values.

    Args:
        order: (N,) indices that sort the values.
        starts: (G,) index in `order` of the first value of each group.
        group: (N,) group of each value.
    """

    order: np.ndarray
    starts: np.ndarray
    group: np.ndarray

    @classmethod
    def from_values(cls, values_N: np.ndarray) -> "Ranking":
        """Sort and group values."""
        order = np.argsort(values_N, kind="stable")
        is_first = np.r_[True, np.diff(values_N[order]) != 0]
        group = np.empty(len(order), dtype=np.int64)
        group[order] = np.cumsum(is_first) - 1
        return cls(order, np.flatnonzero(is_first), group)

    def sum_groups(self, rows_NR: np.ndarray) -> np.ndarray:
        """Sum rows (N, R) over each group: (G, R)."""
        rows_NR = rows_NR[self.order]
        return rows_NR if len(self.starts) == len(self.order) else np.add.reduceat(rows_NR, self.starts, axis=0)


def _score_value_block(
    rankings: tuple[Ranking, Ranking],
    columns_XN: np.ndarray,
    gain_N: np.ndarray,
    counts_NR: np.ndarray,
    exponents: tuple[int, int],
) -> dict[str, np.ndarray]:
    of_truth, of_error = exponents
    total, st, sp, stt, spp, stp, squared = columns_XN @ counts_NR.astype(np.float64)
    num_sampled = counts_NR.sum(0, dtype=np.int64)
    discount = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, num_sampled.max() + 2)))])
    spread_t, spread_p = (_mask_rounding_noise(xx - x * x / total, xx) for x, xx in ((st, stt), (sp, spp)))
    ranks, rank_squares, gains = [], [], []
    for place, ranking in enumerate(rankings):
        size_GR = ranking.sum_groups(counts_NR)
        stop_GR = np.cumsum(size_GR, axis=0)
        rank_GR = stop_GR - (size_GR + num_sampled) / 2  # centred; tied copies share their mean rank
        rank_squares.append(np.einsum("gr,gr,gr->r", size_GR, rank_GR, rank_GR))
        ranks.append(rank_GR[ranking.group])
        # In descending order, a group has the ranks `num_sampled - stop` to `num_sampled - stop + size`.
        cumulative_GR = discount[num_sampled - stop_GR]
        discount_GR = np.concatenate([discount[num_sampled][None], cumulative_GR[:-1]]) - cumulative_GR
        if place == 0 or len(ranking.starts) == len(ranking.order):  # one gain per group
            gains.append(gain_N[ranking.order][ranking.starts] @ discount_GR)
        else:
            sums_GR = ranking.sum_groups(counts_NR * gain_N[:, None])
            gains.append((sums_GR / np.maximum(size_GR, 1) * discount_GR).sum(0))
    rank_product = np.einsum("nr,nr,nr->r", counts_NR, *ranks)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {
            "spearman": rank_product / np.sqrt(np.prod([np.where(s > 0, s, np.nan) for s in rank_squares], axis=0)),
            "pearson": (stp - st * sp / total) / np.sqrt(spread_t * spread_p),
            "rmse": np.ldexp(np.sqrt(squared / total), of_error),
            "r2": 1 - np.ldexp(squared / spread_t, 2 * (of_error - of_truth)),
            "ndcg": np.where(gains[0] > 0, gains[1] / gains[0], np.nan),
        }


def _mask_rounding_noise(spread_R: np.ndarray, scale_R: np.ndarray) -> np.ndarray:
    """Replace sums of squares around the mean by nan if they are 0 except for rounding errors."""
    return np.where(spread_R > 1e-13 * scale_R, spread_R, np.nan)


def build_class_scorer(
    truth_N: np.ndarray,
    predicted_N: np.ndarray,
    protein_N: np.ndarray,
    num_proteins: int,
    num_classes: int,
    num_bits: int = 0,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that scores class predictions.

    Args:
        truth_N: (N,) true classes.
        predicted_N: (N,) predicted classes.
        protein_N: (N,) protein of each prediction.
        num_proteins: P, number of proteins.
        num_classes: K, number of classes.
        num_bits: L, number of binary labels that a class encodes; 0 if there are none.

    Returns:
        A function from counts (R, P) to metric -> (R,) values; with `num_bits`, all but accuracy are means over labels.
    """
    margins_XP = count_margins(truth_N, predicted_N, protein_N, num_proteins, num_classes)
    truth_NL, predicted_NL = unpack_bits(truth_N, num_bits), unpack_bits(predicted_N, num_bits)
    bits_LXP = [
        count_margins(truth_NL[:, bit], predicted_NL[:, bit], protein_N, num_proteins, 2) for bit in range(num_bits)
    ]

    def score_block(counts_PR: np.ndarray) -> dict[str, np.ndarray]:
        metrics = compute_class_metrics(*_sum_margins(margins_XP, counts_PR))
        if bits_LXP:
            metrics |= compute_binary_metrics([_sum_margins(bits_XP, counts_PR) for bits_XP in bits_LXP])
        return metrics

    def score(counts_RP: np.ndarray) -> dict[str, np.ndarray]:
        blocks = split_replicates(counts_RP, max(num_proteins, 3 * num_classes))
        return join_blocks([score_block(counts_PR.astype(np.float64)) for counts_PR in blocks])

    return score


def _sum_margins(margins_XP: csr_matrix, counts_PR: np.ndarray) -> np.ndarray:
    """Sum the margins over the proteins of each replicate: (3, R, K)."""
    return np.ascontiguousarray((margins_XP @ counts_PR).reshape(3, -1, counts_PR.shape[1]).transpose(0, 2, 1))


def split_replicates(counts_RP: np.ndarray, num_rows: int) -> Iterator[np.ndarray]:
    """Yield counts (P, R) of blocks of replicates, such that a block of `num_rows` rows fits into the cache.

    Replicates are the last axis, so that sorting and summing access contiguous memory.
    """
    step = max(8, BLOCK // max(1, num_rows))
    for start in range(0, len(counts_RP), step):
        yield np.ascontiguousarray(counts_RP[start : start + step].T)


def join_blocks(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the metrics of blocks of replicates."""
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def build_value_scorer(
    truth_N: np.ndarray, predicted_N: np.ndarray, protein_N: np.ndarray
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that scores value predictions by Spearman, Pearson, RMSE, R2 and NDCG.

    RMSE is in the target's unit. Correlations with a constant are nan. R2 refers to the mean of the replicate's true
    values. The gains of NDCG are the true values minus their minimum. Ties share their average rank and average gain.
    Values are divided by a power of two, which is exact, so that no size of values overflows or underflows.

    Args:
        truth_N: (N,) true values.
        predicted_N: (N,) predicted values.
        protein_N: (N,) protein of each prediction.

    Returns:
        A function from counts (R, P) to metric -> (R,) values.
    """
    truth, predicted = truth_N.astype(np.float64), predicted_N.astype(np.float64)
    rankings = Ranking.from_values(truth), Ranking.from_values(predicted)
    of_truth, of_predicted = find_exponent(truth), find_exponent(predicted)
    of_error = max(of_truth, of_predicted)
    error = np.ldexp(truth, -of_error) - np.ldexp(predicted, -of_error)
    # errors that are rounding errors of the values are 0, so that exact predictions have an RMSE of 0
    error[np.abs(truth - predicted) <= ROUNDED * np.maximum(np.abs(truth), np.abs(predicted))] = 0.0
    t, p = np.ldexp(truth, -of_truth), np.ldexp(predicted, -of_predicted)
    gain_N, t, p = t - t.min(), t - t.mean(), p - p.mean()
    columns_XN = np.stack([np.ones_like(t), t, p, t * t, p * p, t * p, error**2])

    def score(counts_RP: np.ndarray) -> dict[str, np.ndarray]:
        blocks = split_replicates(counts_RP, len(truth))
        exponents = of_truth, of_error
        return join_blocks(
            [_score_value_block(rankings, columns_XN, gain_N, block[protein_N], exponents) for block in blocks]
        )

    return score


def _find_scale(*replicates: np.ndarray, metric: str = "") -> float:
    """Return the size that rounding errors of replicates are relative to: theirs, and for a metric without a unit 1."""
    sizes = [float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) for values in replicates]
    return max(*sizes, 0.0 if metric in HAVE_A_UNIT else 1.0)


def _is_constant(replicates: np.ndarray, scale: float) -> bool:
    """Whether replicates are equal except for rounding errors of numbers of size `scale`."""
    return bool(np.ptp(replicates) <= ROUNDING * scale)


def compute_interval(value: float, replicates: np.ndarray, scale: float | None = None) -> Interval:
    """Compute a 95% percentile interval.

    Equal replicates, such as those of a perfect score, carry no information about other proteins, so the ends are nan.

    Args:
        value: the point estimate.
        replicates: (R,) the metric per bootstrap replicate; nan, where it is undefined, is ignored.
        scale: size of the numbers that the replicates were computed from; replicates that differ by less than its
            rounding errors are equal. Default: their own size, at least 1.

    Returns:
        The value with the ends of its interval, nan if there is none.
    """
    finite = replicates[np.isfinite(replicates)]
    scale = _find_scale(finite) if scale is None else scale
    if not np.isfinite(value) or not finite.size or _is_constant(finite, scale):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(value), float(low), float(high))


def score_seeds(
    scorers: list[Callable[[np.ndarray], dict[str, np.ndarray]]], counts_RP: np.ndarray
) -> dict[str, Score]:
    """Score a model that was trained with several seeds.

    Args:
        scorers: one per seed, from `build_class_scorer` or `build_value_scorer`.
        counts_RP: (R, P) counts from `sample_counts`; equal counts allow paired comparisons.

    Returns:
        metric -> Score.
    """
    ones = np.ones((1, counts_RP.shape[1]), dtype=np.int32)
    points = [scorer(ones) for scorer in scorers]
    per_seed = [scorer(counts_RP) for scorer in scorers]
    scores = {}
    for name in points[0]:
        seeds = tuple(float(point[name][0]) for point in points)
        replicates = np.mean([sample[name] for sample in per_seed], axis=0)
        value, num_proteins = float(np.mean(seeds)), counts_RP.shape[1]
        found = compute_interval(value, replicates, _find_scale(replicates, metric=name.partition("/")[0]))
        if name in SHARES and not math.isfinite(found.low):
            found = compute_rule_of_three_interval(value, 0.0, 1.0, num_proteins)
        scores[name] = Score(found, seeds, replicates, num_proteins)
    return scores


def compute_rule_of_three_interval(value: float, lowest: float, highest: float, num_proteins: int) -> Interval:
    """Compute the interval of a mean over n proteins that all have the same value.

    This is the case if all predictions are correct, all are wrong, or two models never differ. All bootstrap replicates
    are then equal, but the mean is not certain: if a share of 1 - 0.05^(1/n) of all proteins had another value, a
    sample of n without any of them would still have a probability of 5%. For n correct predictions the interval starts
    at 0.05^(1/n), about 1 - 3/n.

    Args:
        value: the common value.
        lowest: smallest value that a protein can have.
        highest: largest value that a protein can have.
        num_proteins: n.

    Returns:
        The value with the ends of its interval.

    Source:
        The rule of three, Hanley and Lippman-Hand 1983, 10.1001/jama.1983.03330370053031, in its exact form, the
        one-sided bound of Clopper and Pearson.
    """
    share = 1 - (1 - CONFIDENCE) ** (1 / num_proteins)
    return Interval(value, value - share * (value - lowest), value + share * (highest - value))


def compute_paired_difference(metric: str, score: Score, other: Score) -> Interval:
    """Compute how much better one model is than another on the same bootstrap replicates.

    Args:
        metric: name of the metric.
        score: score of the first model.
        other: score of the second model, computed with the same counts.

    Returns:
        The difference with its 95% interval; positive if the first model is better, also for errors such as RMSE.
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    value = sign * (score.interval.value - other.interval.value)
    scale = _find_scale(score.replicates, other.replicates, metric=metric)
    found = compute_interval(value, sign * (score.replicates - other.replicates), scale)
    if metric in SHARES and not math.isfinite(found.low):
        found = compute_rule_of_three_interval(value, -1.0, 1.0, score.num_proteins)
    return found


def nan_to_none(value: float) -> float | None:
    """Convert nan and inf to None, because JSON does not support them."""
    return float(value) if math.isfinite(value) else None
