"""Probes find a planted signal and nothing in shuffled labels; seeds do not affect each other."""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from support.errors import refused
from support.planted import KINDS, make_planted_task
from torch import nn

from esm2kit.benchmarking.baselines.fit import fit_baseline
from esm2kit.benchmarking.probes import heads
from esm2kit.benchmarking.probes.config import SOURCES, ProbeConfig, ProbeName, default_probe, preset_config
from esm2kit.benchmarking.probes.features import Features, ProbeTargets, compute_column_moments, read_blocks
from esm2kit.benchmarking.probes.fit import check_probe, fit_probe
from esm2kit.benchmarking.probes.head_training import ORDER_SEED, Adam, fit_head
from esm2kit.benchmarking.probes.heads import (
    Attention,
    Cnn,
    FeatureBatch,
    Fnn,
    LightAttention,
    PackedConvolution,
    reads_residues,
)
from esm2kit.benchmarking.probes.linear import LOGISTIC_GRID, fit_logistic, fit_ridge
from esm2kit.benchmarking.scores import score_fitted
from esm2kit.core.errors import InputError
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import compute_paired_difference, sample_counts

CPU = torch.device("cpu")
QUICK = {"epochs": 30, "batch_size": 32, "learning_rate": 5e-3, "dropout": 0.0}
PROBES = {
    ("protein", "class"): ("logistic", "fnn", "light_attention", "attention"),
    ("protein", "value"): ("ridge", "fnn", "light_attention", "attention"),
    ("residue", "class"): ("logistic", "fnn", "cnn"),
    ("residue", "value"): ("ridge", "fnn", "cnn"),
}
CASES = [(level, target, probe) for level, target in KINDS for probe in PROBES[level, target]]


def score(fitted, data):
    counts = sample_counts(int((data.sets == "test").sum()), 1000)
    return score_fitted(fitted, data, counts)


def fit_planted(level, target, probe, **keywords):
    """Fit a probe; return its scores and their difference from the constant baseline."""
    features, data = make_planted_task(level, target, by_residue=reads_residues(probe), **keywords)
    scores = score(fit_probe(features, ProbeTargets.from_task(data), ProbeConfig(probe, **QUICK), (0, 1)), data)
    constant, metric = ("mean", "rmse") if target == "value" else ("majority", "accuracy")
    baseline = score(fit_baseline(constant, data).fitted, data)
    return scores, compute_paired_difference(metric, scores[metric], baseline[metric])


def test_cases_cover_every_probe_and_kind():
    fitting = {kind: [name for name in get_args(ProbeName) if fits(name, *kind)] for kind in KINDS}
    assert {kind: list(names) for kind, names in PROBES.items()} == fitting


def fits(probe, level, target):
    try:
        check_probe(probe, make_planted_task(level, target, num_proteins=10)[1].task)
    except InputError as error:
        return error.code != "probe.task"
    return True


@pytest.mark.parametrize(("level", "target", "probe"), CASES)
def test_a_planted_signal_is_found(level, target, probe):
    scores, gain = fit_planted(level, target, probe)
    found = scores["spearman" if target == "value" else "accuracy"].interval
    assert found.low > (0.9 if target == "value" else 0.75)
    assert gain.low > 0


@pytest.mark.parametrize(("level", "target", "probe"), CASES)
def test_shuffled_labels_give_no_signal(level, target, probe):
    """The interval contains no correlation, and the probe does not beat the constant baseline.

    With 99.9% intervals, one of a dozen cases fails by chance in one of a hundred runs.
    """
    scores, gain = fit_planted(level, target, probe, num_proteins=200, seed=1, shuffled=True)
    assert not gain.low > 0
    replicates = scores["pearson" if target == "value" else "mcc"].replicates
    replicates = replicates[np.isfinite(replicates)]  # constant predictions have no correlation
    assert not replicates.size or np.quantile(replicates, 0.0005) <= 0 <= np.quantile(replicates, 0.9995)


