"""Baselines: constant predictions, and models of the sequence that do not use a language model."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import Ridge, RidgeClassifier
from torch import Tensor

from esm2kit.benchmarking.baselines.degree import fit_degree
from esm2kit.benchmarking.baselines.neighbours import predict_by_blosum62, predict_by_edit_distance
from esm2kit.benchmarking.baselines.window_cnn import WindowCnnConfig, fit_window_cnn
from esm2kit.benchmarking.pair_features import combine_features, list_proteins
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe, select_threshold
from esm2kit.benchmarking.probes.parameters import CONSTANT, ProbeParameters
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

# Alphabet of FLIP's one-hot encoding. Other letters (B, Z, O) are encoded as zeros.
FLIP_LETTERS = "ARNDCQEGHILKMFPSTWYVXU"
COMPOSITION_WINDOW = 10
# The one-hot residue CNN: conv7-32-ReLU-conv7, Adam 1e-3, batch 32, 6 epochs.
ONE_HOT_CNN = ProbeConfig(
    "cnn", dropout=0.0, batch_size=32, epochs=6, patience=None, standardize=False, scale_targets=True
)


class Baseline(NamedTuple):
    """The predictions of a baseline.

    Args:
        name: mean, majority, onehot_ridge, onehot_cnn, composition, levenshtein_nearest or blosum62_nearest.
        fitted: Predictions.
        note: Description of the method for the report.
    """

    name: str
    fitted: Fitted
    note: str


def list_baselines(data: TaskData) -> tuple[str, ...]:
    """Return the names of the baselines that apply to a task."""
    constant = "mean" if data.task.target == "value" else "majority"
    if data.pairs is not None:
        return (constant, *(() if data.task.has_columns else ("degree",)), "composition")
    names = (constant, "composition", "onehot_ridge", "onehot_cnn")
    nearest = ("levenshtein_nearest", "blosum62_nearest") if data.task.variants else ()
    if data.task.is_multilabel and not nearest:  # relatives often share labels
        nearest = ("levenshtein_nearest",)
    return (*names, *nearest)


def name_baseline_inputs(name: str, level: str) -> str | None:
    """Return what a baseline computes from a sequence, if its probe can predict other proteins.

    Args:
        name: Name of the baseline.
        level: Level of the task.

    Returns:
        "none" (a constant), "composition" or "one_hot"; None for a baseline that is not saved.
    """
    known = {"mean": "none", "majority": "none", "composition": "composition"}
    if level == "residue":
        known |= {"onehot_ridge": "one_hot", "onehot_cnn": "one_hot"}
    return known.get(name)


def fit_baseline(
    name: str, data: TaskData, seeds: tuple[int, ...] = (0, 1, 2, 3, 4), wide_cnn: bool = False
) -> Baseline:
    """Fit one baseline.

    Args:
        name: A name from `list_baselines`.
        data: The task.
        seeds: Seeds of the one-hot CNN.
        wide_cnn: Whether the protein CNN has the width of FLIP (1,024 and 2,048 units) instead of 64 and 128.

    Returns:
        The predictions, with their wall time.
    """
    start = time.perf_counter()
    fits: dict[str, Callable[[], Baseline]] = {
        "mean": lambda: _fit_constant(name, data),
        "majority": lambda: _fit_constant(name, data),
        "composition": lambda: _fit_composition(data),
        "degree": lambda: Baseline(
            name, fit_degree(data), "knows only how often each protein has each target in train"
        ),
        "onehot_ridge": lambda: _fit_one_hot_ridge(data),
        "onehot_cnn": lambda: _fit_one_hot_cnn(data, seeds, wide_cnn),
        "levenshtein_nearest": lambda: _build_nearest(name, predict_by_edit_distance(data), "edit distance"),
        "blosum62_nearest": lambda: _build_nearest(name, predict_by_blosum62(data), "BLOSUM62 similarity"),
    }
    found = fits[name]()
    seconds = time.perf_counter() - start
    return found._replace(fitted=found.fitted._replace(seconds=seconds))


def describe_baseline_probe(name: str, data: TaskData) -> tuple[Features, ProbeConfig] | None:
    """Return the features and the probe of a baseline that can be saved; None for a constant.

    Args:
        name: A name for which `name_baseline_inputs` returns one.
        data: The task.

    Returns:
        The features of all proteins, and the probe.
    """
    if name == "composition" and data.pairs is not None:
        return combine_features(compute_composition(list_proteins(data)), data), _choose_linear_probe(data)
    if name == "composition":
        return compute_composition(data), _choose_linear_probe(data)
    if name in ("onehot_ridge", "onehot_cnn"):
        return encode_one_hot(data), ONE_HOT_CNN if name == "onehot_cnn" else _choose_linear_probe(data)
    return None


def choose_constant(data: TaskData) -> float | np.ndarray:
    """Return the constant prediction, the mean or the majority class of train; of several targets one for each."""
    y_N, bits = data.targets[data.target_rows("train")], len(data.task.binary_labels)
    if data.task.target == "value":
        return TargetScale.from_values(y_N).centre
    if data.task.is_multilabel:
        return y_N.mean(0)
    if bits:
        return int(((unpack_bits(y_N, bits).mean(0) > 0.5) * (1 << np.arange(bits))).sum())
    return int(np.bincount(y_N).argmax())


def _fit_constant(name: str, data: TaskData) -> Baseline:
    """Predict the mean or the majority class of train for every target."""
    y, constant = data.targets[data.target_rows("train")], choose_constant(data)
    if data.task.target == "value":
        note = "predicts the mean of the training set"
    elif data.task.is_multilabel:
        note = "predicts the most frequent state of each label in the training set"
    elif data.task.binary_labels:
        note = "predicts the majority value of each binary label in the training set"
    else:
        note = "predicts the majority class of the training set"
    constants = (repeat_constant(constant, len(data.target_rows(set_name))) for set_name in ("test", "validation"))
    bias_C = _compute_bias(data.task, y, constant)
    fitted = Fitted(*constants, parameters=ProbeParameters(CONSTANT, {"bias_C": bias_C}))
    if data.task.target == "class":
        test, validation = (
            np.tile(bias_C.numpy(), (len(data.target_rows(set_name)), 1)) for set_name in ("test", "validation")
        )
        fitted = fitted._replace(test_logits_MC=test, validation_logits_MC=validation)
    return Baseline(name, fitted, note)


def repeat_constant(constant: float | np.ndarray, count: int) -> np.ndarray:
    """Repeat the constant prediction of a target, or of several: (1, count) or (1, count, C)."""
    return np.repeat(np.array([constant])[:, None], count, axis=1)


def _compute_bias(task: Task, y: np.ndarray, constant: float | tuple[float, ...] | np.ndarray) -> Tensor:
    """Return the outputs of a constant (C,): the value, or the logits of the shares of the training labels."""
    if task.target == "value":
        return torch.tensor(constant, dtype=torch.float64).reshape(-1)
    if task.binary_labels:
        present_NL = y if task.is_multilabel else unpack_bits(y, len(task.binary_labels))
        return torch.logit(torch.from_numpy(present_NL.mean(0)), eps=1e-6).float()
    counts = np.bincount(y, minlength=len(task.labels))
    return torch.from_numpy(np.log(np.maximum(counts, 0.5) / len(y))).float()


def encode_residues(data: TaskData, letters: str) -> np.ndarray:
    """Return the index of each residue in `letters` (residues of all proteins,); len(letters) for other residues."""
    table = np.full(256, len(letters), dtype=np.uint8)
    table[np.frombuffer(letters.encode(), np.uint8)] = np.arange(len(letters), dtype=np.uint8)
    return table[np.frombuffer("".join(data.sequences).encode(), dtype=np.uint8)]


def _residue_offsets(data: TaskData) -> np.ndarray:
    """Return the offsets (P + 1,) of the residues of each protein."""
    return np.concatenate([[0], np.cumsum(data.num_residues)])


def encode_one_hot(data: TaskData) -> Features:
    """Encode each residue as one-hot (residues, 25) uint8, features of a residue task without a language model."""
    table = np.eye(len(RESIDUE_LETTERS) + 1, len(RESIDUE_LETTERS), dtype=np.uint8)
    return Features(table[encode_residues(data, RESIDUE_LETTERS)], _residue_offsets(data), "one-hot")


def compute_composition(data: TaskData) -> Features:
    """Compute amino-acid fractions: of a protein, with its log length, or of the window around each residue."""
    codes = encode_residues(data, RESIDUE_LETTERS)
    offsets = _residue_offsets(data)
    width = len(RESIDUE_LETTERS)
    sums = np.zeros((len(codes) + 1, width), dtype=np.int32)
    known = codes < width
    sums[1:][np.flatnonzero(known), codes[known]] = 1
    np.cumsum(sums, axis=0, out=sums)
    if data.task.level == "protein":
        counts = sums[offsets[1:]] - sums[offsets[:-1]]
        size = data.num_residues[:, None]
        return Features(np.hstack([counts / size, np.log(size)]).astype(np.float32), data.offsets, "composition")
    position = np.arange(len(codes))
    owner = np.repeat(np.arange(len(data.ids)), data.num_residues)
    low = np.maximum(position - COMPOSITION_WINDOW, offsets[owner])
    high = np.minimum(position + COMPOSITION_WINDOW + 1, offsets[owner + 1])
    shares = (sums[high] - sums[low]) / (high - low)[:, None]
    return Features(shares.astype(np.float16), offsets, "composition")


def _choose_linear_probe(data: TaskData) -> ProbeConfig:
    """Return ridge for values and logistic regression for classes."""
    return ProbeConfig("ridge" if data.task.target == "value" else "logistic")


def _fit_composition(data: TaskData) -> Baseline:
    """Fit a linear model of the amino-acid composition."""
    per_protein = data.task.level == "protein"
    scope = "the protein, and its log length" if per_protein else f"a window of +-{COMPOSITION_WINDOW} residues"
    scope = scope if data.pairs is None else "both proteins of a pair"
    features, probe = describe_baseline_probe("composition", data)
    fitted = fit_probe(features, ProbeTargets.from_task(data), probe)
    return Baseline("composition", fitted, f"linear model of the amino-acid composition of {scope}")


def encode_one_hot_padded(data: TaskData) -> csr_matrix:
    """Encode proteins as FLIP does: one-hot per position, padded to the longest, sparse (P, 22 * longest)."""
    width = len(FLIP_LETTERS)
    codes = encode_residues(data, FLIP_LETTERS)
    offsets = _residue_offsets(data)
    owner = np.repeat(np.arange(len(data.ids)), data.num_residues)
    column = (np.arange(len(codes)) - offsets[owner]) * width + codes
    known = codes < width
    ones = np.ones(int(known.sum()), dtype=np.float64)
    shape = (len(data.ids), width * int(data.num_residues.max()))
    return csr_matrix((ones, (owner[known], column[known])), shape=shape)


def _fit_one_hot_ridge(data: TaskData) -> Baseline:
    """Fit FLIP 2021's Ridge(alpha=1, solver lsqr, tol 1e-4) on train and validation, without model selection."""
    if data.task.level == "residue":
        features, probe = describe_baseline_probe("onehot_ridge", data)
        fitted = fit_probe(features, ProbeTargets.from_task(data), probe)
        return Baseline("onehot_ridge", fitted, "linear model of the one-hot residue")
    features = encode_one_hot_padded(data)
    fit = np.concatenate([data.rows("train"), data.rows("validation")])
    value = data.task.target == "value"
    scale = TargetScale.from_values(data.targets[fit]) if value else TargetScale()
    y = scale.standardise(data.targets[fit]) if value else data.targets[fit]
    predicted = _predict_by_ridge(data.task, features[fit], y, features[data.rows("test")])[None]
    # no score on validation: the model is trained on these proteins
    fitted = Fitted(scale.restore(predicted) if value else predicted, np.empty((1, 0)))
    return Baseline("onehot_ridge", fitted, "FLIP 2021: ridge on one-hot sequences, alpha 1, train and validation")


