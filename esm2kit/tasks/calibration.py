"""Calibration of class probabilities: reliability diagram, calibration error, Brier score, and temperature scaling.

All functions take plain arrays. The truth is (M,) classes, or (M, L) zeros and ones for binary labels. Each target of
classes is one event, the most probable class is the true one; each binary label is one event, it is true.

Source: Guo et al. 2017, arXiv:1706.04599 (expected calibration error, temperature scaling); Nguyen and O'Connor 2015,
10.18653/v1/D15-1182 (bins of equal mass); definitions of scikit-learn and torchmetrics, with which the tests compare.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.special import log_expit, log_softmax

from esm2kit.tasks.metrics import CONFIDENCE, Interval

NUM_BINS = 15
TEMPERATURES = (0.05, 20.0)  # smallest and largest that is fitted
NUM_FOLDS = 5
NUM_HALVINGS = 20  # of the interval in which an end of a calibration error is searched
FEWEST_PROTEINS = 20  # of validation, to fit a temperature


class Events(NamedTuple):
    """Events that a model gave a probability.

    Args:
        probability_E: (E,) probability of each event.
        happened_E: (E,) whether it happened.
        protein_E: (E,) protein of each event.
    """

    probability_E: np.ndarray
    happened_E: np.ndarray
    protein_E: np.ndarray


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram.

    Args:
        low: lower end of the bin; probabilities above it belong to the bin.
        high: upper end of the bin, which belongs to it.
        count: number of events.
        share: share of the events that are in the bin.
        confidence: mean probability of the events; None for an empty bin.
        accuracy: share of the events that happened.
    """

    low: float
    high: float
    count: int
    share: float
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class CalibrationScores:
    """How well probabilities are calibrated on a set.

    Args:
        ece: expected calibration error of 15 bins of equal width, with its 95% interval over proteins.
        ece_equal_mass: the same with bins of equally many events.
        brier: Brier score: the squared error summed over classes, or the mean over binary labels.
        nll: negative log-likelihood in nats per target.
        by_chance: expected calibration error that calibrated probabilities would have on average on these proteins.
        is_chance: whether the error may be that of calibrated probabilities.
        bins: reliability diagram with bins of equal width.
    """

    ece: Interval
    ece_equal_mass: Interval
    brier: Interval
    nll: Interval
    by_chance: float
    is_chance: bool
    bins: tuple[ReliabilityBin, ...]


class Temperature(NamedTuple):
    """A temperature that was fitted on validation.

    Args:
        value: the temperature; logits are divided by it. None if none was fitted.
        helps: whether it lowers the negative log-likelihood of validation proteins that it was not fitted on.
        gain: by how much, in nats per target, with its 90% interval over proteins.
        num_proteins: number of validation proteins.
        reason: one sentence on why the probabilities are scaled or left as they are.
    """

    value: float | None
    helps: bool
    gain: tuple[float, float, float] | None
    num_proteins: int
    reason: str


def compute_log_probabilities(logits_MC: np.ndarray, binary: bool = False, temperature: float = 1.0) -> np.ndarray:
    """Compute log probabilities (M, C) in float64 of classes, or of binary labels."""
    scaled_MC = np.asarray(logits_MC, dtype=np.float64) / temperature
    return log_expit(scaled_MC) if binary else log_softmax(scaled_MC, axis=1)


