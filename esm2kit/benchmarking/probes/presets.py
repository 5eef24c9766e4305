"""Other people's probing protocols by name, so that their figures can be put to the same test."""

from typing import Literal

from esm2kit.benchmarking.probes.features import ProbeConfig, ProbeName
from esm2kit.core.errors import InputError, nearest
from esm2kit.tasks.task import Task

PresetName = Literal["esm2kit", "bionemo", "biotrainer-flip", "schmirler", "flip2021"]

# What each reproduces, for the report.
SOURCES: dict[str, str] = {
    "esm2kit": "this library's own: z-scored features, selection and early stopping on validation",
    "bionemo": (
        "NVIDIA BioNeMo 1.x downstream_flip_*.yaml: 20 epochs, no selection; its warm-up of 10 steps is left out, and "
        "bind is scored as three labels"
    ),
    "biotrainer-flip": (
        "biotrainer 1.4.0's FLIP settings: AdamW with AMSGrad, 20 epochs, patience 10; bind is scored as three labels"
    ),
    "schmirler": "Schmirler et al. 2024, 10.1038/s41467-024-51844-2: dense 32 on z-scored features, Adam 1e-4, batch 8",
    "flip2021": "FLIP's baselines (NeurIPS 2021): one hidden layer as wide as the embedding, Adam 1e-3, batch 256",
}
SCHMIRLER_EPOCHS = {"gb1": 240, "secondary_structure": 10, "secondary_structure_648": 10}
BIOTRAINER_BATCH = {"aav": 256, "gb1": 256, "meltome": 32, "bind": 406}


def preset_config(preset: str, task: Task, probe: ProbeName | None = None) -> ProbeConfig:
    """The protocol's settings for a task.

    Args:
        preset: a key of SOURCES.
        task: decides level, target and the settings that are the task's own.
        probe: another probe than the protocol's, with the settings kept.
    Raises: InputError for an unknown preset.
    """
    raw = {"standardize": False, "scale_targets": False}
    head: ProbeName = "cnn" if task.level == "residue" else "fnn"
    if preset == "bionemo":
        if task.level == "residue":
            settings = {"dropout": 0.25, "batch_size": 64}
        else:
            value = task.target == "value"
            settings = {"hidden": 128 if value else 256, "dropout": 0.1, "batch_size": 32 if value else 64}
            settings |= {"learning_rate": 5e-4, "weight_decay": 0.01}
        return ProbeConfig(probe or head, **raw, **settings, epochs=20, patience=None, keep="last")
    if preset == "biotrainer-flip":
        return ProbeConfig(
            probe or head,
            **raw,
            dropout=0.0 if task.level == "residue" else 0.25,
            optimizer="adamw_amsgrad",
            weight_decay=0.01,
            learning_rate=1e-2 if task.name == "bind" else 1e-3,
            batch_size=BIOTRAINER_BATCH.get(task.name, 128),
            epochs=20,
            patience=10,
        )
    if preset == "schmirler":
        epochs = SCHMIRLER_EPOCHS.get(task.name, 120)
        settings = {"dropout": 0.2, "learning_rate": 1e-4, "batch_size": 8, "epochs": epochs, "patience": None}
        return ProbeConfig(probe or "fnn", standardize=True, scale_targets=False, **settings)
    if preset == "flip2021":
        settings = {"hidden": 0, "dropout": 0.0, "batch_size": 256, "epochs": 500, "patience": 20}
        return ProbeConfig(probe or "fnn", **raw, **settings, keep="last")
    if preset != "esm2kit":
        raise InputError(f"unknown preset {preset!r}; {nearest(preset, SOURCES)}")
    return ProbeConfig(probe or default_probe(task))


def default_probe(task: Task) -> ProbeName:
    """ridge for values, logistic regression for a protein's class, the CNN for residue classes."""
    if task.target == "value":
        return "ridge"
    return "cnn" if task.level == "residue" else "logistic"
