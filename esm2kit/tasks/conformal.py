"""Prediction intervals with a promised coverage, from the errors on proteins that the model was not trained on.

All functions take plain arrays. Split conformal prediction promises: if the new protein and the calibration proteins
come from the same source, its interval contains the measured value with at least the chosen probability, whatever the
model and the distribution. It promises nothing for proteins from another source.

Source: split conformal prediction, Lei et al. 2018, 10.1080/01621459.2017.1307116; several targets per protein, Lee,
Barber and Willett 2023, arXiv:2306.06342.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from esm2kit.tasks.metrics import CONFIDENCE, Interval, sample_counts

COVERAGE = 0.9
# Scores that a model file keeps; more are thinned out such that intervals only become wider.
MOST_SCORES = 2000
FEWEST_TO_CHOOSE = 40  # calibration proteins, to choose between constant and varying widths
NARROWER = 0.95  # widths of the spread of seeds are used if they are at most this share of the constant width
ROUNDING = 1e-9


def count_needed_proteins(coverage: float) -> int:
    """Return the fewest calibration proteins for which an interval of a coverage is finite."""
    return math.ceil(coverage / (1 - coverage) - ROUNDING)


@dataclass(frozen=True)
class ConformalScores:
    """Errors of calibration targets, from which intervals of any coverage follow.

    Args:
        scores_N: (N,) errors, ascending: |measured - predicted|, or the same divided by spread + offset.
        weights_N: (N,) cumulative weight of the errors; all targets of one protein together have the weight 1.
        num_proteins: number of calibration proteins.
        by_spread: whether the errors are divided by the spread of the seeds.
        offset: added to the spread, so that seeds that happen to agree do not give an interval of width 0.
    """

    scores_N: np.ndarray
    weights_N: np.ndarray
    num_proteins: int
    by_spread: bool = False
    offset: float = 0.0

    @classmethod
    def from_errors(
        cls, errors_N: np.ndarray, protein_N: np.ndarray | None = None, by_spread: bool = False, offset: float = 0.0
    ) -> Self:
        """Sort errors, and weight them so that every protein counts once.

        Args:
            errors_N: (N,) errors.
            protein_N: (N,) protein of each error. None has one error per protein.
            by_spread: see the class.
            offset: see the class.

        Returns:
            The scores.
        """
        order = np.argsort(errors_N, kind="stable")
        if protein_N is None:
            protein_N = np.arange(len(errors_N))
        _, place_N, size_P = np.unique(protein_N, return_inverse=True, return_counts=True)
        weights_N = np.cumsum(1 / size_P[place_N.reshape(-1)][order])
        return cls(np.asarray(errors_N, dtype=np.float64)[order], weights_N, len(size_P), by_spread, offset)

    def quantile(self, coverage: float) -> float:
        """Return the error that new targets stay below with a probability of at least `coverage`.

        For one target per protein it is the ceil((n + 1) coverage)-th smallest of n errors.

        Args:
            coverage: between 0 and 1.

        Returns:
            The error; infinite if there are too few proteins.
        """
        needed = (self.num_proteins + 1) * coverage - ROUNDING
        place = int(np.searchsorted(self.weights_N, needed))
        return float(self.scores_N[place]) if place < len(self.scores_N) else math.inf

    def half_widths(self, coverage: float, spread_M: np.ndarray) -> np.ndarray:
        """Return half the width of each interval.

        Args:
            coverage: between 0 and 1.
            spread_M: (M,) spread of the seeds; only its shape is used for intervals of constant width.

        Returns:
            (M,) half widths, infinite if there are too few calibration proteins.
        """
        quantile = self.quantile(coverage)
        if not self.by_spread or math.isinf(quantile):
            return np.full(np.shape(spread_M), quantile)
        return quantile * (spread_M + self.offset)

    def describe(self) -> dict[str, Any]:
        """Return the scores as JSON-compatible data, at most MOST_SCORES of them."""
        places = np.arange(len(self.scores_N))
        if len(places) > MOST_SCORES:  # the next larger score that is kept stands for one that is not
            places = np.linspace(0, len(places) - 1, MOST_SCORES).astype(int)
        kept = {"scores": self.scores_N[places].tolist(), "weights": self.weights_N[places].tolist()}
        return kept | {"num_proteins": self.num_proteins, "by_spread": self.by_spread, "offset": self.offset}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        """Build the scores from what `describe` returned."""
        arrays = (np.array(described[name], dtype=np.float64) for name in ("scores", "weights"))
        return cls(*arrays, *(described[name] for name in ("num_proteins", "by_spread", "offset")))


class Coverage(NamedTuple):
    """How often intervals contain the measured values.

    Args:
        nominal: coverage that was asked for.
        found: share of the measured values inside, with its 95% interval.
        mean_width: mean width of the intervals; infinite if one is.
        chance: probability of a coverage this low or lower if the proteins came from the same source as the
            calibration proteins; None for several targets per protein.
    """

    nominal: float
    found: Interval
    mean_width: float
    chance: float | None


def merge_seeds(predicted_SM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the sample standard deviation over seeds, (M,) each; the latter is 0 for a single seed."""
    if len(predicted_SM) == 1:
        return predicted_SM[0], np.zeros(predicted_SM.shape[1:])
    exponent_M = np.frexp(np.abs(predicted_SM).max(0))[1]  # dividing by powers of two is exact; squares stay finite
    return predicted_SM.mean(0), np.ldexp(np.ldexp(predicted_SM, -exponent_M).std(0, ddof=1), exponent_M)


