"""Folds that are fitted in one pass equal separate fits; ridge by rows equals ridge by columns and scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from esm2kit.benchmarking.probes import fit, fold_training, linear
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe, fit_probe_folds
from esm2kit.benchmarking.probes.heads import SeededHead
from esm2kit.tasks.folds import assign_folds
from esm2kit.tasks.task import Task

VALUE = Task("drawn", "protein", "value", "spearman", {}, "")
CLASS = Task("drawn", "protein", "class", "accuracy", {}, "", labels=("a", "b", "c"))


def draw(num_proteins: int, width: int, classes: bool = False) -> tuple[Features, np.ndarray]:
    """Draw features with different means and scales, and values or classes that depend on them."""
    generator = np.random.default_rng(width)
    x_ND = generator.normal(size=(num_proteins, width))
    y_N = x_ND[:, :3].sum(axis=1) + generator.normal(size=num_proteins)
    x_ND = (x_ND * np.geomspace(0.1, 10, width) + np.linspace(-3, 3, width)).astype(np.float32)
    y_N = np.digitize(y_N, [-1, 1]) if classes else 40 + 5 * y_N
    return Features(x_ND, np.arange(num_proteins + 1)), y_N


def divide(y_N: np.ndarray, num_folds: int, repeats: int = 1) -> list[ProbeTargets]:
    """Build the targets of each fold of each repeat, of slightly different sizes."""
    every, targets = np.arange(len(y_N)), []
    task = VALUE if y_N.dtype.kind == "f" else CLASS
    for repeat in range(repeats):
        fold_N = assign_folds(every, num_folds, repeat)
        for fold in range(num_folds):
            fit = every[fold_N != fold]
            held = assign_folds(fit, 5, repeat) == 0
            sets = {"train": fit[~held], "validation": fit[held], "test": every[fold_N == fold]}
            targets.append(ProbeTargets(y_N, np.ones(len(y_N), bool), np.arange(len(y_N) + 1), sets, task))
    return targets


def assert_equal_fits(one_pass, separate, tolerance: float) -> None:
    """Compare fits of folds."""
    for ours, theirs in zip(one_pass, separate, strict=True):
        assert ours.selected == theirs.selected
        np.testing.assert_allclose(ours.test_SM, theirs.test_SM, rtol=0, atol=tolerance)
        np.testing.assert_allclose(ours.validation_SM, theirs.validation_SM, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("num_proteins", "width"), [(203, 20), (90, 300)], ids=["columns", "rows"])
def test_ridge_in_one_pass_equals_separate_fits(num_proteins, width, monkeypatch):
    features, y_N = draw(num_proteins, width)
    targets = divide(y_N, 5, 2)
    separate = [fit_probe(features, each, ProbeConfig("ridge")) for each in targets]
    if width < num_proteins:  # the products of all rows are used, and no separate fit
        monkeypatch.setattr(linear, "fit_ridge", None)
    assert_equal_fits(fit_probe_folds(features, targets, ProbeConfig("ridge")), separate, 1e-9)


def test_ridge_by_rows_equals_ridge_by_columns_and_scikit_learn():
    features, y_N = draw(60, 59)
    (targets,) = divide(y_N, 5)[:1]
    by_rows = fit_probe(features, targets, ProbeConfig("ridge"))
    train, test = targets.proteins["train"], targets.proteins["test"]
    x_ND = features.values_ND.astype(np.float64)
    mean_D, scale_D = x_ND[train].mean(axis=0), x_ND[train].std(axis=0)
    z_ND = (x_ND - mean_D) / scale_D
    alpha = by_rows.selected["penalty_per_row"] * len(train)
    expected = Ridge(alpha=alpha).fit(z_ND[train], y_N[train]).predict(z_ND[test])
    np.testing.assert_allclose(by_rows.test_SM[0], expected, rtol=0, atol=1e-6)
    held = targets.proteins["validation"]
    errors = {
        penalty: np.square(
            Ridge(alpha=penalty * len(train)).fit(z_ND[train], y_N[train]).predict(z_ND[held]) - y_N[held]
        ).sum()
        for penalty in linear.RIDGE_GRID
    }
    assert by_rows.selected["penalty_per_row"] == min(errors, key=errors.get)


def test_logistic_regression_in_folds_equals_separate_fits():
    features, y_N = draw(83, 12, classes=True)
    targets, config = divide(y_N, 4), ProbeConfig("logistic")
    separate = [fit_probe(features, each, config) for each in targets]
    assert_equal_fits(fit_probe_folds(features, targets, config), separate, 0.0)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 15},
        {"epochs": 120, "patience": 3},  # folds and seeds stop at different epochs
        {"epochs": 10, "patience": None, "keep": "last", "dropout": 0.0},
        {"epochs": 10, "optimizer": "adamw_amsgrad", "weight_decay": 0.1, "standardize": False, "scale_targets": False},
    ],
    ids=["default", "stops", "last", "biotrainer"],
)
def test_fnns_of_all_folds_in_one_pass_equal_separate_fits(classes, settings, monkeypatch):
    features, y_N = draw(83, 12, classes)
    # training sets of 49 to 52 proteins: folds have different numbers of batches
    targets, config = divide(y_N, 4, 2), ProbeConfig("fnn", batch_size=10, **settings)
    separate = [fit_probe(features, each, config, (0, 3)) for each in targets]
    monkeypatch.setattr(fit, "fit_probe", None)
    monkeypatch.setattr(fit, "fit_head", None)
    together = fit_probe_folds(features, targets, config, (0, 3))
    assert_equal_fits(together, separate, 1e-6)
    for ours, theirs in zip(together, separate, strict=True):
        if classes:
            np.testing.assert_allclose(ours.test_logits_MC, theirs.test_logits_MC, rtol=0, atol=1e-6)
    assert settings.get("patience") != 3 or len({epoch for each in separate for epoch in each.selected["epoch"]}) > 2


def test_folds_that_do_not_fit_in_memory_are_fitted_separately(monkeypatch):
    features, y_N = draw(83, 12)
    targets, config = divide(y_N, 4), ProbeConfig("fnn", epochs=3)
    together = fit_probe_folds(features, targets, config, (0,))
    monkeypatch.setattr(fold_training, "MAX_BYTES", 1000)
    monkeypatch.setattr(fit, "fit_fnn_folds", None)
    assert_equal_fits(fit_probe_folds(features, targets, config, (0,)), together, 1e-6)
    ridge = fit_probe_folds(features, targets, ProbeConfig("ridge"))
    monkeypatch.setattr(linear, "MAX_PRODUCT_BYTES", 1000)
    assert_equal_fits(fit_probe_folds(features, targets, ProbeConfig("ridge")), ridge, 1e-9)


def test_a_given_penalty_is_used():
    features, y_N = draw(50, 10)
    (targets,) = divide(y_N, 5)[:1]
    assert fit_probe(features, targets, ProbeConfig("ridge"), penalty=0.25).selected == {"penalty_per_row": 0.25}
    features, y_N = draw(50, 10, classes=True)
    (targets,) = divide(y_N, 5)[:1]
    assert fit_probe(features, targets, ProbeConfig("logistic"), penalty=1e-3).selected == {"penalty": 1e-3}


def test_dropout_of_folds_is_sampled_by_the_generators_of_the_device(monkeypatch):
    """On a GPU, initial weights come from generators of the CPU and dropout from those of the GPU."""
    original = SeededHead.__init__

    def build(self, seeds, dropout, device):
        original(self, seeds, dropout, device)
        self.dropout_generators = [torch.Generator().manual_seed(seed + 100) for seed in seeds]

    features, y_N = draw(83, 12)
    targets, config = divide(y_N, 4), ProbeConfig("fnn", epochs=5, batch_size=10)
    on_cpu = fit_probe_folds(features, targets, config, (0, 3))
    monkeypatch.setattr(SeededHead, "__init__", build)
    separate = [fit_probe(features, each, config, (0, 3)) for each in targets]
    assert np.abs(separate[0].test_SM - on_cpu[0].test_SM).max() > 1e-3
    assert_equal_fits(fit_probe_folds(features, targets, config, (0, 3)), separate, 1e-6)
