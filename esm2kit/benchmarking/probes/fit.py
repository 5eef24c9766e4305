"""Probes: simple models of frozen features, fitted on train and selected on validation."""

import time

import numpy as np
import torch

from esm2kit.benchmarking.probes.config import ProbeConfig, ProbeName, default_probe
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets, check_finite
from esm2kit.benchmarking.probes.head_training import fit_head
from esm2kit.benchmarking.probes.linear import fit_logistic, fit_ridge
from esm2kit.core.errors import InputError
from esm2kit.tasks.task import Task


def fit_probe(
    features: Features,
    targets: ProbeTargets,
    config: ProbeConfig,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    device: str = "cpu",
) -> Fitted:
    """Fit on train, select on validation, predict test once.

    Args:
        features: rows of the same proteins in the same order: one a protein, or one a residue.
        targets: what to predict, and the sets.
        config: the probe and its settings.
        seeds: of the networks; linear probes are deterministic and give one row.
        device: for the networks.

    Returns:
        Predictions, learning curves and what was selected.

    Raises:
        InputError: probe, features and task do not go together, or features are nan or inf.
    """
    check_probe(config.probe, targets.task)
    check_rows(features, targets, config.probe)
    start = time.perf_counter()
    try:
        if config.probe == "ridge":
            fitted = fit_ridge(features, targets)
        elif config.probe == "logistic":
            fitted = fit_logistic(features, targets)
        else:
            fitted = fit_head(features, targets, config, seeds, torch.device(device))
    except InputError:
        check_finite(features, targets)  # no probe learns from nan, and no setting helps
        raise
    return fitted._replace(seconds=time.perf_counter() - start)


def check_rows(features: Features, targets: ProbeTargets, probe: ProbeName) -> None:
    """Refuse features of other proteins, or of another level than the probe reads.

    Raises:
        InputError: names the first protein that differs.
    """
    source, found, expected = features.name or "features", np.diff(features.offsets), np.diff(targets.offsets)
    if len(found) != len(expected):
        raise InputError(
            f"{source}: {len(found)} proteins for {len(expected)} in the task",
            code="features.proteins",
            found=len(found),
            expected=len(expected),
        )
    wrong = np.flatnonzero(found != expected)
    if probe == "light_attention" or not wrong.size:
        return
    if targets.task.level == "protein":
        raise InputError(
            f"probe {probe} on a protein task takes one vector a protein, not one a residue",
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
    """Refuse a probe that does not fit a task.

    Raises:
        InputError: names probes that do.
    """
    if probe == "cnn" and task.level == "protein":
        raise InputError(
            "probe cnn labels residues; a protein task takes ridge, logistic, fnn or light_attention",
            code="probe.task",
            probe=probe,
            level=task.level,
        )
    if probe == "light_attention" and task.level == "residue":
        raise InputError(
            "probe light_attention labels proteins; a residue task takes ridge, logistic, fnn or cnn",
            code="probe.task",
            probe=probe,
            level=task.level,
        )
    if probe in ("ridge", "logistic") and (probe == "ridge") != (task.target == "value"):
        raise InputError(
            f"probe {probe} does not fit a {task.target} task; take {default_probe(task)}",
            code="probe.task",
            probe=probe,
            target=task.target,
        )
