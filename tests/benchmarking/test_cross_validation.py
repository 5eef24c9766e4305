"""Cross-validation: no protein is predicted by a model that knows it, scores, intervals that cover, final probes."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import binom, norm, spearmanr, t
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, r2_score, root_mean_squared_error

from benchmarks.folds import Scenario, build_task, count_covered, draw, measure_intervals, plan
from esm2kit.benchmarking.cross_validation import CrossValidation
from esm2kit.benchmarking.fold_scores import FoldArrays, widen_score
from esm2kit.benchmarking.fold_uncertainty import compare_folds
from esm2kit.benchmarking.layer_sweep import Candidate, choose_features
from esm2kit.benchmarking.model_features import ModelFeatures
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted
from esm2kit.benchmarking.uncertainty import estimate_uncertainty
from esm2kit.tasks.metrics import Interval, Score, compute_paired_difference
from esm2kit.tasks.scaling import TargetScale

VALUES = Scenario(16, 5, 10, 0.8, "value", 4, 2)
CLASSES = VALUES._replace(target="class")


def build(scenario: Scenario, seed: int = 0) -> tuple[Features, CrossValidation]:
    """Draw a task with its folds, and the features of its proteins."""
    x_ND, y_N, group_N = draw(np.random.default_rng(seed), scenario, scenario.groups)
    folds = CrossValidation.from_plan(build_task(y_N, scenario.target), plan(group_N, scenario))
    return Features(x_ND, np.arange(len(x_ND) + 1)), folds


def fit(features: Features, folds: CrossValidation, probe: str = "ridge", **settings) -> Fitted:
    """Fit a probe in all folds."""
    return folds.fit_probe(features, ProbeConfig(probe, **settings), (0, 1), "cpu")


def test_each_protein_is_predicted_by_a_ridge_that_was_trained_without_its_fold():
    features, folds = build(VALUES)
    fitted = fit(features, folds)
    x_ND, y_N = features.values_ND.astype(float), folds.data.targets
    for number, task in enumerate(folds.tasks):
        train, test = task.rows("train"), task.rows("test")
        mean_D, scale_D = x_ND[train].mean(axis=0), x_ND[train].std(axis=0)
        model = Ridge(alpha=fitted.selected["penalty_per_row"][number] * len(train))
        model.fit((x_ND[train] - mean_D) / scale_D, y_N[train])
        expected = model.predict((x_ND[test] - mean_D) / scale_D)
        np.testing.assert_allclose(fitted.test_SM[number // 4, test], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("scenario", "probe"), [(VALUES, "ridge"), (VALUES, "fnn"), (CLASSES, "logistic")])
def test_the_label_of_a_protein_does_not_influence_its_prediction(scenario, probe):
    features, folds = build(scenario._replace(repeats=1))
    fitted = fit(features, folds, probe, epochs=10)
    held = folds.tasks[0].rows("test")
    changed = folds.data.targets.copy()
    changed[held] = changed[held][::-1] * -3 if scenario.target == "value" else 1 - changed[held]
    others = tuple(dataclasses.replace(task, targets=changed) for task in folds.tasks)
    again = fit(
        features,
        dataclasses.replace(folds, data=dataclasses.replace(folds.data, targets=changed), tasks=others),
        probe,
        epochs=10,
    )
    np.testing.assert_allclose(again.test_SM[:, held], fitted.test_SM[:, held], rtol=0, atol=1e-9)
    rest = np.setdiff1d(np.arange(len(changed)), held)
    assert not np.array_equal(again.test_SM[:, rest], fitted.test_SM[:, rest])  # where it is a training label


def build_candidates(features: Features, folds: CrossValidation, planted: int) -> list[Candidate]:
    """Return three layers, of which one has the features and the others have noise."""
    generator = np.random.default_rng(1)
    found = []
    for layer in range(3):
        shape = features.values_ND.shape
        values = features.values_ND if layer == planted else generator.normal(size=shape).astype(np.float32)
        source = ModelFeatures(f"layer{layer}", None, {}, Features(values, features.offsets))
        found.append(Candidate(layer, "mean", source, ProbeConfig("ridge")))
    return found


@pytest.mark.parametrize("planted", [0, 2])
def test_the_layer_of_each_fold_is_chosen_on_its_own_validation_set(planted):
    features, folds = build(VALUES._replace(signal=0.95))
    candidates = build_candidates(features, folds, planted)
    swept = folds.sweep(candidates, (0,), "cpu")
    chosen = swept.swept.selected["candidate"]
    assert chosen == [choose_features(candidates, task, resamples=100).index for task in folds.tasks]
    assert chosen.count(planted) == len(chosen)
    assert swept.most_chosen == planted
    alone = fit(features, folds)
    np.testing.assert_allclose(swept.swept.test_SM, alone.test_SM, rtol=0, atol=1e-9)
    # no choice of a fold depends on the labels of that fold
    held = folds.tasks[0].rows("test")
    changed = folds.data.targets.copy()
    changed[held] = np.random.default_rng(0).normal(size=len(held)) * 100
    tasks = tuple(dataclasses.replace(task, targets=changed) for task in folds.tasks)
    others = dataclasses.replace(folds, data=dataclasses.replace(folds.data, targets=changed), tasks=tasks)
    again = others.sweep(candidates, (0,), "cpu").swept
    assert again.selected["candidate"][0] == chosen[0]
    np.testing.assert_allclose(again.test_SM[0, held], swept.swept.test_SM[0, held], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scenario", "probe"), [(VALUES, "ridge"), (VALUES, "fnn"), (CLASSES, "logistic")])
def test_dividing_merged_fits_gives_the_fits_of_the_folds(scenario, probe):
    features, folds = build(scenario)
    merged = fit(features, folds, probe, epochs=3)
    again = folds.merge(folds.divide(merged))
    assert again.selected == merged.selected
    for name in ("test_SM", "validation_SM", "test_logits_MC"):
        np.testing.assert_array_equal(getattr(again, name), getattr(merged, name))
    if scenario.target == "class":
        assert (merged.test_logits_MC.argmax(axis=1) == merged.test_SM[0]).all()


def test_scores_of_values_are_those_of_scikit_learn_and_scipy():
    features, folds = build(VALUES)
    fitted, y_N = fit(features, folds), folds.data.targets
    scores = folds.score(fitted, folds.sample_counts(100))
    rmse = np.mean([root_mean_squared_error(y_N, row) for row in fitted.test_SM])
    r2 = np.mean([r2_score(y_N, row) for row in fitted.test_SM])
    each = [
        spearmanr(y_N[task.rows("test")], fitted.test_SM[number // 4, task.rows("test")]).statistic
        for number, task in enumerate(folds.tasks)
    ]
    sizes = [len(task.rows("test")) for task in folds.tasks]
    assert scores["rmse"].interval.value == pytest.approx(rmse)
    assert scores["r2"].interval.value == pytest.approx(r2)
    assert scores["spearman"].interval.value == pytest.approx(np.average(each, weights=sizes))
    assert folds.score_each_fold(fitted) == pytest.approx(each)


def test_scores_of_classes_are_those_of_scikit_learn():
    features, folds = build(CLASSES)
    fitted, y_N = fit(features, folds, "logistic"), folds.data.targets
    scores = folds.score(fitted, folds.sample_counts(100))
    expected = np.mean([accuracy_score(y_N, row) for row in fitted.test_SM])
    assert scores["accuracy"].interval.value == pytest.approx(expected)
    assert np.average(folds.score_each_fold(fitted)) == pytest.approx(expected)


@pytest.mark.parametrize(("num_folds", "together"), [(4, 0.0), (40, -0.3)])
def test_the_mean_of_train_has_no_correlation(num_folds, together):
    # the mean of the other folds is the lower, the higher the own values are: all predictions together correlate
    _, folds = build(VALUES._replace(groups=80, size=1, folds=num_folds, repeats=1))
    scores = folds.score_constant(folds.sample_counts(100))
    assert all(math.isnan(scores[name].interval.value) for name in ("spearman", "pearson", "ndcg"))
    means = [TargetScale.from_values(task.targets[task.rows("train")]).centre for task in folds.tasks]
    predicted_M = np.array(means)[folds.plan.fold_RP[0]]
    expected = root_mean_squared_error(folds.data.targets, predicted_M)
    assert scores["rmse"].interval.value == pytest.approx(expected)
    assert spearmanr(folds.data.targets, predicted_M).statistic < together


def test_the_factor_of_nadeau_and_bengio():
    fold_RM = np.array([np.repeat(np.arange(5), 4), np.tile(np.arange(5), 4)])
    assert FoldArrays(np.arange(20), fold_RM).compute_widening() == pytest.approx(math.sqrt(1 + 5 / 4))
    halves = FoldArrays(np.arange(12), np.repeat([[0, 1]], [9, 3], axis=1))
    assert halves.compute_widening() == pytest.approx(math.sqrt(1 + 2 * np.mean([9 / 3, 3 / 9])))


@pytest.mark.parametrize("num_groups", [5, 30, 200])
def test_few_groups_give_the_interval_of_student(num_groups):
    values_G = np.random.default_rng(0).normal(size=num_groups)
    freedom = num_groups - 1
    expected = t.interval(0.95, freedom, scale=values_G.std(ddof=1) / math.sqrt(num_groups))[1]
    plain = norm.interval(0.95, scale=values_G.std() / math.sqrt(num_groups))[1]  # what resampling estimates
    found = FoldArrays(np.arange(num_groups), np.arange(num_groups)[None] % 5).compute_expansion()
    assert found * plain == pytest.approx(expected, rel=1e-12)


def test_a_widened_interval_and_difference():
    generator = np.random.default_rng(0)
    replicates = generator.normal(0.3, 0.01, 20_000)
    score = Score(Interval(0.29, 0.28, 0.32), (0.29,), replicates, 50)
    wide = widen_score("r2", score, 1.5)
    assert wide.interval.low == pytest.approx(0.29 - 1.5 * 1.96 * 0.01, abs=5e-4)
    assert wide.interval.high == pytest.approx(0.29 + 1.5 * 1.96 * 0.01, abs=5e-4)
    # the part that the replicates of two models share cancels in their difference, as without widening
    theirs = replicates - 0.02 + generator.normal(0, 0.002, 20_000)
    other = widen_score("r2", Score(Interval(0.27, 0.2, 0.3), (0.27,), theirs, 50), 1.5)
    difference = compute_paired_difference("r2", wide, other)
    assert difference == pytest.approx((0.02, 0.02 - 1.5 * 1.96 * 0.002, 0.02 + 1.5 * 1.96 * 0.002), abs=2e-4)
    high = widen_score("accuracy", dataclasses.replace(score, interval=Interval(0.99, 0.9, 1.0)), 5.0)
    assert high.interval.high == 1.0
    assert widen_score("pearson", dataclasses.replace(score, interval=Interval(0.99, 0.9, 1.0)), 5.0).interval.high < 1
    constant = Score(Interval(1.0, 0.94, 1.0), (1.0,), np.ones(20_000), 50)
    assert widen_score("accuracy", constant, 1.5).interval == constant.interval
    assert compute_paired_difference("accuracy", widen_score("accuracy", constant, 1.5), high).value > 0


def test_intervals_contain_the_truth_as_often_as_promised_where_the_plain_bootstrap_does_not():
    found = count_covered(Scenario(60, 1, 8, 0.7, "value", 5), 200, num_truth=100, resamples=100)
    # a coverage of 95% gives 183 or more of 200 with a probability of 98%; a larger one is no broken promise
    for kind in ("reported", "difference", "equal"):
        assert (found[kind] >= 0.915).all(), found
    assert found["plain"].mean() < 0.88, found
    assert (found["width"] < 0.8).all(), found


def test_intervals_of_few_groups_contain_the_truth_only_because_they_are_expanded(monkeypatch):
    scenario = Scenario(15, 4, 6, 0.7, "value", 5)
    found = count_covered(scenario, 200, num_truth=100, resamples=100)
    for kind in ("reported", "difference", "equal"):
        assert (found[kind] >= 0.915).all(), found
    assert (found["width"] < 1.1).all(), found
    monkeypatch.setattr(FoldArrays, "compute_expansion", lambda arrays: 1.0)
    narrow = count_covered(scenario, 200, num_truth=100, resamples=100)
    assert min(narrow["reported"].min(), narrow["difference"].min()) < 0.9, narrow


def test_the_final_probe_is_fitted_on_all_proteins_with_the_median_penalty():
    features, folds = build(VALUES)
    fitted = folds.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu", is_saved=True)
    penalties = sorted(fitted.selected["penalty_per_row"])
    x_ND, y_N = features.values_ND.astype(float), folds.data.targets
    z_ND = (x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)
    expected = Ridge(alpha=penalties[3] * len(y_N)).fit(z_ND, y_N).predict(z_ND)
    outputs = fitted.parameters.outputs(features.take(np.arange(len(y_N))), [1] * len(y_N), folds.data.task)
    np.testing.assert_allclose(outputs[0, :, 0], expected, rtol=0, atol=1e-6)
    assert set(folds.labelled.sets.tolist()) == {"train"}


@pytest.mark.parametrize(("scenario", "probe"), [(VALUES, "fnn"), (CLASSES, "logistic"), (CLASSES, "fnn")])
def test_final_probes_of_other_kinds_learn_the_labels(scenario, probe):
    features, folds = build(scenario)
    fitted = folds.fit_probe(features, ProbeConfig(probe, epochs=60), (0, 1), "cpu", is_saved=True)
    y_N = folds.data.targets
    outputs = fitted.parameters.outputs(features.take(np.arange(len(y_N))), [1] * len(y_N), folds.data.task)[0].numpy()
    score = spearmanr(outputs[:, 0], y_N).statistic if scenario.target == "value" else (outputs.argmax(1) == y_N).mean()
    assert score > 0.75


def test_uncertainty_comes_from_out_of_fold_predictions():
    features, folds = build(VALUES)
    fitted = fit(features, folds, "fnn", epochs=5)
    held, data, out_of_fold = folds.get_held_out(fitted)
    assert out_of_fold
    np.testing.assert_array_equal(held.validation_SM, fitted.test_SM[:2])  # both seeds of the first repeat
    assert (data.rows("validation") == np.arange(len(data.ids))).all()


def test_each_interval_comes_from_the_errors_in_the_other_folds():
    features, folds = build(VALUES._replace(groups=40, size=2))
    fitted, y_N = fit(features, folds), folds.data.targets
    found = folds.describe_uncertainty(fitted, folds.sample_counts(100), 0.8)
    error_N, fold_N = np.abs(y_N - fitted.test_SM[0]), folds.plan.fold_RP[0]  # of the first repeat
    inside = []
    for fold in range(4):
        others = np.sort(error_N[fold_N != fold])
        inside.append(np.mean(error_N[fold_N == fold] <= others[math.ceil(0.8 * (len(others) + 1)) - 1]))
    assert found["inside"] == pytest.approx(inside)
    sizes = np.bincount(fold_N)
    assert found["found"]["value"] == pytest.approx(np.average(inside, weights=sizes))
    assert found["found"]["low"] < found["found"]["value"] < found["found"]["high"]
    assert found["quantile"] == pytest.approx(np.sort(error_N)[math.ceil(0.8 * 81) - 1])  # that of `predict`
    assert found["curve"][15][:2] == [0.8, pytest.approx(found["found"]["value"])]
    assert found["holds"]
    # the errors of a fold have no part in its own interval
    far = fitted.test_SM.copy()
    far[0, fold_N == 0] += 100
    changed = folds.describe_uncertainty(fitted._replace(test_SM=far), folds.sample_counts(100), 0.8)
    assert changed["inside"][0] == 0
    assert not changed["holds"]
    assert "does not hold for every fold" in changed["sentence"]


def test_the_temperature_of_a_fold_is_fitted_on_the_others():
    features, folds = build(CLASSES._replace(groups=40))
    fitted, y_N = fit(features, folds, "logistic"), folds.data.targets
    fitted = fitted._replace(test_logits_MC=4 * fitted.test_logits_MC)  # too sure
    found = folds.describe_uncertainty(fitted, folds.sample_counts(100), 0.9)
    margin_N = np.diff(fitted.test_logits_MC.astype(float), axis=1)[:, 0] * np.where(y_N == 1, 1, -1)
    fold_N, temperatures = folds.plan.fold_RP[0], np.exp(np.linspace(np.log(0.05), np.log(20), 5000))
    assert found["before"]["nll"]["value"] == pytest.approx(np.logaddexp(0, -margin_N).mean(), rel=1e-6)
    expected_N = np.empty(len(y_N))
    for fold in range(4):
        losses = np.logaddexp(0, -margin_N[fold_N != fold] / temperatures[:, None]).mean(axis=1)
        expected_N[fold_N == fold] = np.logaddexp(0, -margin_N[fold_N == fold] / temperatures[losses.argmin()])
    assert found["after"]["nll"]["value"] == pytest.approx(expected_N.mean(), rel=1e-4)
    assert found["used"]
    assert found["after"]["ece"]["value"] < found["before"]["ece"]["value"]
    assert "proteins of the cross-validation" in found["sentence"]
    assert found["temperature"] == estimate_uncertainty(*folds.get_held_out(fitted)).divisor  # that of `predict`
    # the labels of a fold have no part in the temperature that scales it
    changed = np.where(fold_N == 0, 1 - y_N, y_N)
    others = dataclasses.replace(folds, data=dataclasses.replace(folds.data, targets=changed))
    again = others.describe_uncertainty(fitted, folds.sample_counts(100), 0.9)
    losses = np.logaddexp(0, -margin_N[fold_N != 0] / temperatures[:, None]).mean(axis=1)
    flipped_N = np.logaddexp(0, margin_N[fold_N == 0] / temperatures[losses.argmin()])
    rest = again["after"]["nll"]["value"] * len(y_N) - flipped_N.sum()
    assert rest / (fold_N != 0).sum() > expected_N[fold_N != 0].mean()  # it does influence the others
    assert again["after"]["nll"]["value"] > found["after"]["nll"]["value"]


def test_intervals_after_cross_validation_cover_new_proteins():
    found = measure_intervals(Scenario(80, 1, 20, 0.7, "value", 5), 200, num_new=500)
    # one new protein per data set: 200 independent events of the promised probability
    assert found["one"].sum() >= binom.ppf(0.01, 200, 0.9)
    for name in ("predict", "cv_plus"):  # the mean over data sets, 2.6 standard errors below the promise at most
        assert 0.9 - 2.6 * found[name].std() / math.sqrt(200) <= found[name].mean() < 0.95, name
    assert found["inside"].mean() < 0.85  # the errors of the final probe on its own proteins promise nothing
    assert found["width"].mean() <= found["cv_plus_width"].mean()
    assert abs(found["reported"].mean() - 0.9) < 0.02
    assert found["is_below"].mean() <= 0.05  # seldom lower than the interval of the report


def test_folds_with_other_errors_are_recognised():
    generator = np.random.default_rng(0)
    fold_N = np.repeat(np.arange(5), 16)
    same = [compare_folds(np.abs(generator.normal(size=80)), fold_N, np.arange(80)) for _ in range(200)]
    assert sum(p < 0.05 for p in same) <= binom.ppf(0.99, 200, 0.05)
    wide = [compare_folds(np.abs(generator.normal(size=80)) * (1 + 3 * (fold_N == 2)), fold_N, np.arange(80))
            for _ in range(50)]  # fmt: skip
    assert np.median(wide) < 0.01
    # the errors of a group are one observation
    group_N = np.repeat(np.arange(20), 4)
    together = [compare_folds(np.abs(generator.normal(size=20))[group_N], fold_N, group_N) for _ in range(200)]
    assert sum(p < 0.05 for p in together) <= binom.ppf(0.99, 200, 0.05)
    assert math.isnan(compare_folds(np.ones(80), fold_N, np.arange(80)))


def test_few_proteins_have_intervals_that_were_not_checked():
    features, folds = build(VALUES._replace(groups=10, size=1, repeats=1, folds=5))
    found = folds.describe_uncertainty(fit(features, folds), folds.sample_counts(50), 0.9)
    assert found["quantile"] is not None  # 10 proteins are enough, the 8 of the other folds are not
    assert found["mean_width"] is None
    assert "was not checked" in found["sentence"]


def test_the_table_has_each_prediction_once_per_repeat():
    features, folds = build(VALUES)
    fitted = fit(features, folds, "fnn", epochs=2)
    lines = folds.format_table({"small, fnn": fitted.test_SM}).splitlines()
    assert lines[0] == 'id,group,repeat,fold,measured,"small, fnn"'
    assert len(lines) == 1 + 2 * 80
    name, group, repeat, fold, measured, predicted = lines[81 + 7].split(",")
    assert (name, group, repeat) == ("p7", "2", "2")
    assert int(fold) == folds.plan.fold_RP[1, 7] + int(folds.plan.names[0])
    assert float(measured) == pytest.approx(folds.data.targets[7], rel=1e-4)
    assert float(predicted) == pytest.approx(fitted.test_SM[2:, 7].mean(), rel=1e-4)
    summary = folds.summarise("")
    assert [fold.test + fold.train + fold.validation for fold in summary.folds] == [80] * 8
