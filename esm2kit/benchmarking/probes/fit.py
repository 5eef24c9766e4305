"""Probes: what a simple model, fitted on train and selected on validation, reads off frozen features."""

import time

import torch

from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeConfig, ProbeName, check_numbers, check_rows
from esm2kit.benchmarking.probes.head_training import fit_head
from esm2kit.benchmarking.probes.linear import fit_logistic, fit_ridge
from esm2kit.benchmarking.probes.presets import default_probe
from esm2kit.core.errors import InputError
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.task import Task


def fit_probe(
    features: Features,
    data: TaskData,
    config: ProbeConfig,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    device: str = "cpu",
) -> Fitted:
    """Fit on train, select on validation, predict test once.

    Args:
        features: rows aligned with the task: one a protein, or one a residue.
        data: the task.
        config: the probe and its settings.
        seeds: of the networks; linear probes have no chance in them and give one row.
        device: for the networks.
    Returns: predictions, learning curves and what was selected.
    Raises: InputError if probe, features and task do not go together, or features are nan or inf.
    """
    check_rows(features, data)
    check_probe(config.probe, data.task)
    if len(features.values_ND) != len(data.targets) and config.probe != "light_attention":
        raise InputError(f"probe {config.probe} on a protein task takes one vector a protein, not one a residue")
    start = time.perf_counter()
    try:
        if config.probe == "ridge":
            fitted = fit_ridge(features, data)
        elif config.probe == "logistic":
            fitted = fit_logistic(features, data)
        else:
            fitted = fit_head(features, data, config, seeds, torch.device(device))
    except InputError:
        check_numbers(features, data)  # what no probe can learn from, and no setting mends
        raise
    return fitted._replace(seconds=time.perf_counter() - start)


def check_probe(probe: ProbeName, task: Task) -> None:
    """Refuse a probe that cannot answer a task's question.

    Raises: InputError naming one that can.
    """
    if probe == "cnn" and task.level == "protein":
        raise InputError("probe cnn labels residues; a protein task takes ridge, logistic, fnn or light_attention")
    if probe == "light_attention" and task.level == "residue":
        raise InputError("probe light_attention labels proteins; a residue task takes ridge, logistic, fnn or cnn")
    if probe in ("ridge", "logistic") and (probe == "ridge") != (task.target == "value"):
        raise InputError(f"probe {probe} does not fit a {task.target} task; take {default_probe(task)}")
