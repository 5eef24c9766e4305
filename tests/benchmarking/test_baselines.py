"""Baselines without a language model, each compared with a simple reference implementation."""

import dataclasses

import numpy as np
import pytest
import torch
from Bio.Align import substitution_matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from support.errors import refused
from support.planted import KINDS, make_planted_task

from esm2kit.benchmarking.baselines.fit import (
    compute_composition,
    encode_one_hot,
    encode_one_hot_padded,
    fit_baseline,
    list_baselines,
)
from esm2kit.benchmarking.baselines.neighbours import (
    predict_by_blosum62,
    predict_by_edit_distance,
    read_blosum62,
    trim_shared,
)
from esm2kit.benchmarking.baselines.window_cnn import LETTERS, TAPS, WindowCnn, WindowCnnConfig, Windows, fit_window_cnn
from esm2kit.tasks.data import load_task
from esm2kit.tasks.task import Split, Task
from esm2kit.tasks.task_data import TaskData


def reference_levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


letters = st.text("ACDE", max_size=64)


@given(prefix=letters, suffix=letters, middles=st.lists(letters, min_size=2, max_size=5))
@settings(deadline=None, max_examples=60)
def test_trimming_shared_ends_keeps_edit_distances(prefix, suffix, middles):
    full = [prefix + middle + suffix for middle in middles]
    trimmed = trim_shared(full)
    for a, b in zip(trimmed, full, strict=True):
        assert a in b
    assert reference_levenshtein(*trimmed[:2]) == reference_levenshtein(*full[:2])


