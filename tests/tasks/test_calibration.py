"""Calibration equals scikit-learn and torchmetrics, and its intervals and claims hold in simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from esm2kit.tasks.calibration import (
    FEWEST_PROTEINS,
    Events,
    build_reliability,
    choose_temperature,
    compute_brier_scores,
    compute_calibration_error,
    compute_log_probabilities,
    compute_losses,
    fit_temperature,
    list_events,
    resample_calibration_error,
    score_calibration,
)
from esm2kit.tasks.metrics import sample_counts

DRAWS = 200


def sample_classes(seed: int, num: int = 300, classes: int = 4, temperature: float = 1.0):
    """Sample logits (num, classes) and labels for which logits / temperature are right."""
    generator = np.random.default_rng(seed)
    logits_MC = generator.normal(size=(num, classes)) * 2
    probability_MC = np.exp(compute_log_probabilities(logits_MC, temperature=temperature))
    truth_M = (generator.random(num)[:, None] > probability_MC.cumsum(1)).sum(1)
    return logits_MC, np.minimum(truth_M, classes - 1)


def sample_labels(seed: int, num: int = 300, labels: int = 3):
    generator = np.random.default_rng(seed)
    logits_ML = generator.normal(size=(num, labels)) * 2
    return logits_ML, (generator.random((num, labels)) < 1 / (1 + np.exp(-0.6 * logits_ML))).astype(np.int64)


def test_classes_equal_torchmetrics_and_scikit_learn() -> None:
    logits_MC, truth_M = sample_classes(1, temperature=1.7)
    probability_MC = np.exp(compute_log_probabilities(logits_MC))
    events = list_events(probability_MC, truth_M, np.arange(len(truth_M)))
    expected = MulticlassCalibrationError(4, n_bins=15)(torch.from_numpy(probability_MC), torch.from_numpy(truth_M))
    assert compute_calibration_error(events) == pytest.approx(float(expected), abs=1e-6)
    assert compute_losses(logits_MC, truth_M).mean() == pytest.approx(log_loss(truth_M, probability_MC), rel=1e-12)
    brier = brier_score_loss(truth_M, probability_MC, labels=range(4), scale_by_half=False)
    assert compute_brier_scores(probability_MC, truth_M).mean() == pytest.approx(brier, rel=1e-12)


def test_binary_labels_equal_torchmetrics_and_scikit_learn() -> None:
    logits_ML, truth_ML = sample_labels(2)
    probability_ML = np.exp(compute_log_probabilities(logits_ML, binary=True))
    events = list_events(probability_ML, truth_ML, np.arange(len(truth_ML)))
    expected = BinaryCalibrationError(n_bins=15)(
        torch.from_numpy(probability_ML.ravel()), torch.from_numpy(truth_ML.ravel())
    )
    assert compute_calibration_error(events) == pytest.approx(float(expected), abs=1e-6)
    assert compute_losses(logits_ML, truth_ML).mean() == pytest.approx(
        log_loss(truth_ML.ravel(), probability_ML.ravel())
    )
    brier = brier_score_loss(truth_ML.ravel(), probability_ML.ravel())
    assert compute_brier_scores(probability_ML, truth_ML).mean() == pytest.approx(brier, rel=1e-12)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_reliability_equals_scikit_learn(equal_mass) -> None:
    logits_MC, truth_M = sample_classes(3, temperature=2.0)
    events = list_events(np.exp(compute_log_probabilities(logits_MC)), truth_M, np.arange(len(truth_M)))
    accuracy, confidence = calibration_curve(
        events.happened_E, events.probability_E, n_bins=15, strategy="quantile" if equal_mass else "uniform"
    )
    bins = [each for each in build_reliability(events, equal_mass=equal_mass) if each.count]
    assert [each.accuracy for each in bins] == pytest.approx(accuracy.tolist())
    assert [each.confidence for each in bins] == pytest.approx(confidence.tolist())
    assert sum(each.count for each in bins) == 300
    assert sum(each.share for each in bins) == pytest.approx(1)
    error = sum(each.share * abs(each.accuracy - each.confidence) for each in bins)
    assert compute_calibration_error(events, equal_mass=equal_mass) == pytest.approx(error)


def test_a_worked_example() -> None:
    """Three events in two bins: 0.9 and 0.9 with one hit, 0.5 with a hit: (2 x 0.4 + 1 x 0.5) / 3."""
    probability_MC, truth_M = np.array([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]), np.array([0, 1, 0])
    events = list_events(probability_MC, truth_M, np.arange(3))
    assert compute_calibration_error(events) == pytest.approx((2 * 0.4 + 0.5) / 3)
    assert compute_brier_scores(probability_MC, truth_M).tolist() == pytest.approx([0.02, 1.62, 0.5])


def test_replicates_without_a_target_are_left_out() -> None:
    """Pairs whose two proteins never occur together in a replicate: their scores are undefined there."""
    logits_MC, wrong_M, mixed_M = np.log([[0.9, 0.1]] * 8), np.ones(8, dtype=int), np.arange(8) % 2
    counts_RP = sample_counts(8, 100)
    counts_RP[::2] = 0
    found = score_calibration(logits_MC, wrong_M, np.arange(8), counts_RP)
    for interval, value in ((found.brier, 1.62), (found.nll, -np.log(0.1))):
        assert tuple(interval) == pytest.approx((value, value, value))
    # the sum of eight random signs is at least 6 with a probability of 3.5%, and 8 with one of 0.4%
    assert found.ece == pytest.approx((0.9, 0.9 * (1 - 6 / 8), 1.0), abs=1e-5)
    with_empty, without = (
        score_calibration(logits_MC, mixed_M, np.arange(8), kept) for kept in (counts_RP, counts_RP[1::2])
    )
    assert (with_empty.nll, with_empty.brier) == (without.nll, without.brier)


@pytest.mark.parametrize("binary", [False, True])
def test_the_temperature_has_the_lowest_loss(binary) -> None:
    logits, truth = sample_labels(4) if binary else sample_classes(4, temperature=2.5)
    found = fit_temperature(logits, truth)
    tried = np.geomspace(0.1, 10, 4000)
    best = tried[np.argmin([compute_losses(logits, truth, temperature).mean() for temperature in tried])]
    assert found == pytest.approx(best, rel=2e-3)


def test_a_planted_temperature_is_found_and_repairs_the_probabilities() -> None:
    logits_MC, truth_M = sample_classes(5, 5000, temperature=2.5)
    found = choose_temperature(logits_MC, truth_M, np.arange(5000))
    assert found.helps
    assert found.value == pytest.approx(2.5, rel=0.06)
    test_logits_MC, test_truth_M = sample_classes(6, 5000, temperature=2.5)
    counts_RP = sample_counts(5000, 100)
    before = score_calibration(test_logits_MC, test_truth_M, np.arange(5000), counts_RP)
    after = score_calibration(test_logits_MC, test_truth_M, np.arange(5000), counts_RP, found.value)
    assert before.ece.value > 0.2
    assert not before.is_chance
    assert before.ece.low > 0.15
    assert after.ece.value < 0.03
    assert after.nll.value < before.nll.value
    assert after.brier.value < before.brier.value


def test_right_probabilities_are_left_as_they_are() -> None:
    """At most 5% of 200 models whose probabilities are right may be scaled; of those that are wrong, most are."""
    claimed = [choose_temperature(*sample_classes(seed, 100), np.arange(100)).helps for seed in range(DRAWS)]
    assert sum(claimed) <= binom.ppf(0.975, DRAWS, 0.05)
    wrong = [choose_temperature(*sample_classes(s, 100, temperature=2.5), np.arange(100)).helps for s in range(50)]
    assert sum(wrong) >= 45


def test_too_few_proteins_and_perfect_predictions_have_no_temperature() -> None:
    logits_MC, truth_M = sample_classes(7, 400)
    few = choose_temperature(logits_MC, truth_M, np.arange(400) % (FEWEST_PROTEINS - 1))
    assert few.value is None
    assert not few.helps
    assert f"{FEWEST_PROTEINS - 1} validation proteins are too few" in few.reason
    right = choose_temperature(logits_MC, logits_MC.argmax(1), np.arange(400))
    assert right.value is None
    assert not right.helps
    assert "are right" in right.reason


def test_the_interval_of_a_large_error_is_that_of_a_mean() -> None:
    """All events in one bin: the error is the difference of two means, without bias."""
    happened_E = np.arange(400) % 4 != 0
    events = Events(np.full(400, 0.55), happened_E, np.arange(400))
    found = resample_calibration_error(events, sample_counts(400, 4000)).interval
    half = 1.96 * np.sqrt(np.square(happened_E - 0.55).mean() / 400)
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=0.004)


def test_certain_and_right_predictions_have_no_error() -> None:
    events = Events(np.ones(50), np.ones(50, bool), np.arange(50))
    assert resample_calibration_error(events, sample_counts(50, 100)).interval == (0, 0, 0)


def test_the_interval_of_a_small_error_is_corrected_for_the_bias() -> None:
    """Of few proteins the error is twice as large as it would be on many; reflected replicates cover 84% to 90%."""
    many = sample_labels(0, 200_000)
    truth = compute_calibration_error(list_events(1 / (1 + np.exp(-many[0])), many[1], np.arange(200_000)))
    values, covered = [], 0
    for seed in range(DRAWS):
        logits_ML, truth_ML = sample_labels(1000 + seed, 60)
        events = list_events(1 / (1 + np.exp(-logits_ML)), truth_ML, np.arange(60))
        found = resample_calibration_error(events, sample_counts(60, 200, seed)).interval
        values.append(found.value)
        covered += found.low <= truth <= found.high
    assert np.mean(values) > 1.25 * truth
    assert covered >= binom.ppf(0.01, DRAWS, 0.95)


def test_intervals_cover_in_simulation() -> None:
    """The 95% intervals of Brier score and NLL, and with fewer promises that of the calibration error."""
    large = sample_classes(0, 400_000, temperature=1.8)
    probability_MC = np.exp(compute_log_probabilities(large[0]))
    truths = {
        "nll": compute_losses(*large).mean(),
        "brier": compute_brier_scores(probability_MC, large[1]).mean(),
        "ece": compute_calibration_error(list_events(probability_MC, large[1], np.arange(len(large[1])))),
    }
    covered = dict.fromkeys(truths, 0)
    for seed in range(DRAWS):
        logits_MC, truth_M = sample_classes(1000 + seed, 200, temperature=1.8)
        scores = score_calibration(logits_MC, truth_M, np.arange(200), sample_counts(200, 200, seed))
        for name, value in truths.items():
            interval = getattr(scores, name)
            covered[name] += interval.low <= value <= interval.high
    least = binom.ppf(0.01, DRAWS, 0.95)
    assert covered["nll"] >= least
    assert covered["brier"] >= least
    assert covered["ece"] >= binom.ppf(0.01, DRAWS, 0.91)  # docs/explanation/uncertainty.md states 91 to 99%


def test_the_error_of_right_probabilities_is_recognised_with_dependent_targets() -> None:
    """Five equal targets per protein: the chance error must know that there are 60 and not 300 observations."""
    chance, values, expected = [], [], []
    for seed in range(100):
        logits_MC, truth_M = sample_classes(seed, 60)
        protein_M = np.repeat(np.arange(60), 5)
        events = list_events(
            np.exp(compute_log_probabilities(logits_MC.repeat(5, axis=0))), truth_M.repeat(5), protein_M
        )
        found = resample_calibration_error(events, sample_counts(60, 200, seed))
        chance.append(found.is_chance)
        values.append(found.interval.value)
        expected.append(found.by_chance)
    assert sum(chance) >= binom.ppf(0.005, 100, 0.92)
    assert np.mean(expected) == pytest.approx(np.mean(values), rel=0.15)
