"""Compare scores of variants with measured values, as ProteinGym does, next to baselines and with intervals.

Source: the definitions of ProteinGym's `performance_DMS_benchmarks.py` (commit bb68524, MIT), for a higher measured
value that is a fitter variant. Where scores are tied, its NDCG depends on the order of the rows; here tied variants
share their mean gain.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.scoring.baselines import BASELINE_NAMES
from esm2kit.scoring.proteingym import PublishedAssay, find_assay
from esm2kit.scoring.variants import MIN_MEASURED
from esm2kit.tasks.metrics import (
    Interval,
    Ranking,
    Score,
    compute_paired_difference,
    join_blocks,
    nan_to_none,
    sample_counts,
    score_seeds,
    split_replicates,
)

METRIC_NAMES = {"spearman": "Spearman", "auc": "AUC", "mcc": "MCC", "ndcg": "NDCG", "top_recall": "top-10% recall"}
MODEL = "model"  # the row of the model among those of the baselines
TOP_PERCENT = 10
VARIANTS, CROSSED = "variants", "positions and amino acids"  # what is resampled


@dataclass(frozen=True)
class AssayReport:
    """Scores of a model and of baselines compared with one assay.

    Args:
        name: of the assay.
        protein: id of the wild type.
        num_variants: variants with a measured value.
        rows: model or baseline -> metric -> value with its bootstrap interval.
        differences: baseline -> metric -> model minus baseline, on the same bootstrap replicates.
        published: ProteinGym's Spearman of the same assay, by model; None for other assays.
        verdict: sentences on what the comparison shows.
        resampled: what the bootstrap samples: VARIANTS, or CROSSED.
    """

    name: str
    protein: str
    num_variants: int
    rows: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    published: PublishedAssay | None = None
    verdict: tuple[str, ...] = field(default=())
    resampled: str = VARIANTS

    @property
    def better_baselines(self) -> list[str]:
        """Baselines with a higher Spearman than the model, the best one first; those of the interval alone are not."""
        above = [name for name, found in self.differences.items() if found["spearman"].high < 0]
        return sorted(above, key=lambda name: -self.rows[name]["spearman"].value)

    def to_json(self) -> dict[str, Any]:
        """Return the report for JSON; undefined numbers are null."""
        found: dict[str, Any] = {
            "assay": self.name,
            "protein": self.protein,
            "num_variants": self.num_variants,
            "resampled": self.resampled,
            "rows": intervals_to_json(self.rows),
            "model_minus_baseline": intervals_to_json(self.differences),
            "better_baselines": self.better_baselines,
            "verdict": list(self.verdict),
        }
        if self.published is not None:
            found["published_spearman"] = dict(self.published.spearman)
        return found


def intervals_to_json(table: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Convert row -> metric -> interval for JSON; undefined numbers are null."""
    return {
        name: {
            metric: {end: nan_to_none(value) for end, value in interval._asdict().items()}
            for metric, interval in row.items()
        }
        for name, row in table.items()
    }


