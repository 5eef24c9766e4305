"""Probes: simple models of frozen features, trained on the training set and selected on validation."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from esm2kit.benchmarking.probes.config import ProbeConfig, ProbeName, default_probe
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets, check_finite
from esm2kit.benchmarking.probes.fold_training import can_share_a_pass, fit_fnn_folds
from esm2kit.benchmarking.probes.head_training import fit_head
from esm2kit.benchmarking.probes.heads import reads_residues
from esm2kit.benchmarking.probes.linear import fit_logistic, fit_ridge, fit_ridge_folds
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.hardware import resolve_device
from esm2kit.tasks.label_metrics import choose_threshold
from esm2kit.tasks.task import Task


def fit_probe(
    features: Features,
    targets: ProbeTargets,
    config: ProbeConfig,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    device: str = "cpu",
    penalty: float | Sequence[float] | None = None,
) -> Fitted:
    """Fit a probe on train, select on validation, and predict the test set.

    Args:
        features: Rows of the task's proteins in the same order, one per protein or one per residue.
        targets: Targets and sets.
        config: The probe and its settings.
        seeds: Seeds of a neural probe. Linear probes are deterministic and have one row of predictions.
        device: Device of a neural probe.
        penalty: Penalty of a linear probe, for ridge on several targets one for each. None selects it.

    Returns:
        Predictions, learning curves and the selected settings.

    Raises:
        InputError: The probe, the features and the task do not match, or the features contain nan or inf.
    """
    for name, value, kind in (
        ("features", features, Features),
        ("targets", targets, ProbeTargets),
        ("config", config, ProbeConfig),
    ):
        check_type(value, kind, name)
    check_probe(config.probe, targets.task)
    check_rows(features, targets, config.probe)
    start = time.perf_counter()
    try:
        if config.probe == "ridge":
            fitted = fit_ridge(features, targets, penalty)
        elif config.probe == "logistic":
            fitted = fit_logistic(features, targets, penalty)
        else:
            fitted = fit_head(features, targets, config, seeds, torch.device(device))
    except InputError:
        check_finite(features, targets)  # reports nan or inf in the features as the cause
        raise
    fitted = select_threshold(fitted, targets)
    return fitted._replace(seconds=time.perf_counter() - start)


def fit_probe_folds(
    features: Features,
    targets_F: Sequence[ProbeTargets],
    config: ProbeConfig,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    device: str = "cpu",
) -> list[Fitted]:
    """Fit a probe in each fold of a cross-validation, as `fit_probe` does.

    Ridge regression takes the folds of a repeat from one pass over the features, and the FNN of proteins trains all
    folds and seeds in one pass. All other probes are fitted one fold after the other.

    Args:
        features: Rows of the task's proteins.
        targets_F: Targets and sets of each fold.
        config: The probe and its settings.
        seeds: Seeds of a neural probe.
        device: Device of a neural probe.

    Returns:
        One fit per fold, without parameters of the probes.

    Raises:
        InputError: As for `fit_probe`.
    """
    shared = can_share_a_pass(features, targets_F, config)
    if config.probe != "ridge" and not shared:
        return [fit_probe(features, targets, config, seeds, device)._replace(parameters=None) for targets in targets_F]
    check_probe(config.probe, targets_F[0].task)
    check_rows(features, targets_F[0], config.probe)
    start = time.perf_counter()
    try:
        if shared:
            fitted = fit_fnn_folds(features, targets_F, config, seeds, torch.device(device))
        else:
            fitted = [fit for part in _split_repeats(targets_F) for fit in fit_ridge_folds(features, part)]
    except InputError:
        check_finite(features, targets_F[0])
        raise
    seconds = (time.perf_counter() - start) / len(fitted)
    return [each._replace(seconds=seconds, parameters=None) for each in fitted]


def _split_repeats(targets_F: Sequence[ProbeTargets]) -> list[list[ProbeTargets]]:
    """Split folds into repeats, in each of which a protein is in one test set."""
    repeats: list[list[ProbeTargets]] = []
    seen: set[int] = set()
    for targets in targets_F:
        test = set(targets.proteins["test"].tolist())
        if not repeats or seen & test:
            repeats.append([])
            seen = set()
        repeats[-1].append(targets)
        seen |= test
    return repeats


def resolve_probe_device(requested: str) -> str:
    """Return the device of neural probes: cpu instead of mps, because they are small and not tested there."""
    device = resolve_device(requested)
    return "cpu" if device == "mps" else device


def fit_fnns(
    sources: Sequence[Features],
    targets: ProbeTargets,
    config: ProbeConfig,
    seeds: tuple[int, ...],
    device: str = "cpu",
) -> list[Fitted]:
    """Fit an FNN on each of several features of the same proteins, such as layers, all in one pass.

    Args:
        sources: Features of the same width, one row per protein.
        targets: Targets and sets.
        config: Settings of the FNN.
        seeds: Seeds of each.
        device: Device.

    Returns:
        For each of the features what `fit_probe` returns, up to rounding, without parameters and learning curves.

    Raises:
        InputError: The features and the task do not match, or the features contain nan or inf.
    """
    start = time.perf_counter()
    check_probe(config.probe, targets.task)
    for source in sources:
        check_rows(source, targets, config.probe)
        check_finite(source, targets)
    values_NX = np.concatenate([source.values_ND for source in sources], axis=1)
    together = Features(values_NX, sources[0].offsets, sources[0].name)
    fitted = fit_head(together, targets, config, seeds, torch.device(device), len(sources))
    seconds = (time.perf_counter() - start) / len(sources)
    parts = zip(*(np.split(part, len(sources)) for part in (fitted.test_SM, fitted.validation_SM)), strict=True)
    return [select_threshold(Fitted(*predicted, seconds=seconds), targets) for predicted in parts]


def select_threshold(fitted: Fitted, targets: ProbeTargets) -> Fitted:
    """Choose on validation the probability above which a label is predicted, for each seed of a multi-label task.

    Args:
        fitted: Predictions.
        targets: The targets.

    Returns:
        The same, with `threshold` among the selected settings; unchanged for other tasks.
    """
    if not targets.task.is_multilabel:
        return fitted
    truth_ML = targets.packed[targets.rows("validation")]
    chosen = [choose_threshold(truth_ML, probability_ML) for probability_ML in fitted.validation_SM]
    return fitted._replace(selected=fitted.selected | {"threshold": chosen})


def check_rows(features: Features, targets: ProbeTargets, probe: ProbeName) -> None:
    """Check that the features have the proteins of the task and the level that the probe requires.

    Args:
        features: The feature rows.
        targets: The targets of the task.
        probe: The probe.

    Raises:
        InputError: The features do not match. The message contains the first protein that differs.
    """
    source, found, expected = features.name or "features", np.diff(features.offsets), np.diff(targets.offsets)
    if len(found) != len(expected):
        raise InputError(
            f"{source}: found {len(found)} proteins, but the task has {len(expected)}",
            code="features.proteins",
            found=len(found),
            expected=len(expected),
        )
    wrong = np.flatnonzero(found != expected)
    if reads_residues(probe) or not wrong.size:
        return
    if targets.task.level == "protein":
        raise InputError(
            f"{source}: probe {probe} requires one vector per protein on a protein task, found one per residue",
            code="features.level",
            probe=probe,
            expected="protein",
        )
    first = wrong[0]
    raise InputError(
        f"{source}: protein {targets.name(first)!r} has {found[first]} rows for {expected[first]} residues "
        f"({wrong.size} proteins differ)",
        code="features.rows",
        protein=targets.name(first),
        found=int(found[first]),
        expected=int(expected[first]),
        differ=wrong.size,
    )


def check_probe(probe: ProbeName, task: Task) -> None:
    """Check that a probe can label the targets of a task.

    Args:
        probe: The probe.
        task: The task.

    Raises:
        InputError: The probe does not fit. The message contains probes that do.
    """
    if probe == "cnn" and task.level == "protein":
        raise InputError(
            "probe cnn labels residues: for a protein task choose ridge, logistic, fnn, attention or light_attention",
            code="probe.task",
            probe=probe,
            level=task.level,
        )
    if reads_residues(probe) and task.level == "residue":
        raise InputError(
            f"probe {probe} labels proteins: for a residue task choose ridge, logistic, fnn or cnn",
            code="probe.task",
            probe=probe,
            level=task.level,
        )
    if probe in ("ridge", "logistic") and (probe == "ridge") != (task.target == "value"):
        raise InputError(
            f"probe {probe} cannot predict targets of type {task.target}: choose {default_probe(task)}",
            code="probe.task",
            probe=probe,
            target=task.target,
        )