def variants(num=150, seed=0):
    """Variants of a wild type at four sites; the value is a sum over the sites."""
    generator = np.random.default_rng(seed)
    wild = list("MKVLAAGGHHWWYYTTSSPPQQNNDDEE" * 3)
    effect = {(site, letter): generator.normal() for site in range(4) for letter in "ACDEFGHIKL"}
    sequences, values = [], []
    for _ in range(num):
        chosen = generator.choice(list("ACDEFGHIKL"), 4)
        mutant = wild.copy()
        for site, letter in enumerate(chosen):
            mutant[30 + 3 * site] = letter
        sequences.append("".join(mutant))
        values.append(sum(effect[site, letter] for site, letter in enumerate(chosen)))
    task = Task("v", "protein", "value", "spearman", {"s": Split()}, "s", variants=True)
    sets = np.array(["train"] * (num * 3 // 5) + ["validation"] * (num // 5) + ["test"] * (num // 5))
    ids = [f"v{i}" for i in range(num)]
    return TaskData(task, "s", ids, sequences, sets, np.array(values), np.ones(num, bool), {})


def test_nearest_variants_match_a_linear_search():
    data = variants()
    predicted, note = predict_by_edit_distance(data)
    assert not note
    for place, row in enumerate(data.rows("test")[:10]):
        distances = np.array(
            [reference_levenshtein(data.sequences[row], data.sequences[t]) for t in data.rows("train")]
        )
        expected = data.targets[data.rows("train")][distances == distances.min()].mean()
        assert predicted[0, place] == pytest.approx(expected)


def test_blosum_prefers_a_similar_residue():
    sequences = ["MKIVV", "MKDVV", "MKLVV", "MKEVV", "MKLVV"]
    task = Task("v", "protein", "value", "spearman", {"s": Split()}, "s", variants=True)
    sets = np.array(["train", "train", "validation", "test", "test"])
    data = TaskData(
        task, "s", list("abcde"), sequences, sets, np.array([1.0, 2.0, 0.0, 0.0, 0.0]), np.ones(5, bool), {}
    )
    assert predict_by_blosum62(data)[0].tolist() == [[2.0, 1.0]]  # E is closest to D, L to I


def test_edit_distances_of_long_variable_parts():
    data = variants()
    generator = np.random.default_rng(0)
    longer = dataclasses.replace(data, sequences=["".join(generator.choice(list("ACDE"), 90)) for _ in data.ids])
    predicted, _ = predict_by_edit_distance(longer)
    row, train = longer.rows("test")[0], longer.rows("train")
    distances = np.array([reference_levenshtein(longer.sequences[row], longer.sequences[other]) for other in train])
    assert predicted[0, 0] == pytest.approx(longer.targets[train][distances == distances.min()].mean())


def test_blosum62_matches_biopython():
    expected = substitution_matrices.load("BLOSUM62")
    found = read_blosum62()
    assert "".join(found) == expected.alphabet
    assert all(found[a][b] == found[b][a] == expected[a][b] for a in found for b in found)


@pytest.mark.parametrize(("level", "target"), KINDS)
def test_every_baseline_predicts_the_complete_test_set(level, target):
    _, data = make_planted_task(level, target, num_proteins=60)
    names = list_baselines(data)
    assert names[0] == ("mean" if target == "value" else "majority")
    for name in names:
        found = fit_baseline(name, data, seeds=(0, 1))
        assert found.fitted.test_SM.shape[1] == len(data.target_rows("test"))
        assert np.isfinite(found.fitted.test_SM).all()
        assert found.note


def test_constant_baselines_use_only_train():
    _, data = make_planted_task("protein", "value")
    assert fit_baseline("mean", data).fitted.test_SM[0, 0] == pytest.approx(data.targets[data.rows("train")].mean())
    _, data = make_planted_task("residue", "class", bits=("metal", "nucleic", "small"))
    assert (fit_baseline("majority", data).fitted.test_SM == 0).all()  # each bit is set in under half of train


def test_one_hot_ridge_matches_scikit_learn_with_flips_settings():
    data = variants()
    alphabet = "ARNDCQEGHILKMFPSTWYVXU"
    dense = np.stack([np.eye(22)[[alphabet.index(c) for c in s]].ravel() for s in data.sequences])
    assert (encode_one_hot_padded(data).toarray() == dense).all()
    fit = data.sets != "test"
    expected = Ridge(alpha=1, solver="lsqr", tol=1e-4).fit(dense[fit], data.targets[fit]).predict(dense[~fit])
    found = fit_baseline("onehot_ridge", data).fitted.test_SM[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert spearmanr(found, data.targets[~fit]).statistic > 0.8


def test_composition_and_one_hot_features():
    _, data = make_planted_task("protein", "class", num_proteins=20)
    row = compute_composition(data).values_ND[3]
    assert row[0] == pytest.approx(data.sequences[3].count("L") / len(data.sequences[3]))
    assert row[-1] == pytest.approx(np.log(len(data.sequences[3])))
    _, data = make_planted_task("residue", "class", num_proteins=20)
    windows = compute_composition(data)
    sequence, start = data.sequences[4], data.offsets[4]
    assert windows.values_ND[start + 2, 1] == pytest.approx(sequence[:13].count("A") / 13, abs=1e-3)
    one_hot = encode_one_hot(data).values_ND
    assert (one_hot.sum(1) == 1).all()
    assert one_hot[start, "LAGVSERTIDPKQNFYMHWC".index(sequence[0])] == 1


def test_window_cnn_matches_a_convolution_over_all_positions():
    data = variants(40)
    windows = Windows(data.sequences)
    assert len(windows.shared) > 0
    model = WindowCnn(WindowCnnConfig(channels=7, hidden=9), 1, torch.Generator().manual_seed(0))
    proteins = np.array([3, 8, 8, 21])
    distinct, where = windows.batch(proteins)
    found = model(torch.from_numpy(windows.letters_UK[distinct]), torch.from_numpy(where), len(windows.shared))
    weight = model.convolution.view(TAPS, LETTERS - 1, 7)
    alphabet = "LAGVSERTIDPKQNFYMHWCXBUZO"
    for place, protein in enumerate(proteins):
        one_hot = torch.eye(25)[[alphabet.index(c) for c in data.sequences[protein]]]
        hidden = torch.nn.functional.conv1d(one_hot.T[None], weight.permute(2, 1, 0), padding=2)[0].T + model.bias
        hidden = (hidden.relu() @ model.weight_hidden + model.bias_hidden).relu().amax(0)
        torch.testing.assert_close(found[place], hidden @ model.weight_out + model.bias_out, rtol=1e-4, atol=1e-5)


def test_window_cnn_learns_variants():
    data = variants(400)
    fitted = fit_window_cnn(data, WindowCnnConfig(epochs=60, learning_rates=(3e-3,) * 3, patience=60), (0,))
    assert spearmanr(fitted.test_SM[0], data.targets[data.rows("test")]).statistic > 0.6
    assert (WindowCnnConfig.flip2021().channels, WindowCnnConfig.flip2021().hidden) == FLIP_WIDTHS


def test_a_window_cnn_that_diverged_is_refused():
    config = WindowCnnConfig(epochs=2, learning_rates=(1e30,) * 3)
    with refused("probe.diverged", probe="onehot_cnn", seeds=[5]):
        fit_window_cnn(variants(80), config, (5,))


FLIP_WIDTHS = (1024, 2048)


@pytest.mark.shared
@pytest.mark.parametrize(("split", "spearman"), [("one_vs_rest", 0.28), ("two_vs_rest", 0.59), ("three_vs_rest", 0.76)])
def test_one_hot_ridge_reproduces_flip_on_gb1(shared_data, split, spearman):
    data = load_task("gb1", split, shared_data / "flip")
    predicted = fit_baseline("onehot_ridge", data).fitted.test_SM[0]
    assert spearmanr(predicted, data.targets[data.rows("test")]).statistic == pytest.approx(spearman, abs=0.005)


@pytest.mark.shared
def test_one_hot_cnn_reproduces_flip_on_secondary_structure(shared_data):
    """All 11,156 proteins with one seed, about 20 s; `benchmarks/baselines.py` runs five seeds."""
    data = load_task("secondary_structure", None, shared_data / "flip")
    truth = data.targets[data.target_rows("test")]
    assert (fit_baseline("majority", data).fitted.test_SM[0] == truth).mean() == pytest.approx(0.384, abs=0.01)
    assert (fit_baseline("onehot_cnn", data, seeds=(0,)).fitted.test_SM[0] == truth).mean() == pytest.approx(
        0.66, abs=0.01
    )


@pytest.mark.shared
def test_training_mean_beats_the_published_rmse_on_gb1(shared_data):
    """NVIDIA's model card reports 1.29 for a 650M model; predicting the mean of train gives 1.252."""
    data = load_task("gb1", "two_vs_rest", shared_data / "flip")
    predicted = fit_baseline("mean", data).fitted.test_SM[0]
    assert np.sqrt(np.mean((predicted - data.targets[data.rows("test")]) ** 2)) == pytest.approx(1.252, abs=0.0005)