def test_binary_labels_are_learned():
    features, data = make_planted_task("residue", "class", bits=("metal", "nucleic", "small"))
    for probe in ("logistic", "cnn"):
        scores = score(fit_probe(features, ProbeTargets.from_task(data), ProbeConfig(probe, **QUICK), (0,)), data)
        assert scores["macro_f1"].interval.low > 0.6
        assert scores["mcc"].interval.low > 0.5


def test_ridge_matches_scikit_learn_on_z_scores():
    features, data = make_planted_task("protein", "value", noise=3.0)
    fitted = fit_ridge(features, ProbeTargets.from_task(data))
    train, test = data.rows("train"), data.rows("test")
    x = features.values_ND.astype(float)
    z = (x - x[train].mean(0)) / x[train].std(0)
    expected = Ridge(alpha=fitted.selected["penalty_per_row"] * len(train)).fit(z[train], data.targets[train])
    np.testing.assert_allclose(fitted.test_SM[0], expected.predict(z[test]), rtol=1e-7, atol=1e-7)


def test_ridge_selects_the_penalty_with_the_lowest_validation_error():
    features, data = make_planted_task("protein", "value", num_proteins=120, width=60, noise=3.0)
    fitted = fit_ridge(features, ProbeTargets.from_task(data))
    train, held = data.rows("train"), data.rows("validation")
    x = features.values_ND.astype(float)
    z = (x - x[train].mean(0)) / x[train].std(0)

    def error(penalty):
        return np.mean(
            (Ridge(alpha=penalty * len(train)).fit(z[train], data.targets[train]).predict(z[held]) - data.targets[held])
            ** 2
        )

    chosen = fitted.selected["penalty_per_row"]
    assert error(chosen) < min(error(chosen * 3.2), error(chosen / 3.2))
    np.testing.assert_allclose(np.mean((fitted.validation_SM[0] - data.targets[held]) ** 2), error(chosen), rtol=1e-6)


def test_logistic_matches_scikit_learn_on_z_scores():
    features, data = make_planted_task("protein", "class", noise=2.0)
    fitted = fit_logistic(features, ProbeTargets.from_task(data))
    assert fitted.selected["penalty"] in LOGISTIC_GRID
    train, test = data.rows("train"), data.rows("test")
    x = features.values_ND.astype(float)
    z = (x - x[train].mean(0)) / x[train].std(0)
    strength = 1 / (fitted.selected["penalty"] * len(train))
    expected = LogisticRegression(C=strength, tol=1e-8, max_iter=2000).fit(z[train], data.targets[train])
    assert (fitted.test_SM[0] == expected.predict(z[test])).mean() > 0.99


def test_column_moments_of_blocks_match_those_of_all_rows(monkeypatch):
    monkeypatch.setattr("esm2kit.benchmarking.probes.features.NUMBERS_PER_BLOCK", 3 * 2048)
    x = np.random.default_rng(0).normal(3, 2, (40_000, 3)).astype(np.float32)
    x[:, 2] = 7.0
    blocks = read_blocks(Features(x, np.arange(40_001)), np.arange(0, 40_000, 2))
    mean, scale = compute_column_moments(block for _, block in blocks)
    np.testing.assert_allclose(mean, x[::2].mean(0, dtype=float), rtol=1e-5)
    np.testing.assert_allclose(scale[:2], x[::2, :2].std(0, dtype=float), rtol=1e-4)
    assert scale[2] == 1.0