def build_assay_scorer(
    measured_N: np.ndarray, score_N: np.ndarray, is_fit_N: np.ndarray | None = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that computes ProteinGym's metrics on bootstrap replicates.

    - `spearman`: rank correlation.
    - `auc`, `mcc` (with `is_fit_N`): area under the ROC curve; Matthews correlation of `is_fit_N` with the scores that
      are at least their median.
    - `ndcg`: of the 10% of variants with the highest scores, rounded down; gains are measured values scaled to 0 to 1.
    - `top_recall`: share of the variants at or above the 90th percentile of the measured values, whose scores are at or
      above the 90th percentile of the scores.

    Args:
        measured_N: (N,) measured values.
        score_N: (N,) scores.
        is_fit_N: (N,) whether a variant is above the cutoff of fitness; None if this is not known.

    Returns:
        A function from counts (R, N), how often each variant occurs, to metric -> (R,) values, nan where undefined.
        Rows of counts may have different sums.
    """
    of_measured, of_score = Ranking.from_values(measured_N), Ranking.from_values(score_N)
    scaled_N = measured_N / (np.abs(measured_N).max() or 1.0)  # no size of values overflows

    def score_block(counts_NR: np.ndarray) -> dict[str, np.ndarray]:
        total = counts_NR.sum(0, dtype=np.int64)
        by_score, by_measured = of_score.sum_groups(counts_NR), of_measured.sum_groups(counts_NR)
        groups = (of_score, by_score), (of_measured, by_measured)
        found = {
            "spearman": _compute_spearman(*groups, counts_NR, total),
            "ndcg": _compute_ndcg(scaled_N, counts_NR, *groups, total),
            "top_recall": _compute_top_recall(*groups, counts_NR, total),
        }
        if is_fit_N is not None:
            fit_GR = of_score.sum_groups(counts_NR * is_fit_N[:, None])
            found |= {"auc": _compute_auc(fit_GR, by_score - fit_GR), "mcc": _compute_mcc(fit_GR, by_score, total)}
        return found

    def score(counts_RN: np.ndarray) -> dict[str, np.ndarray]:
        found = join_blocks([score_block(counts_NR) for counts_NR in split_replicates(counts_RN, len(measured_N))])
        return {name: found[name] for name in METRIC_NAMES if name in found}

    return score


Groups = tuple[Ranking, np.ndarray]  # a ranking, and (G, R) how often the values of each group occur


def _compute_spearman(by_score: Groups, by_measured: Groups, counts_NR: np.ndarray, total_R: np.ndarray) -> np.ndarray:
    """Compute the correlation of ranks, where ties share their mean rank."""
    ranks, squares = [], []
    for ranking, size_GR in (by_score, by_measured):
        rank_GR = np.cumsum(size_GR, axis=0) - (size_GR + total_R) / 2  # centred
        squares.append(np.einsum("gr,gr,gr->r", size_GR, rank_GR, rank_GR))
        ranks.append(rank_GR[ranking.group])
    spread_R = np.sqrt(squares[0]) * np.sqrt(squares[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread_R > 0, np.einsum("nr,nr,nr->r", counts_NR, *ranks) / spread_R, np.nan)


def _compute_auc(fit_GR: np.ndarray, unfit_GR: np.ndarray) -> np.ndarray:
    """Compute the share of pairs of a fit and an unfit variant in which the fit one has the higher score."""
    below_GR = np.cumsum(unfit_GR, axis=0) - unfit_GR / 2  # a tied pair counts half
    pairs_R = fit_GR.sum(0, dtype=float) * unfit_GR.sum(0, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs_R > 0, np.einsum("gr,gr->r", fit_GR.astype(float), below_GR) / pairs_R, np.nan)


def _find_quantile(size_GR: np.ndarray, index_R: np.ndarray) -> np.ndarray:
    """Return the (R,) group of the value with an index, from 0 in ascending order."""
    return (np.cumsum(size_GR, axis=0) <= index_R).sum(0)


def _compute_mcc(fit_GR: np.ndarray, size_GR: np.ndarray, total_R: np.ndarray) -> np.ndarray:
    """Compute the Matthews correlation with scores at or above the median, the upper one of two middle values."""
    called_GR = np.arange(len(size_GR))[:, None] >= _find_quantile(size_GR, total_R // 2)
    fit_R, called_R = fit_GR.sum(0, dtype=float), (size_GR * called_GR).sum(0, dtype=float)
    both_R = (fit_GR * called_GR).sum(0, dtype=float)
    spread_R = np.sqrt(fit_R * (total_R - fit_R) * called_R * (total_R - called_R))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread_R > 0, (both_R * total_R - fit_R * called_R) / spread_R, 0.0)


def _compute_top_recall(
    by_score: Groups, by_measured: Groups, counts_NR: np.ndarray, total_R: np.ndarray
) -> np.ndarray:
    """Compute the recall of the top 10%; the percentile between two values has the same variants as the upper value."""
    index_R = -(-(100 - TOP_PERCENT) * (total_R - 1) // 100)
    tops = [ranking.group[:, None] >= _find_quantile(size_GR, index_R) for ranking, size_GR in (by_score, by_measured)]
    both_R, true_R = ((counts_NR * top).sum(0, dtype=float) for top in (tops[0] & tops[1], tops[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return both_R / true_R


def _compute_ndcg(
    value_N: np.ndarray, counts_NR: np.ndarray, by_score: Groups, by_measured: Groups, total_R: np.ndarray
) -> np.ndarray:
    """Compute NDCG at 10%, with the measured values of each replicate minus their minimum as gains."""
    top_R = total_R * TOP_PERCENT // 100
    discount = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, top_R.max() + 2)))])  # of the first ranks
    ranking, size_GR = by_measured
    lowest_R = value_N[ranking.order][ranking.starts][(size_GR > 0).argmax(0)]
    gains = []
    for ranking, size_GR in (by_score, by_measured):
        before_GR = total_R - np.cumsum(size_GR, axis=0)  # variants with a higher value than the group
        # ranks after the top have no discount
        discount_GR = discount[np.minimum(before_GR + size_GR, top_R)] - discount[np.minimum(before_GR, top_R)]
        mean_GR = ranking.sum_groups(counts_NR * value_N[:, None]) / np.maximum(size_GR, 1)
        gains.append((mean_GR * discount_GR).sum(0) - lowest_R * discount[top_R])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(gains[1] > 0, gains[0] / gains[1], np.nan)


def sample_variants(
    num_variants: int, resamples: int, seed: int, factors: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Sample bootstrap replicates of variants.

    The single substitutions of a protein are not independent: a model that prefers a few letters by chance has wrong
    scores, or right ones, at all positions. Positions and mutant letters are therefore resampled, and a variant occurs
    as often as the product of its position and its letter.

    Args:
        num_variants: N.
        resamples: R, number of replicates.
        seed: of the random numbers.
        factors: (N,) integers each, such as the position and the mutant letter of every variant. None resamples the
            variants themselves.

    Returns:
        (R, N) int32, how often each variant occurs.

    Source:
        The pigeonhole bootstrap of crossed factors, Owen 2007, 10.1214/07-AOAS122.
    """
    if factors is None:
        return sample_counts(num_variants, resamples, seed)
    counts_RN = np.ones((resamples, num_variants), dtype=np.int32)
    for number, factor_N in enumerate(factors):
        levels, level_N = np.unique(factor_N, return_inverse=True)
        if len(levels) > 1:  # a single position is not a sample of positions
            counts_RN *= sample_counts(len(levels), resamples, seed + number)[:, level_N]
    return counts_RN


def check_measured(name: str, measured_N: np.ndarray) -> None:
    """Check that there are enough measured values for a correlation.

    Args:
        name: of the assay.
        measured_N: (N,) measured values; nan where one is missing.

    Raises:
        InputError: fewer than MIN_MEASURED variants have a measured value, or all values are equal.
    """
    measured_M = measured_N[np.isfinite(measured_N)]
    if len(measured_M) < MIN_MEASURED or np.ptp(measured_M) == 0:
        found = format_count(len(measured_M), "measured value")
        raise InputError(
            f"{name} has {found}{', all equal' if len(measured_M) >= MIN_MEASURED else ''}. A correlation requires "
            f"at least {MIN_MEASURED} that differ.",
            code="assay.values",
            found=len(measured_M),
            assay=name,
        )


def evaluate_assay(
    name: str,
    protein: str,
    measured_N: np.ndarray,
    is_fit_N: np.ndarray | None,
    scores: Mapping[str, np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
    factors: Sequence[np.ndarray] | None = None,
) -> AssayReport:
    """Compare scores with one assay.

    Args:
        name: of the assay.
        protein: id of the wild type.
        measured_N: (N,) measured values; nan where one is missing.
        is_fit_N: (N,) whether a variant is above the cutoff of fitness; None if this is not known.
        scores: MODEL and baselines -> (N,) scores.
        resamples: bootstrap replicates.
        seed: of the bootstrap.
        factors: what is resampled, see `sample_variants`.

    Returns:
        The report.

    Raises:
        InputError: fewer than MIN_MEASURED variants have a measured value, or all values are equal.
    """
    check_measured(name, measured_N)
    is_measured_N = np.isfinite(measured_N)
    measured_M = measured_N[is_measured_N]
    factors = None if factors is None else [factor_N[is_measured_N] for factor_N in factors]
    counts_RM = sample_variants(len(measured_M), resamples, seed, factors)
    fit_M = None if is_fit_N is None else is_fit_N[is_measured_N]
    found = {
        row: score_seeds([build_assay_scorer(measured_M, score_N[is_measured_N], fit_M)], counts_RM)
        for row, score_N in scores.items()
    }
    differences = {
        row: {
            metric: compute_paired_difference(metric, found[MODEL][metric], score) for metric, score in of_row.items()
        }
        for row, of_row in found.items()
        if row != MODEL
    }
    rows = {row: {metric: score.interval for metric, score in of_row.items()} for row, of_row in found.items()}
    published = find_assay(name)
    return AssayReport(
        name,
        protein,
        len(measured_M),
        rows,
        differences,
        published,
        tuple(_write_verdict(found, differences)),
        VARIANTS if factors is None else CROSSED,
    )


def _write_verdict(
    found: Mapping[str, Mapping[str, Score]], differences: Mapping[str, Mapping[str, Interval]]
) -> list[str]:
    """Write what the Spearman correlations show, in sentences."""
    own = found[MODEL]["spearman"].interval
    if not math.isfinite(own.value):
        return ["All scores of the model are equal, so that there is no correlation."]
    sentences = []
    # a perfect correlation is the same in every replicate, and has no interval
    low, high = (own.low, own.high) if math.isfinite(own.low) else (own.value, own.value)
    if low <= 0 <= high:
        sentences.append(f"The model's scores show no correlation with the measured values: {_format(own)}.")
    elif high < 0:
        sentences.append(
            f"The model's scores fall as the measured values rise: {_format(own)}. Does a higher value mean a fitter "
            "variant in this assay?"
        )
    better, equal, worse = [], [], []
    for name, difference in differences.items():
        interval = difference["spearman"]
        if not math.isfinite(interval.value):
            continue
        place = better if interval.high < 0 else worse if interval.low > 0 else equal
        place.append(name)
    for name in sorted(better, key=lambda name: -found[name]["spearman"].interval.value):
        sentences.append(
            f"{_capitalise(BASELINE_NAMES.get(name, name))} does better than the model here: "
            f"{_format(found[name]['spearman'].interval)}, model {_format(own, '')} "
            f"({_format(differences[name]['spearman'], 'difference')})."
        )
    if equal:
        sentences.append(
            f"The model does as well as {_join_names(equal)} within the intervals of the differences, which contain 0."
        )
    if worse and not better and not equal:
        sentences.append(f"The model does better than every baseline: {_format(own)}.")
    elif worse:
        sentences.append(f"The model does better than {_join_names(worse)}.")
    return sentences


def _join_names(names: Sequence[str]) -> str:
    """Join names of baselines: `A, B and C`."""
    *first, last = (BASELINE_NAMES.get(name, name) for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _capitalise(text: str) -> str:
    """Capitalise the first letter, and leave the others as they are."""
    return text[:1].upper() + text[1:]


def _format(interval: Interval, name: str = "Spearman") -> str:
    if not math.isfinite(interval.low):
        return f"{name} {interval.value:.3f}, the same in every resample".lstrip()
    return f"{name} {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]".lstrip()
