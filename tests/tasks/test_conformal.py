"""Prediction intervals cover as promised on exchangeable data, and naive ones do not."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn.linear_model import LinearRegression

from esm2kit.tasks.conformal import (
    MOST_SCORES,
    ConformalScores,
    choose_scores,
    compare_distributions,
    compute_binomial_interval,
    compute_coverage_chance,
    count_needed_proteins,
    measure_coverage,
    merge_seeds,
)
from esm2kit.tasks.metrics import sample_counts
from esm2kit.tasks.pairs import sample_pair_counts

DRAWS = 200


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_the_quantile_is_the_finite_sample_order_statistic(coverage) -> None:
    for count in (1, 4, 8, 9, 10, 19, 20, 57, 199):
        errors_N = np.random.default_rng(count).exponential(size=count)
        place = math.ceil(round((count + 1) * coverage, 9))
        expected = np.sort(errors_N)[place - 1] if place <= count else math.inf
        assert ConformalScores.from_errors(errors_N).quantile(coverage) == expected
        assert math.isinf(expected) == (count < count_needed_proteins(coverage))
    assert count_needed_proteins(0.9) == 9
    assert count_needed_proteins(0.95) == 19


def test_every_protein_counts_once() -> None:
    """The weighted quantile of Lee et al.: the targets of protein k have the weight 1 / ((K + 1) m_k)."""
    generator = np.random.default_rng(0)
    protein_N = np.repeat(np.arange(30), generator.integers(1, 20, 30))
    errors_N = generator.exponential(size=len(protein_N)) * (1 + protein_N)
    scores = ConformalScores.from_errors(errors_N, protein_N)
    for coverage in (0.3, 0.7, 0.9):
        weight_N = 1 / (31 * np.bincount(protein_N)[protein_N])
        reached = [error for error in np.sort(errors_N) if weight_N[errors_N <= error].sum() >= coverage - 1e-12]
        assert scores.quantile(coverage) == reached[0]
    assert math.isinf(scores.quantile(0.98))  # 30 of 31 is less


def test_a_file_keeps_the_scores_and_never_narrows_them() -> None:
    few = ConformalScores.from_errors(np.random.default_rng(1).exponential(size=50), None, True, 0.25)
    back = ConformalScores.from_description(few.describe())
    assert back.by_spread
    assert back.offset == 0.25
    assert back.num_proteins == 50
    assert [back.quantile(c) for c in np.linspace(0.01, 0.99, 99)] == [
        few.quantile(c) for c in np.linspace(0.01, 0.99, 99)
    ]
    many = ConformalScores.from_errors(np.random.default_rng(2).exponential(size=30_000))
    thin = ConformalScores.from_description(many.describe())
    assert len(thin.scores_N) == MOST_SCORES
    for coverage in (0.01, 0.5, 0.9, 0.999):
        assert (
            many.quantile(coverage) <= thin.quantile(coverage) <= many.quantile(min(coverage + 2 / MOST_SCORES, 0.9999))
        )


def sample_values(generator, count: int):
    """Sample values whose noise grows with x, and ten predictions that disagree in proportion to the noise."""
    x_N = generator.uniform(0.2, 3, count)
    truth_N = 2 * x_N + x_N * generator.normal(size=count)
    return truth_N, 2 * x_N + 0.5 * x_N * generator.normal(size=(10, count))


@pytest.mark.parametrize("kind", ["constant", "spread"])
def test_intervals_cover_as_promised_and_the_spread_of_seeds_alone_does_not(kind) -> None:
    covered, naive, widths = [], [], []
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        (truth_N, predicted_SN), (truth_M, predicted_SM) = sample_values(generator, 60), sample_values(generator, 100)
        if kind == "constant":
            predicted_SN, predicted_SM = predicted_SN[:1], predicted_SM[:1]
        scores = choose_scores(truth_N, predicted_SN, np.arange(60))
        mean_M, spread_M = merge_seeds(predicted_SM)
        found = measure_coverage(truth_M, mean_M, scores.half_widths(0.9, spread_M), np.arange(100), 0.9, 60)
        covered.append(found.found.value)
        widths.append(scores.by_spread)
        naive.append(np.mean(np.abs(truth_M - mean_M) <= 1.645 * spread_M))
    error = np.std(covered, ddof=1) / math.sqrt(DRAWS)
    # (n + 1) 0.9 = 54.9, so the promise is 55 / 61
    assert np.mean(covered) == pytest.approx(55 / 61, abs=2.6 * error)
    if kind == "spread":
        assert np.mean(widths) > 0.6  # the spread of the seeds gives narrower intervals, so it is used
        assert np.mean(naive) < 0.8
    else:
        assert not any(widths)


def test_a_single_target_per_draw_is_covered_within_its_binomial_interval() -> None:
    """The promise is on average over calibration sets: 200 of them, one new target each."""
    hits = 0
    for seed in range(DRAWS):
        generator = np.random.default_rng(10_000 + seed)
        error_N = np.abs(generator.standard_t(2, 20))
        hits += abs(generator.standard_t(2)) <= ConformalScores.from_errors(error_N[1:]).quantile(0.9)
    low, high = binom.interval(0.99, DRAWS, 18 / 20)
    assert low <= hits <= high


def test_the_errors_of_training_proteins_give_intervals_that_are_too_narrow() -> None:
    """A linear model with 30 features on 60 proteins: training errors are much smaller than those on new proteins."""
    promised, naive = [], []
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        x_ND, y_N = generator.normal(size=(200, 30)), generator.normal(size=200)
        model = LinearRegression().fit(x_ND[:60], y_N[:60])
        error_N = np.abs(y_N - model.predict(x_ND))
        promised.append(np.mean(error_N[120:] <= ConformalScores.from_errors(error_N[60:120]).quantile(0.9)))
        naive.append(np.mean(error_N[120:] <= ConformalScores.from_errors(error_N[:60]).quantile(0.9)))
    assert np.mean(promised) == pytest.approx(55 / 61, abs=2.6 * np.std(promised) / math.sqrt(DRAWS))
    assert np.mean(naive) < 0.75


def test_residues_of_new_proteins_are_covered_although_those_of_one_protein_are_alike() -> None:
    """Errors of a protein share its scale. Counted per residue, long proteins would decide the width alone."""

    def sample(generator, count):
        size_P = generator.integers(5, 200, count)
        scale_P = np.where(size_P > 100, 0.3, 2.0) * generator.lognormal(0, 0.5, count)  # short proteins are harder
        protein_N = np.repeat(np.arange(count), size_P)
        return generator.normal(size=len(protein_N)) * scale_P[protein_N], protein_N

    found, pooled = [], []
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        (error_N, protein_N), (error_M, protein_M) = sample(generator, 40), sample(generator, 60)
        for quantile, shares in (
            (ConformalScores.from_errors(np.abs(error_N), protein_N).quantile(0.9), found),
            (ConformalScores.from_errors(np.abs(error_N)).quantile(0.9), pooled),
        ):
            half_M = np.full(len(error_M), quantile)
            shares.append(measure_coverage(error_M, 0 * error_M, half_M, protein_M, 0.9, 40).found.value)
    error = np.std(found, ddof=1) / math.sqrt(DRAWS)
    assert 0.9 - 2.6 * error <= np.mean(found) <= 0.9 + 1 / 41 + 2.6 * error
    assert np.mean(pooled) < 0.85


def test_coverage_of_proteins_from_another_source_is_recognised() -> None:
    """The chance is uniform or larger for exchangeable proteins, and small for those that are harder."""
    same, harder = [], []
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        error_N, error_M = np.abs(generator.normal(size=(2, 80)))
        quantile = ConformalScores.from_errors(error_N).quantile(0.9)
        for factor, chances in ((1.0, same), (1.8, harder)):
            half_M = np.full(80, quantile)
            chances.append(measure_coverage(factor * error_M, 0 * error_M, half_M, np.arange(80), 0.9, 80).chance)
    assert sum(chance <= 0.025 for chance in same) <= binom.ppf(0.99, DRAWS, 0.025)
    assert sum(chance <= 0.025 for chance in harder) >= 0.9 * DRAWS
    assert compute_coverage_chance(3, 80, 5, 0.9) == 1.0  # infinite intervals promise nothing that can fail
    assert compare_distributions(np.arange(50), np.arange(50)) == pytest.approx(1)
    assert compare_distributions(np.arange(50), np.arange(50) + 40) < 1e-6


def test_the_binomial_interval_equals_scipy() -> None:
    for hits, total in ((0, 7), (7, 7), (45, 50), (1, 1)):
        expected = binomtest(hits, total).proportion_ci(0.95)
        found = compute_binomial_interval(hits, total)
        assert (found.value, found.low, found.high) == pytest.approx((hits / total, expected.low, expected.high))


def test_the_interval_of_residue_coverage_resamples_proteins() -> None:
    protein_M = np.repeat(np.arange(10), 20)
    error_M = np.where(protein_M < 7, 0.0, 2.0)
    found = measure_coverage(error_M, 0 * error_M, np.ones(200), protein_M, 0.9, 10)
    expected = np.quantile(sample_counts(10)[:, :7].sum(1) / 10, [0.025, 0.975])
    assert found.found == pytest.approx((0.7, *expected))
    assert found.chance is None
    assert found.mean_width == 2


def test_the_interval_of_the_coverage_of_pairs_covers() -> None:
    """Some proteins are hard, so pairs with one of them are. The exact interval takes the pairs for independent."""

    def sample(generator: np.random.Generator, num_proteins: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        scale_G = generator.lognormal(0, 1, num_proteins)
        groups_P2 = np.stack([generator.choice(num_proteins, 2, replace=False) for _ in range(num_pairs)])
        return scale_G[groups_P2].prod(1) * generator.normal(size=num_pairs), groups_P2

    error_P, _ = sample(np.random.default_rng(DRAWS), 20_000, 20_000)
    truth, covered, exact = (np.abs(error_P) <= 1).mean(), 0, 0
    for seed in range(DRAWS):
        error_P, groups_P2 = sample(np.random.default_rng(seed), 30, 200)
        inputs = (error_P, 0 * error_P, np.ones(200), np.arange(200), 0.9, 50)
        found = measure_coverage(*inputs, sample_pair_counts(groups_P2, 200))
        assert found.chance is None
        assert found.found.value == (np.abs(error_P) <= 1).mean()
        covered += found.found.low <= truth <= found.found.high
        other = measure_coverage(*inputs).found
        exact += other.low <= truth <= other.high
    assert covered >= binom.ppf(0.01, DRAWS, 0.95)
    assert exact < 0.85 * DRAWS


def test_noisy_seeds_are_not_used_as_widths() -> None:
    generator = np.random.default_rng(0)
    truth_N = generator.normal(size=200)
    predicted_SN = generator.normal(size=200) * 0.1 + generator.lognormal(0, 1, 200) * generator.normal(size=(3, 200))
    scores = choose_scores(truth_N + predicted_SN.mean(0), predicted_SN, np.arange(200))
    assert not scores.by_spread
    assert not choose_scores(truth_N, np.stack([truth_N, truth_N]), np.arange(200)).by_spread  # no spread at all


def test_the_intervals_of_a_final_probe_cover() -> None:
    naive, final = [], []
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        x_ND, y_N = generator.normal(size=(160, 20)), generator.normal(size=160)
        train, new, fold_N = slice(0, 60), slice(60, 160), np.arange(60) % 6
        models = [LinearRegression().fit(x_ND[:60][fold_N != k], y_N[:60][fold_N != k]) for k in range(6)]
        predicted_KN = np.stack([model.predict(x_ND) for model in models])
        residual_N = np.abs(y_N[train] - predicted_KN[fold_N, np.arange(60)])
        whole = LinearRegression().fit(x_ND[train], y_N[train])
        inside = np.abs(y_N[train] - whole.predict(x_ND[train]))
        naive.append(np.mean(np.abs(y_N[new] - whole.predict(x_ND[new])) <= np.quantile(inside, 0.9)))
        # the intervals of a final probe on all proteins, as in `predict` after cross-validation
        half = ConformalScores.from_errors(residual_N).quantile(0.9)
        final.append(np.mean(np.abs(y_N[new] - whole.predict(x_ND[new])) <= half))
    assert np.mean(naive) < 0.85
    assert np.mean(final) >= 0.9 - 2.6 * np.std(final) / math.sqrt(DRAWS)