@pytest.mark.parametrize(("probe", "level"), [("fnn", "protein"), ("fnn", "residue"), ("cnn", "residue")])
def test_a_seed_does_not_depend_on_other_seeds(probe, level):
    features, data = make_planted_task(level, "class")
    config = ProbeConfig(probe, epochs=4, batch_size=50, dropout=0.3, patience=2)
    together = fit_head(features, ProbeTargets.from_task(data), config, (0, 1, 2, 3), CPU)
    alone = fit_head(features, ProbeTargets.from_task(data), config, (2,), CPU)
    curves = np.array(together.history["validation_loss"])[: len(alone.history["validation_loss"]), 2]
    np.testing.assert_allclose(curves, np.array(alone.history["validation_loss"])[:, 0], rtol=1e-4)
    assert (together.test_SM[2] == alone.test_SM[0]).mean() > 0.995
    assert (together.test_SM[2] != together.test_SM[1]).any()


def test_splitting_a_batch_does_not_change_its_gradient():
    features, data = make_planted_task("residue", "class")
    config = ProbeConfig("cnn", epochs=2, batch_size=64, dropout=0.0)
    full = fit_head(features, ProbeTargets.from_task(data), config, (0,), CPU)
    parts = fit_head(features, ProbeTargets.from_task(data), dataclasses.replace(config, row_budget=100), (0,), CPU)
    np.testing.assert_allclose(full.history["train_loss"], parts.history["train_loss"], rtol=1e-4)


def test_features_are_not_modified():
    """Consecutive rows in memory are a view of the features, so z-scoring in place would repeat in every epoch."""
    features, data = make_planted_task("protein", "value", num_proteins=321)
    values_ND = (3 + 2 * features.values_ND.astype(np.float32)).copy()
    sizes = [len(data.rows(name)) for name in ("train", "validation", "test")]
    ranks = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    mixed = np.argsort(ranks, kind="stable")  # interleave the sets, keep the order within each set
    config = ProbeConfig("fnn", **QUICK | {"epochs": 6, "batch_size": 32})
    assert len(data.rows("train")) % config.batch_size == 1, "the last batch has one protein"
    found = []
    for rows in (np.arange(len(mixed)), mixed):
        x_ND = values_ND[rows]
        found.append(
            fit_probe(
                Features(x_ND, np.arange(len(rows) + 1)), ProbeTargets.from_task(data.subset(rows)), config, (0, 1)
            )
        )
        assert (x_ND == values_ND[rows]).all()
    assert len(set(np.diff(mixed))) > 1
    assert found[0].history == found[1].history
    assert (found[0].test_SM == found[1].test_SM).all()


@pytest.mark.parametrize("outputs", [4, 9])  # fewer and more outputs than the five inputs use different code paths
@pytest.mark.parametrize("rows_per_product", [7, 1024])
def test_packed_convolution_matches_torch_forward_and_backward(outputs, rows_per_product, monkeypatch):
    monkeypatch.setattr(heads, "ROWS_PER_PRODUCT", rows_per_product)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 5, generator=generator, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, 7, 5, outputs, generator=generator, dtype=torch.double, requires_grad=True)
    found = PackedConvolution.apply(x, weight)
    expected = torch.stack([nn.functional.conv1d(x[g].T[None], weight[g].permute(2, 1, 0))[0].T for g in range(2)])
    torch.testing.assert_close(found[:, 3:-3], expected)
    assert (found[:, :3] == 0).all()
    assert (found[:, -3:] == 0).all()
    assert torch.autograd.gradcheck(PackedConvolution.apply, (x[:, :12], weight))


