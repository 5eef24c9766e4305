"""Metrics agree with scikit-learn and scipy on each replicate; intervals have their is_nominal coverage."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import multiclass_matthews_corrcoef

from esm2kit.tasks.metrics import (
    CLASS_METRICS,
    VALUE_METRICS,
    build_class_scorer,
    build_value_scorer,
    compute_interval,
    compute_paired_difference,
    compute_per_class,
    sample_counts,
    score_seeds,
    unpack_bits,
)


def sk_classes(truth, predicted):
    return {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, average="macro", zero_division=0),
        "mcc": sk.matthews_corrcoef(truth, predicted),
    }


def sk_values(truth, predicted, floor):
    return {
        "spearman": stats.spearmanr(truth, predicted).statistic,
        "pearson": stats.pearsonr(truth, predicted).statistic,
        "rmse": sk.root_mean_squared_error(truth, predicted),
        "r2": sk.r2_score(truth, predicted),
        "ndcg": sk.ndcg_score([truth - floor], [predicted]),
    }


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 6), size=st.integers(4, 60))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_class_metrics_agree_with_scikit_learn_on_every_replicate(seed, classes, size):
    generator = np.random.default_rng(seed)
    truth, predicted = generator.integers(0, classes, (2, size))
    protein = generator.integers(0, 5, size)
    counts = np.vstack([np.ones((1, 5), int), sample_counts(5, 3, seed)])
    found = build_class_scorer(truth, predicted, protein, 5, classes)(counts)
    for replicate, count in enumerate(counts):
        repeated = np.repeat(np.arange(size), count[protein])
        if not repeated.size:
            continue
        expected = sk_classes(truth[repeated], predicted[repeated])
        for name in CLASS_METRICS:
            assert found[name][replicate] == pytest.approx(expected[name], abs=1e-9), name


@given(seed=st.integers(0, 10_000), size=st.integers(5, 60), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_value_metrics_agree_with_scipy_and_scikit_learn_on_every_replicate(seed, size, ties):
    generator = np.random.default_rng(seed)
    truth, predicted = generator.normal(size=(2, size))
    if ties:
        truth, predicted = truth.round(0), predicted.round(0)
    protein = np.arange(size)
    counts = np.vstack([np.ones((1, size), int), sample_counts(size, 3, seed)])
    found = build_value_scorer(truth, predicted, protein)(counts)
    for replicate, count in enumerate(counts):
        repeated = np.repeat(np.arange(size), count)
        if np.ptp(truth[repeated]) == 0 or np.ptp(predicted[repeated]) == 0:
            assert np.isnan(found["spearman"][replicate])
            continue
        expected = sk_values(truth[repeated], predicted[repeated], truth.min())
        for name in VALUE_METRICS:
            assert found[name][replicate] == pytest.approx(expected[name], abs=1e-9), name


def test_metrics_agree_with_torchmetrics():
    generator = np.random.default_rng(0)
    truth, predicted = generator.normal(size=(2, 200))
    ones = np.ones((1, 200), int)
    first = build_value_scorer(truth, predicted, np.arange(200))(ones)["spearman"][0]
    assert first == pytest.approx(float(spearman_corrcoef(torch.tensor(predicted), torch.tensor(truth))), abs=1e-6)
    classes = generator.integers(0, 4, (2, 200))
    first = build_class_scorer(*classes, np.arange(200), 200, 4)(ones)["mcc"][0]
    second = multiclass_matthews_corrcoef(torch.tensor(classes[1]), torch.tensor(classes[0]), num_classes=4)
    assert first == pytest.approx(float(second), abs=1e-6)


def test_binary_labels_are_scored_separately():
    generator = np.random.default_rng(1)
    truth, predicted = generator.integers(0, 8, (2, 300))
    found = build_class_scorer(truth, predicted, np.arange(300), 300, 8, num_bits=3)(np.ones((1, 300), int))
    bits = [(unpack_bits(truth, 3)[:, b], unpack_bits(predicted, 3)[:, b]) for b in range(3)]
    assert found["macro_f1"][0] == pytest.approx(np.mean([sk.f1_score(*pair) for pair in bits]))
    assert found["mcc"][0] == pytest.approx(np.mean([sk.matthews_corrcoef(*pair) for pair in bits]))
    assert found["accuracy"][0] == pytest.approx(sk.accuracy_score(truth, predicted))


def test_per_class_agrees_with_scikit_learn():
    generator = np.random.default_rng(2)
    truth, predicted = generator.integers(0, 3, (2, 90))
    table = compute_per_class(truth, predicted, ("a", "b", "c"))
    expected = sk.precision_recall_fscore_support(truth, predicted)
    for place, label in enumerate("abc"):
        for key, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
            assert table[label][key] == pytest.approx(column[place])


def test_predicting_the_mean_gives_no_rank_correlation_and_no_r2():
    truth = np.random.default_rng(3).normal(size=50)
    scores = score_seeds([build_value_scorer(truth, np.full(50, truth.mean()), np.arange(50))], sample_counts(50, 200))
    assert np.isnan(scores["spearman"].interval.value)
    assert scores["r2"].interval.value == pytest.approx(0, abs=1e-12)


def test_the_interval_has_its_nominal_coverage():
    """300 simulated test sets: accuracy 0.7 with correlated residues, and a Pearson r of 0.6."""
    generator = np.random.default_rng(4)
    runs, num_proteins = 300, 120
    counts = sample_counts(num_proteins, 300)
    protein = np.repeat(np.arange(num_proteins), 10)
    covered = {"accuracy": 0, "pearson": 0}
    for _ in range(runs):
        share = generator.beta(7, 3, num_proteins)[protein]  # all residues of a protein are equally difficult
        right = generator.random(len(protein)) < share
        scorer = build_class_scorer(np.zeros(len(protein), int), (~right).astype(int), protein, num_proteins, 2)
        found = score_seeds([scorer], counts)["accuracy"].interval
        covered["accuracy"] += found.low <= 0.7 <= found.high
        x = generator.normal(size=num_proteins)
        y = 0.6 * x + 0.8 * generator.normal(size=num_proteins)
        found = score_seeds([build_value_scorer(y, x, np.arange(num_proteins))], counts)["pearson"].interval
        covered["pearson"] += found.low <= 0.6 <= found.high
    # three standard errors of a share of 0.95 in 300 runs are 0.038; percentile intervals are slightly too narrow
    for name, hits in covered.items():
        assert 0.90 <= hits / runs <= 0.985, (name, hits / runs)


def is_nominal(hits, runs):
    """Whether the number of hits is consistent with a coverage of 95%, at a significance level of 1e-4."""
    low, high = stats.binom.interval(1 - 1e-4, runs, 0.95)
    return low <= hits <= high


@pytest.mark.parametrize("gap", [0.0, 0.1], ids=["no difference", "a difference"])
def test_the_paired_interval_of_class_predictions_has_its_nominal_coverage(gap):
    """Two models fail on the same proteins. If they are equally good, a miss is a false "beats"."""
    generator = np.random.default_rng(7)
    runs, num_proteins = 400, 120
    counts, protein = sample_counts(num_proteins, 300), np.repeat(np.arange(num_proteins), 10)
    truth, hits = np.zeros(len(protein), int), 0
    for _ in range(runs):
        share = generator.beta(7, 3, num_proteins)[protein]
        first, second = (
            score_seeds(
                [
                    build_class_scorer(
                        truth, (generator.random(len(truth)) > share * ease).astype(int), protein, num_proteins, 2
                    )
                ],
                counts,
            )["accuracy"]
            for ease in (1.0, 1 - gap)
        )
        found = compute_paired_difference("accuracy", first, second)
        hits += found.low <= 0.7 * gap <= found.high
    assert is_nominal(hits, runs), hits / runs


def test_the_paired_interval_of_value_predictions_has_its_nominal_coverage():
    """Two models share noise and have a Pearson r of 0.8 and 0.7 with the truth; all variances are 1."""
    generator = np.random.default_rng(8)
    runs, num_proteins = 240, 120
    counts, proteins = sample_counts(num_proteins, 200), np.arange(num_proteins)
    true = {
        "spearman": 6 / np.pi * (np.arcsin(0.8 / 2) - np.arcsin(0.7 / 2)),  # of two normal variables: Pearson 1907
        "rmse": np.sqrt(2 - 2 * 0.7) - np.sqrt(2 - 2 * 0.8),
    }
    hits = dict.fromkeys(true, 0)
    for _ in range(runs):
        truth, shared, own = generator.normal(size=(3, num_proteins))
        pairs = 0.8 * truth + 0.6 * shared, 0.7 * truth + np.sqrt(1 - 0.7**2) * (0.8 * shared + 0.6 * own)
        first, second = (score_seeds([build_value_scorer(truth, p, proteins)], counts) for p in pairs)
        for metric, difference in true.items():
            found = compute_paired_difference(metric, first[metric], second[metric])
            hits[metric] += found.low <= difference <= found.high
    for metric, covered in hits.items():
        assert is_nominal(covered, runs), (metric, covered / runs)


def score_with_errors(wrong, num_proteins, counts):
    predicted = (np.arange(num_proteins) < wrong).astype(int)
    truth = np.zeros(num_proteins, int)
    return score_seeds([build_class_scorer(truth, predicted, np.arange(num_proteins), num_proteins, 2)], counts)


def test_a_perfect_score_has_an_interval():
    """If all replicates are equal, the interval is the exact binomial bound of scipy (rule of three)."""
    for num_proteins in (1, 20, 300):
        counts = sample_counts(num_proteins, 400)
        for wrong in (0, num_proteins):
            found = score_with_errors(wrong, num_proteins, counts)["accuracy"].interval
            side = "less" if wrong else "greater"
            exact = stats.binomtest(num_proteins - wrong, num_proteins, alternative=side).proportion_ci(0.95)
            assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert score_with_errors(0, 20, sample_counts(20))["accuracy"].interval.low == pytest.approx(0.861, abs=1e-3)


def test_the_interval_has_its_nominal_coverage_near_a_perfect_score():
    """All outcomes of 20 proteins with their probabilities; the bootstrap alone misses 0.97 half of the time."""
    counts = sample_counts(20, 4000)
    found = [score_with_errors(wrong, 20, counts)["accuracy"].interval for wrong in range(21)]
    assert all(a.low > b.low for a, b in pairwise(found[:15])), "each error lowers the lower end"
    for right in (0.87, 0.9, 0.95, 0.97, 0.99):
        chances = stats.binom.pmf(np.arange(21), 20, 1 - right)
        covered = sum(chance for chance, ends in zip(chances, found, strict=True) if ends.low <= right <= ends.high)
        assert covered > 0.93, right
    assert stats.binom.pmf(0, 20, 0.03) > 0.5, "the probability of no error, where the bootstrap has no width"


def test_other_metrics_with_equal_replicates_have_no_interval():
    found = score_with_errors(0, 20, sample_counts(20, 200))
    assert found["mcc"].interval.value == 0  # one class, no variance
    assert all(np.isnan(found[name].interval.low) for name in ("mcc", "macro_f1", "balanced_accuracy"))
    truth = np.arange(30.0)
    ranked = score_seeds([build_value_scorer(truth, truth * 2, np.arange(30))], sample_counts(30, 200))
    assert ranked["spearman"].interval.value == pytest.approx(1)
    assert np.isnan(ranked["spearman"].interval.high)
    assert ranked["rmse"].interval.low < ranked["rmse"].interval.high


def test_the_difference_of_two_models_that_never_differ_has_an_interval():
    counts = sample_counts(20, 200)
    first, second = (score_with_errors(wrong, 20, counts)["accuracy"] for wrong in (0, 20))
    assert compute_paired_difference("accuracy", first, first) == pytest.approx((0, -0.139, 0.139), abs=1e-3)
    assert compute_paired_difference("accuracy", first, second) == pytest.approx((1, 1 - 2 * 0.139, 1), abs=1e-3)


def test_resampling_residues_would_be_overconfident():
    """Residues of a protein are correlated, so an interval over residues misses the truth far too often."""
    generator = np.random.default_rng(5)
    num_proteins, hits = 60, 0
    protein = np.repeat(np.arange(num_proteins), 50)
    residues = np.arange(len(protein))
    counts = sample_counts(len(protein), 200)
    for _ in range(60):
        share = generator.beta(1.4, 0.6, num_proteins)[protein]
        right = generator.random(len(protein)) < share
        scorer = build_class_scorer(np.zeros(len(protein), int), (~right).astype(int), residues, len(protein), 2)
        found = score_seeds([scorer], counts)["accuracy"].interval
        hits += found.low <= 0.7 <= found.high
    assert hits / 60 < 0.6


def test_a_paired_interval_is_narrower_and_counts_larger_errors_as_worse():
    generator = np.random.default_rng(6)
    truth = generator.normal(size=300)
    shared = truth + generator.normal(size=300)
    counts = sample_counts(300, 500)
    good, bad = (
        score_seeds([build_value_scorer(truth, p, np.arange(300))], counts) for p in (shared, shared * 1.1 + 0.05)
    )
    difference = compute_paired_difference("rmse", good["rmse"], bad["rmse"])
    assert difference.low > 0  # the first model has the smaller error, so it is better
    width = good["rmse"].interval.high - good["rmse"].interval.low
    assert difference.high - difference.low < width / 3
    mirrored = compute_paired_difference("rmse", bad["rmse"], good["rmse"])
    assert mirrored.value == -difference.value


def test_seeds_are_averaged_and_their_spread_is_reported():
    truth = np.arange(20) % 2
    predictions = [truth, 1 - truth, truth]
    scorers = [build_class_scorer(truth, p, np.arange(20), 20, 2) for p in predictions]
    score = score_seeds(scorers, sample_counts(20, 100))["accuracy"]
    assert score.seeds == (1.0, 0.0, 1.0)
    assert score.interval.value == pytest.approx(2 / 3)
    assert score.seed_spread == pytest.approx(np.std([1, 0, 1], ddof=1))


def test_replicates_have_the_correct_size_and_depend_on_the_seed():
    counts = sample_counts(40, 150, seed=3)
    assert counts.shape == (150, 40)
    assert (counts.sum(1) == 40).all()
    assert (counts == sample_counts(40, 150, seed=3)).all()
    assert (counts != sample_counts(40, 150, seed=4)).any()


def test_an_interval_ignores_undefined_replicates():
    found = compute_interval(0.5, np.array([np.nan, 0.4, 0.5, 0.6]))
    assert 0.4 <= found.low < found.high <= 0.6