def compute_losses(logits_MC: np.ndarray, truth: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Compute the negative log-likelihood of each target (M,) in nats; the mean over binary labels."""
    scaled_MC = np.asarray(logits_MC, dtype=np.float64) / temperature
    if truth.ndim == 2:
        return -np.where(truth > 0, log_expit(scaled_MC), log_expit(-scaled_MC)).mean(1)
    return -log_softmax(scaled_MC, axis=1)[np.arange(len(truth)), truth]


def compute_brier_scores(probability_MC: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute the Brier score of each target (M,): the sum over classes, or the mean over binary labels."""
    if truth.ndim == 2:
        return np.square(probability_MC - truth).mean(1)
    of_truth_M = probability_MC[np.arange(len(truth)), truth]
    return np.square(probability_MC).sum(1) - 2 * of_truth_M + 1


def list_events(probability_MC: np.ndarray, truth: np.ndarray, protein_M: np.ndarray) -> Events:
    """List the events of predictions.

    Args:
        probability_MC: (M, C) probabilities of classes or binary labels.
        truth: (M,) classes, or (M, C) binary labels.
        protein_M: (M,) protein of each target.

    Returns:
        The events: that the most probable class is the true one, or that a binary label is true.
    """
    if truth.ndim == 2:
        return Events(probability_MC.ravel(), truth.ravel() > 0, np.repeat(protein_M, truth.shape[1]))
    return Events(probability_MC.max(1), probability_MC.argmax(1) == truth, protein_M)


def build_edges(probability_E: np.ndarray, num_bins: int = NUM_BINS, equal_mass: bool = False) -> np.ndarray:
    """Return the edges (num_bins + 1,) of bins of equal width from 0 to 1, or with equally many events each."""
    if equal_mass:
        return np.quantile(probability_E, np.linspace(0, 1, num_bins + 1))
    return np.linspace(0, 1, num_bins + 1)


def _assign_bins(probability_E: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin of each event; an upper end belongs to its bin."""
    return np.searchsorted(edges[1:-1], probability_E)


def build_reliability(events: Events, num_bins: int = NUM_BINS, equal_mass: bool = False) -> list[ReliabilityBin]:
    """Build the reliability diagram of events.

    Args:
        events: the events.
        num_bins: number of bins.
        equal_mass: whether bins have equally many events instead of equal widths.

    Returns:
        The bins in order, including empty ones.
    """
    edges = build_edges(events.probability_E, num_bins, equal_mass)
    bin_E = _assign_bins(events.probability_E, edges)
    count_B = np.bincount(bin_E, minlength=num_bins)
    sums = [np.bincount(bin_E, weights, num_bins) for weights in (events.probability_E, events.happened_E)]
    bins = []
    for place, count in enumerate(count_B.tolist()):
        confidence, accuracy = (float(sum_B[place] / count) if count else None for sum_B in sums)
        ends = float(edges[place]), float(edges[place + 1])
        bins.append(ReliabilityBin(*ends, count, count / len(bin_E), confidence, accuracy))
    return bins


def compute_calibration_error(events: Events, num_bins: int = NUM_BINS, equal_mass: bool = False) -> float:
    """Compute the expected calibration error: the mean over events of |accuracy - mean probability| of their bin."""
    bin_E = _assign_bins(events.probability_E, build_edges(events.probability_E, num_bins, equal_mass))
    gap_B = np.bincount(bin_E, events.happened_E - events.probability_E, num_bins)
    return float(np.abs(gap_B).sum() / len(bin_E))


def _drop_empty(counts_RP: np.ndarray, size_P: np.ndarray) -> np.ndarray:
    """Leave out replicates without a target: those of pairs whose two proteins never occur together."""
    return counts_RP[counts_RP @ size_P > 0]


def _resample_means(values_M: np.ndarray, protein_M: np.ndarray, counts_RP: np.ndarray) -> Interval:
    """Return the mean of values with the percentile interval over the proteins of bootstrap replicates."""
    num_proteins = counts_RP.shape[1]
    sums_P, sizes_P = np.bincount(protein_M, values_M, num_proteins), np.bincount(protein_M, minlength=num_proteins)
    counts_RP = _drop_empty(counts_RP, sizes_P)
    replicates = (counts_RP @ sums_P) / (counts_RP @ sizes_P)
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values_M.mean()), float(low), float(high))


class CalibrationError(NamedTuple):
    """A calibration error, compared with that of calibrated probabilities.

    Args:
        interval: the error with its 95% interval.
        by_chance: the error that calibrated probabilities would have on average on as many proteins. It is never 0,
            because the share of a bin varies.
        is_chance: whether calibrated probabilities have such an error in more than 5% of all samples.
    """

    interval: Interval
    by_chance: float
    is_chance: bool


def _invert_error(value: float, gap_B: np.ndarray, deviation_BR: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval of a calibration error by inverting a test.

    The gaps of the bins are multiplied by a common factor, and deviations are added. The interval has the errors of all
    factors for which the observed error is between the 2.5th and the 97.5th percentile of the errors with deviations.

    Args:
        value: the observed error.
        gap_B: (B,) accuracy minus mean probability of each bin, times its share of the events.
        deviation_BR: (B, R) random deviations of the gaps.

    Returns:
        The ends, around the value.
    """
    tail = (1 - CONFIDENCE) / 2

    def reaches(factor: float, level: float) -> bool:
        errors_R = np.abs(factor * gap_B[:, None] + deviation_BR).sum(0)
        return float(np.quantile(errors_R, level)) >= value

    def find(low: float, high: float, level: float) -> float:
        if reaches(low, level):
            return low
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(middle, level) else (middle, high)
        return high

    noise_R = np.abs(deviation_BR).sum(0)
    if value == 0:
        return 0.0, float(np.quantile(noise_R, 1 - tail))
    largest = 1 + float(noise_R.max()) / value  # a larger factor has larger errors in all replicates
    return value * find(0.0, 1.0, 1 - tail), value * find(1.0, largest, tail)


def resample_calibration_error(events: Events, counts_RP: np.ndarray, equal_mass: bool = False) -> CalibrationError:
    """Compute the calibration error with its interval over proteins.

    The error is biased upwards, because chance adds to the gap of every bin, and the bias is the larger, the smaller
    the true gaps are. The interval therefore has the multiples of the observed gaps whose errors are, with this bias,
    not significantly different from the observed error. Chance is simulated by random signs of the differences of each
    protein, which keep the dependence between its targets, and by resampling proteins, or those of pairs; of both
    intervals the lower and the higher end count. The lower end is 0 if the error may be that of calibrated
    probabilities, which is a test with random signs.

    Args:
        events: the events, with proteins numbered from 0.
        counts_RP: (R, P) counts from `metrics.sample_counts`.
        equal_mass: whether bins have equally many events instead of equal widths.

    Returns:
        The error of 15 bins.

    Source:
        Consistency resampling: Bröcker and Smith 2007, 10.1175/WAF993.1; here with a wild bootstrap. Test inversion:
        Carpenter and Bithell 2000, Statistics in Medicine 19, 1141.
    """
    bin_E = _assign_bins(events.probability_E, build_edges(events.probability_E, NUM_BINS, equal_mass))
    num_proteins, num_events = counts_RP.shape[1], len(bin_E)
    gaps_BP = coo_matrix(
        (events.happened_E - events.probability_E, (bin_E, events.protein_E)), shape=(NUM_BINS, num_proteins)
    ).tocsr()
    size_P = np.bincount(events.protein_E, minlength=num_proteins)
    gap_B = np.asarray(gaps_BP.sum(1)).ravel() / num_events
    value = float(np.abs(gap_B).sum())
    signs_PR = np.random.default_rng(0).choice([-1.0, 1.0], (num_proteins, len(counts_RP)))
    chance_BR = gaps_BP @ signs_PR / num_events
    counts_RP = _drop_empty(counts_RP, size_P)
    resampled_BR = gaps_BP @ counts_RP.T.astype(np.float64) / (counts_RP @ size_P) - gap_B[:, None]
    chance_R = np.abs(chance_BR).sum(0)
    is_chance = value <= float(np.quantile(chance_R, CONFIDENCE))
    lows, highs = zip(*(_invert_error(value, gap_B, found_BR) for found_BR in (chance_BR, resampled_BR)), strict=True)
    interval = Interval(value, 0.0 if is_chance else min(lows), min(1.0, max(highs)))
    return CalibrationError(interval, float(chance_R.mean()), is_chance)


def score_calibration(
    logits_MC: np.ndarray, truth: np.ndarray, protein_M: np.ndarray, counts_RP: np.ndarray, temperature: float = 1.0
) -> CalibrationScores:
    """Score the probabilities of a model, with 95% bootstrap intervals over proteins.

    Args:
        logits_MC: (M, C) logits of classes or binary labels.
        truth: (M,) classes, or (M, C) binary labels.
        protein_M: (M,) protein of each target, numbered from 0.
        counts_RP: (R, P) counts from `metrics.sample_counts`.
        temperature: logits are divided by it.

    Returns:
        The scores and the reliability diagram.
    """
    log_MC = compute_log_probabilities(logits_MC, truth.ndim == 2, temperature)
    probability_MC = np.exp(log_MC)
    events = list_events(probability_MC, truth, protein_M)
    error = resample_calibration_error(events, counts_RP)
    return CalibrationScores(
        error.interval,
        resample_calibration_error(events, counts_RP, equal_mass=True).interval,
        _resample_means(compute_brier_scores(probability_MC, truth), protein_M, counts_RP),
        _resample_means(compute_losses(logits_MC, truth, temperature), protein_M, counts_RP),
        error.by_chance,
        error.is_chance,
        tuple(build_reliability(events)),
    )


def fit_temperature(logits_MC: np.ndarray, truth: np.ndarray) -> float:
    """Fit the temperature with the lowest mean negative log-likelihood, between 0.05 and 20.

    Args:
        logits_MC: (M, C) logits of classes or binary labels.
        truth: (M,) classes, or (M, C) binary labels.

    Returns:
        The temperature. The likelihood is convex in its inverse, so it is the only minimum.
    """
    from scipy.optimize import minimize_scalar  # slow import

    def loss(log_temperature: float) -> float:
        return float(compute_losses(logits_MC, truth, math.exp(log_temperature)).mean())

    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def choose_temperature(
    logits_MC: np.ndarray, truth: np.ndarray, protein_M: np.ndarray, noun: str = "validation proteins"
) -> Temperature:
    """Fit a temperature on validation, and find out by cross-fitting whether it helps.

    The proteins are divided into five folds. Each fold is scored with the temperature of the other four. It helps if
    the mean gain in likelihood is above 0 with 95% confidence (one-sided, over proteins), so that a model whose
    probabilities are right is scaled in at most 5% of all cases.

    Args:
        logits_MC: (M, C) logits of the validation targets.
        truth: (M,) classes, or (M, C) binary labels.
        protein_M: (M,) protein of each target.
        noun: what the proteins are, for the reason.

    Returns:
        The temperature fitted on all proteins, and whether it helps.
    """
    place_M = np.unique(protein_M, return_inverse=True)[1].reshape(-1)
    num_proteins = int(place_M.max(initial=-1)) + 1
    if num_proteins < FEWEST_PROTEINS:
        reason = f"{num_proteins} {noun} are too few to fit a temperature (at least {FEWEST_PROTEINS})"
        return Temperature(None, False, None, num_proteins, reason)
    if truth.ndim == 2:
        is_right = bool(((logits_MC > 0) == (truth > 0)).all())
    else:
        is_right = bool((logits_MC.argmax(1) == truth).all())
    if is_right:
        reason = f"all predictions of the {num_proteins} {noun} are right, so no temperature can be fitted"
        return Temperature(None, False, None, num_proteins, reason)
    fold_P = np.random.default_rng(0).permutation(num_proteins) % NUM_FOLDS
    gain_M = compute_losses(logits_MC, truth)
    for fold in range(NUM_FOLDS):
        held = fold_P[place_M] == fold
        gain_M[held] -= compute_losses(logits_MC[held], truth[held], fit_temperature(logits_MC[~held], truth[~held]))
    gain = _estimate_ratio(gain_M, place_M, num_proteins)
    value, helps = fit_temperature(logits_MC, truth), gain[1] > 0
    lowers = "lowers" if helps else "does not reliably lower"
    reason = f"it {lowers} the negative log-likelihood of {noun} that it was not fitted on "
    reason += f"({num_proteins} proteins, five folds)"
    return Temperature(value, helps, gain, num_proteins, reason)


def _estimate_ratio(values_M: np.ndarray, place_M: np.ndarray, num_proteins: int) -> tuple[float, float, float]:
    """Return the mean over targets with its 90% t interval over proteins."""
    from scipy.stats import t as student

    sums_P, sizes_P = np.bincount(place_M, values_M, num_proteins), np.bincount(place_M, minlength=num_proteins)
    mean = float(values_M.mean())
    residual_P = (sums_P - mean * sizes_P) / sizes_P.mean()
    error = float(residual_P.std(ddof=1)) / math.sqrt(num_proteins)
    half = float(student.ppf(0.95, num_proteins - 1)) * error
    return mean, mean - half, mean + half