def choose_scores(truth_M: np.ndarray, predicted_SM: np.ndarray, protein_M: np.ndarray) -> ConformalScores:
    """Compute the conformal scores of calibration targets, of constant width or in proportion to the spread of seeds.

    The spread of the seeds is used if its intervals are at least 5% narrower on average at a coverage of 0.9, and
    there are at least 40 proteins to compare on.

    Args:
        truth_M: (M,) measured values of proteins that the model was not trained on.
        predicted_SM: (S, M) predictions of each seed.
        protein_M: (M,) protein of each target.

    Returns:
        The scores.
    """
    mean_M, spread_M = merge_seeds(predicted_SM)
    error_M = np.abs(truth_M - mean_M)
    constant = ConformalScores.from_errors(error_M, protein_M)
    offset = float(spread_M.mean()) if len(spread_M) else 0.0
    if len(predicted_SM) == 1 or constant.num_proteins < FEWEST_TO_CHOOSE or not offset > 0:
        return constant
    varying = ConformalScores.from_errors(error_M / (spread_M + offset), protein_M, True, offset)
    widths = [scores.half_widths(COVERAGE, spread_M).mean() for scores in (varying, constant)]
    return varying if widths[0] <= NARROWER * widths[1] else constant


def measure_coverage(
    truth_M: np.ndarray,
    predicted_M: np.ndarray,
    half_M: np.ndarray,
    protein_M: np.ndarray,
    coverage: float,
    num_calibration: int,
    counts_RP: np.ndarray | None = None,
) -> Coverage:
    """Measure the share of targets whose interval contains the measured value; every protein counts once.

    Args:
        truth_M: (M,) measured values.
        predicted_M: (M,) predictions.
        half_M: (M,) half widths of the intervals.
        protein_M: (M,) protein of each target, numbered from 0.
        coverage: coverage that was asked for.
        num_calibration: number of calibration proteins.
        counts_RP: bootstrap counts, for pairs of proteins, which are not independent. None samples the proteins.

    Returns:
        The coverage, with the exact binomial interval for one independent target per protein, and otherwise with a
        bootstrap interval.
    """
    covered_M = np.abs(truth_M - predicted_M) <= half_M
    size_P = np.bincount(protein_M)
    share_P = (np.bincount(protein_M, covered_M) / np.maximum(size_P, 1))[size_P > 0]
    width = 2 * float(half_M.mean())
    if (size_P > 1).any() or counts_RP is not None:
        counts_RP = sample_counts(len(share_P)) if counts_RP is None else counts_RP
        total_R = counts_RP.sum(axis=1)
        replicates = (counts_RP @ share_P)[total_R > 0] / total_R[total_R > 0]  # a replicate may have no pair
        low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Coverage(coverage, Interval(float(share_P.mean()), float(low), float(high)), width, None)
    hits, total = int(covered_M.sum()), len(covered_M)
    found = compute_binomial_interval(hits, total)
    return Coverage(coverage, found, width, compute_coverage_chance(hits, total, num_calibration, coverage))


def compute_binomial_interval(hits: int, total: int) -> Interval:
    """Compute the exact 95% interval of a share, of Clopper and Pearson."""
    from scipy.stats import beta

    low = beta.ppf((1 - CONFIDENCE) / 2, hits, total - hits + 1) if hits else 0.0
    high = beta.ppf((1 + CONFIDENCE) / 2, hits + 1, total - hits) if hits < total else 1.0
    return Interval(hits / total, float(low), float(high))


def compute_coverage_chance(hits: int, total: int, num_calibration: int, coverage: float) -> float:
    """Compute the probability that at most `hits` of `total` targets are covered, if all proteins are exchangeable.

    The coverage that n calibration proteins give has a beta distribution, Beta(k, n + 1 - k) for the k-th smallest
    error, so that the number of covered test targets is beta-binomial.

    Args:
        hits: number of covered test targets, one per protein.
        total: number of test targets.
        num_calibration: n.
        coverage: coverage that was asked for.

    Returns:
        The probability; 1 if the intervals are infinite.

    Source:
        Vovk 2012, arXiv:1209.2673.
    """
    from scipy.stats import betabinom

    place = math.ceil((num_calibration + 1) * coverage - ROUNDING)
    if place > num_calibration:
        return 1.0
    return float(betabinom.cdf(hits, total, place, num_calibration + 1 - place))


def compare_distributions(first_N: np.ndarray, second_M: np.ndarray) -> float:
    """Return the p value of the Kolmogorov-Smirnov test that two samples have one distribution."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(first_N, second_M).pvalue)