def _predict_by_ridge(task: Task, fit_x: csr_matrix, y: np.ndarray, test_x: csr_matrix) -> np.ndarray:
    """Predict by scikit-learn's ridge: values, classes, or scores of labels between 0 and 1."""
    model = (Ridge if task.target == "value" else RidgeClassifier)(alpha=1.0, solver="lsqr", tol=1e-4)
    if task.columns:  # each target from the proteins that have a value
        known_NC = ~np.isnan(y)
        parts = [
            model.fit(fit_x[known], column[known]).predict(test_x)
            for known, column in zip(known_NC.T, y.T, strict=True)
        ]
        return np.stack(parts, axis=1)
    model.fit(fit_x, y)
    if task.is_multilabel:  # a label is predicted where the decision is positive
        decision = model.decision_function(test_x).reshape(test_x.shape[0], -1)
        return 1 / (1 + np.exp(-decision))
    return model.predict(test_x)


def _fit_one_hot_cnn(data: TaskData, seeds: tuple[int, ...], wide: bool) -> Baseline:
    """Fit the one-hot CNN, one network per seed."""
    if data.task.level == "residue":
        features, probe = describe_baseline_probe("onehot_cnn", data)
        fitted = fit_probe(features, ProbeTargets.from_task(data), probe, seeds)
        return Baseline("onehot_cnn", fitted, "CNN on one-hot residues: conv7-32-conv7, 6 epochs")
    config = WindowCnnConfig.flip2021() if wide else WindowCnnConfig()
    note = f"CNN on one-hot residues: conv5-{config.channels}, linear {config.hidden}, maximum over positions"
    fitted = select_threshold(fit_window_cnn(data, config, seeds), ProbeTargets.from_task(data))
    return Baseline("onehot_cnn", fitted, note)


def _build_nearest(name: str, found: tuple[np.ndarray, str], measure: str) -> Baseline:
    """Build a nearest-neighbour baseline from its predictions and a note."""
    predicted, note = found
    what = "proteins" if predicted.ndim > 2 else "variants"
    method = f"mean target of the nearest train {what} by {measure}"
    return Baseline(name, Fitted(predicted, np.empty((1, 0))), f"{method}; {note}" if note else method)