@pytest.mark.parametrize("name", ["adam", "adamw_amsgrad"])
def test_the_optimizer_matches_torch(name):
    """Shrinking gradients distinguish AMSGrad, and a large weight decay distinguishes decoupled decay."""
    config = ProbeConfig("fnn", optimizer=name, weight_decay=0.3, learning_rate=2e-2)
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 5, 3), (2, 1, 3))]
    expected = [nn.Parameter(parameter.detach().clone()) for parameter in found]
    optimizer = Adam(found, config)
    kind = partial(torch.optim.AdamW, amsgrad=True) if name == "adamw_amsgrad" else torch.optim.Adam
    reference = kind(expected, lr=2e-2, weight_decay=0.3)
    for step in range(20):
        for mine, other in zip(found, expected, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator) / (1 + step) ** 2
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        assert all(mine.grad is None for mine in found)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_training_a_head_matches_plain_torch():
    """One network and the same batches give the same curve."""
    features, data = make_planted_task("protein", "value", num_proteins=100, noise=1.0)
    config = ProbeConfig("fnn", epochs=5, batch_size=16, dropout=0.0, learning_rate=2e-2)
    config = dataclasses.replace(config, standardize=False, scale_targets=False)
    fitted = fit_head(features, ProbeTargets.from_task(data), config, (3,), CPU)
    head = Fnn((3,), features.width, 1, config.hidden, 0.0, CPU)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    x_ND, y_N = torch.from_numpy(features.values_ND).float(), torch.from_numpy(data.targets).float()
    for epoch in range(5):
        order = np.random.default_rng((ORDER_SEED, epoch + 1)).permutation(data.rows("train"))
        for rows in np.split(order, range(16, len(order), 16)):
            optimizer.zero_grad()
            (head(FeatureBatch(x_ND[rows], None, []))[0, :, 0] - y_N[rows]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            held = data.rows("validation")
            loss = (head(FeatureBatch(x_ND[held], None, []))[0, :, 0] - y_N[held]).square().mean()
        np.testing.assert_allclose(fitted.history["validation_loss"][epoch][0], float(loss), rtol=1e-4)


IMPORTS = """
import sys
from support.planted import make_planted_task
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe

features, data = make_planted_task("residue", "class", num_proteins=20)
fit_probe(features, ProbeTargets.from_task(data), ProbeConfig("cnn", epochs=1), (0,))
print(sorted({"torch._dynamo", "sympy", "scipy.optimize"} & set(sys.modules)))
"""


def test_a_probe_does_not_import_torchs_compiler():
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    environment["ESM2KIT_DEVICE"] = "cpu"
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def packed_batch(lengths, width, gap):
    sizes = [gap] * (2 * len(lengths) + 1)
    sizes[1::2] = lengths
    real = torch.cat([torch.full((size,), place % 2 == 1) for place, size in enumerate(sizes)])
    x = torch.randn(len(real), width, generator=torch.Generator().manual_seed(1)) * real[:, None]
    return FeatureBatch(x, real, sizes)


def test_packed_cnn_matches_the_padded_cnn_per_protein():
    head = Cnn((3, 4), 6, 3, 8, 0.0, CPU).eval()
    lengths = [1, 9, 4]
    batch = packed_batch(lengths, 6, head.radius)
    packed = head(batch)[:, batch.is_real_N].split(lengths, dim=1)
    for seed in range(2):
        first, second = nn.Conv1d(6, 8, 7, padding=3), nn.Conv1d(8, 3, 7, padding=3)
        first.weight.data, first.bias.data = head.weight_in[seed].permute(2, 1, 0).data, head.bias_in[seed, 0].data
        second.weight.data, second.bias.data = head.weight_out[seed].permute(2, 1, 0).data, head.bias_out[seed, 0].data
        for rows, found in zip(batch.x_ND[batch.is_real_N].split(lengths), packed, strict=True):
            expected = second(first(rows.T[None]).relu())[0].T
            torch.testing.assert_close(found[seed], expected, rtol=1e-4, atol=1e-5)


def test_packed_light_attention_matches_the_padded_one_per_protein():
    head = LightAttention((3, 4), 6, 3, 8, 0.25, CPU).eval()
    lengths = [1, 12, 5]
    batch = packed_batch(lengths, 6, head.radius)
    packed = head(batch)
    for seed in range(2):
        for place, rows in enumerate(batch.x_ND[batch.is_real_N].split(lengths)):

            def convolved(weight, bias, rows=rows, seed=seed):
                return nn.functional.conv1d(rows.T[None], weight[seed].permute(2, 1, 0), padding=4)[0].T + bias[seed]

            value, attend = (
                convolved(head.weight_value, head.bias_value),
                convolved(head.weight_attend, head.bias_attend),
            )
            pooled = torch.cat([(value * attend.softmax(0)).sum(0), value.amax(0)])
            hidden = (pooled @ head.weight_in[seed] + head.bias_in[seed, 0]).relu()
            expected = nn.functional.layer_norm(hidden, (8,)) @ head.weight_out[seed] + head.bias_out[seed, 0]
            torch.testing.assert_close(packed[seed, place], expected, rtol=1e-4, atol=1e-5)


def test_packed_attention_matches_torchs_attention_per_protein():
    """The weighted mean is torch's attention with one query, whose keys and values are the residues."""
    head = Attention((3, 4), 6, 3, 8, 0.25, CPU).eval()
    lengths = [1, 12, 5]
    batch = packed_batch(lengths, 6, head.radius)
    packed = head(batch)
    assert packed.shape == (2, 3, 3)
    for seed in range(2):
        for place, rows in enumerate(batch.x_ND.split(lengths)):
            query = head.weight_attend[seed][None, None]
            pooled = nn.functional.scaled_dot_product_attention(query, rows[None], rows[None], scale=1.0)[0, 0]
            hidden = (pooled @ head.weight_in[seed] + head.bias_in[seed, 0]).relu()
            expected = hidden @ head.weight_out[seed] + head.bias_out[seed, 0]
            torch.testing.assert_close(packed[seed, place], expected, rtol=1e-4, atol=1e-5)


def test_initial_weights_match_torchs_layers():
    head = Fnn((0, 1), 400, 3, 50, 0.0, CPU)
    bound = 1 / 20
    assert head.weight_in.detach().abs().max() <= bound
    assert head.weight_in.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (head.weight_in[0] != head.weight_in[1]).any()


def test_unscored_residues_have_no_effect():
    features, data = make_planted_task("residue", "class")
    hidden = data.scored.copy()
    hidden[::3] = False
    spoiled = data.targets.copy()
    spoiled[::3] = (spoiled[::3] + 1) % 3
    config = ProbeConfig("cnn", epochs=2, dropout=0.0)
    first = fit_probe(features, ProbeTargets.from_task(dataclasses.replace(data, scored=hidden)), config, (0,))
    second = fit_probe(
        features, ProbeTargets.from_task(dataclasses.replace(data, scored=hidden, targets=spoiled)), config, (0,)
    )
    assert (first.test_SM == second.test_SM).all()
    assert first.test_SM.shape[1] == len(dataclasses.replace(data, scored=hidden).target_rows("test"))


@pytest.mark.parametrize("probe", ["ridge", "fnn"])
def test_test_targets_do_not_affect_the_probe(probe):
    features, data = make_planted_task("protein", "value")
    spoiled = data.targets.copy()
    spoiled[data.rows("test")] = 1e3
    config = ProbeConfig(probe, **QUICK)
    clean = fit_probe(features, ProbeTargets.from_task(data), config, (0,))
    dirty = fit_probe(features, ProbeTargets.from_task(dataclasses.replace(data, targets=spoiled)), config, (0,))
    assert (clean.test_SM == dirty.test_SM).all()


def test_early_stopping_keeps_the_best_epoch_of_each_seed():
    features, data = make_planted_task("protein", "class", num_proteins=100, noise=3.0)
    config = ProbeConfig("fnn", epochs=60, learning_rate=2e-2, batch_size=16, patience=4)
    fitted = fit_probe(features, ProbeTargets.from_task(data), config, (0, 1, 2))
    curves = np.array(fitted.history["validation_loss"])
    for seed, epoch in enumerate(fitted.selected["epoch"]):
        assert curves[: epoch + 4, seed].argmin() == epoch - 1
    assert len(curves) < 60


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_head_that_diverged_is_refused(keep):
    features, data = make_planted_task("protein", "value", num_proteins=60)
    config = ProbeConfig("fnn", epochs=3, learning_rate=1e30, keep=keep)
    with refused("probe.diverged", probe="fnn", seeds=[4, 7], set="validation"):
        fit_probe(features, ProbeTargets.from_task(data), config, (4, 7))


@pytest.mark.parametrize(("level", "target", "probe"), CASES)
@pytest.mark.parametrize("set_name", ["train", "validation", "test"])
def test_features_that_are_not_finite_are_reported_with_their_protein(level, target, probe, set_name):
    """This also holds for the test set, where nan would silently become the first class."""
    features, data = make_planted_task(level, target, num_proteins=40, by_residue=reads_residues(probe))
    protein = int(data.rows(set_name)[1])
    features.values_ND[features.offsets[protein + 1] - 1, 3] = np.inf if level == "residue" else np.nan
    with refused("features.not-finite", source="planted", protein=f"p{protein}"):
        fit_probe(features, ProbeTargets.from_task(data), ProbeConfig(probe, epochs=1, standardize=False), (0,))


def test_a_memory_map_in_half_precision_gives_the_same_predictions(tmp_path):
    features, data = make_planted_task("residue", "class")
    np.save(tmp_path / "x.npy", features.values_ND)
    mapped = Features(np.load(tmp_path / "x.npy", mmap_mode="r"), features.offsets)
    config = ProbeConfig("cnn", epochs=1)
    assert (
        fit_probe(mapped, ProbeTargets.from_task(data), config, (0,)).test_SM
        == fit_probe(features, ProbeTargets.from_task(data), config, (0,)).test_SM
    ).all()


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("preset", SOURCES)
def test_every_preset_fits_every_task(preset, task):
    config = preset_config(preset, task)
    assert config.epochs > 0
    assert not (config.probe == "cnn" and task.level == "protein")
    assert preset_config(preset, task, "fnn").probe == "fnn"


def test_presets_match_the_published_protocols():
    schmirler = preset_config("schmirler", TASKS["gb1"])
    assert (schmirler.hidden, schmirler.dropout, schmirler.learning_rate) == (32, 0.2, 1e-4)
    assert (schmirler.batch_size, schmirler.epochs, schmirler.standardize) == (8, 240, True)
    bionemo = preset_config("bionemo", TASKS["secondary_structure_648"])
    assert (bionemo.probe, bionemo.epochs, bionemo.dropout, bionemo.keep) == ("cnn", 20, 0.25, "last")
    assert preset_config("flip2021", TASKS["gb1"]).hidden == 0
    biotrainer = preset_config("biotrainer-flip", TASKS["secondary_structure"])
    assert (biotrainer.optimizer, biotrainer.weight_decay, biotrainer.batch_size) == ("adamw_amsgrad", 0.01, 128)
    assert [default_probe(TASKS[name]) for name in ("gb1", "scl", "bind")] == ["ridge", "logistic", "cnn"]


@pytest.mark.parametrize(
    ("level", "target", "probe", "values"),
    [
        ("protein", "class", "cnn", {"level": "protein"}),
        ("residue", "class", "light_attention", {"level": "residue"}),
        ("protein", "class", "ridge", {"target": "class"}),
        ("residue", "value", "logistic", {"target": "value"}),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(level, target, probe, values):
    features, data = make_planted_task(level, target)
    with refused("probe.task", probe=probe, **values):
        fit_probe(features, ProbeTargets.from_task(data), ProbeConfig(probe))


def test_wrong_numbers_of_rows_are_reported_with_their_protein():
    features, data = make_planted_task("residue", "class")
    offsets = features.offsets.copy()
    offsets[5:] -= 1
    residues = int(data.num_residues[4])
    with refused("features.rows", protein="p4", found=residues - 1, expected=residues):
        fit_probe(Features(features.values_ND[:-1], offsets, "x.h5"), ProbeTargets.from_task(data), ProbeConfig("cnn"))
