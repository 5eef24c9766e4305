"""Probes: what a simple model, fitted on train and selected on validation, reads off frozen features."""

import time

import torch

from esm2kit.errors import InputError
from esm2kit.features import Features, Fitted, ProbeConfig, check_rows
from esm2kit.head_training import fit_head
from esm2kit.heads import HEADS
from esm2kit.linear import fit_logistic, fit_ridge
from esm2kit.presets import default_probe
from esm2kit.tasks import TaskData


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
    Raises: InputError if probe, features and task do not go together.
    """
    check_rows(features, data)
    rows_are_targets = len(features.values_ND) == len(data.targets)
    per_protein = config.probe in HEADS and HEADS[config.probe].per_protein
    if config.probe == "cnn" and data.task.level == "protein":
        raise InputError("probe cnn labels residues; a protein task takes ridge, logistic, fnn or light_attention")
    if per_protein and data.task.level == "residue":
        raise InputError("probe light_attention labels proteins; a residue task takes ridge, logistic, fnn or cnn")
    if not rows_are_targets and not per_protein:
        raise InputError(f"probe {config.probe} on a protein task takes one vector a protein, not one a residue")
    if (config.probe == "ridge") != (data.task.target == "value") and config.probe in ("ridge", "logistic"):
        raise InputError(
            f"probe {config.probe} does not fit a {data.task.target} task; take {default_probe(data.task)}"
        )
    start = time.perf_counter()
    if config.probe == "ridge":
        fitted = fit_ridge(features, data)
    elif config.probe == "logistic":
        fitted = fit_logistic(features, data)
    else:
        fitted = fit_head(features, data, config, seeds, torch.device(device))
    return fitted._replace(seconds=time.perf_counter() - start)
