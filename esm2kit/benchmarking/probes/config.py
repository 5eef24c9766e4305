"""Settings of probes, and published probing protocols as presets. This module does not import torch."""

from dataclasses import dataclass
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, suggest_name
from esm2kit.tasks.task import Task

ProbeName = Literal["ridge", "logistic", "fnn", "cnn", "light_attention", "attention"]
PresetName = Literal["esm2kit", "bionemo", "biotrainer-flip", "schmirler", "flip2021"]

# The source of each preset, shown in the report.
SOURCES: dict[str, str] = {
    "esm2kit": "esm2kit protocol: z-scored features, model selection and early stopping on validation",
    "bionemo": (
        "NVIDIA BioNeMo 1.x downstream_flip_*.yaml: 20 epochs, no model selection. Differences: no warm-up of 10 "
        "steps, bind is scored as three binary labels"
    ),
    "biotrainer-flip": (
        "biotrainer 1.4.0 FLIP settings: AdamW with AMSGrad, 20 epochs, patience 10. Difference: bind is scored as "
        "three binary labels"
    ),
    "schmirler": "Schmirler et al. 2024, 10.1038/s41467-024-51844-2: dense 32 on z-scored features, Adam 1e-4, batch 8",
    "flip2021": "FLIP baselines (NeurIPS 2021): one hidden layer as wide as the embedding, Adam 1e-3, batch 256",
}
SCHMIRLER_EPOCHS = {"gb1": 240, "secondary_structure": 10, "secondary_structure_648": 10}
BIOTRAINER_BATCH = {"aav": 256, "gb1": 256, "meltome": 32, "bind": 406}


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of a probe.

    Args:
        probe: ridge (values), logistic (classes), fnn, cnn (residue tasks), or light_attention and attention (protein
            tasks, read residue vectors).
        hidden: Hidden units of a neural probe. 0 uses the dimension of the features.
        dropout: Dropout rate of the hidden units.
        learning_rate: Learning rate of Adam.
        optimizer: adam adds the weight decay to the gradient. adamw_amsgrad, which biotrainer calls adam, uses
            decoupled weight decay and AMSGrad.
        weight_decay: Weight decay of the optimizer.
        epochs: Maximum number of passes over the training set.
        batch_size: Proteins per update.
        patience: Epochs without a lower validation loss before a seed stops. None trains for all epochs.
        keep: Weights to keep: those with the `best` validation loss, or those of the `last` epoch.
        standardize: Whether to z-score the features with the moments of the training set.
        scale_targets: Whether to z-score values during training. Scores are in the unit of the target either way.
        row_budget: Maximum rows (residues) in memory. A larger batch is processed in parts, with the same gradient.
    """

    probe: ProbeName
    hidden: int = 32
    dropout: float = 0.25
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "adamw_amsgrad"] = "adam"
    weight_decay: float = 0.0
    epochs: int = 200
    batch_size: int = 64
    patience: int | None = 10
    keep: Literal["best", "last"] = "best"
    standardize: bool = True
    scale_targets: bool = True
    row_budget: int = 8_192

    def __post_init__(self) -> None:
        check_choices(self)


def preset_config(preset: str, task: Task, probe: ProbeName | None = None) -> ProbeConfig:
    """Build the probe settings of a preset for a task.

    Args:
        preset: A key of SOURCES.
        task: Determines level, target and the settings that depend on the task.
        probe: Probe to use with the settings of the preset. Default: the preset's probe.

    Returns:
        The settings.

    Raises:
        InputError: The preset is unknown.
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
        raise InputError(
            f"unknown preset {preset!r}; {suggest_name(preset, SOURCES)}",
            code="probe.preset",
            found=preset,
            allowed=tuple(SOURCES),
        )
    return ProbeConfig(probe or default_probe(task))


def default_probe(task: Task) -> ProbeName:
    """Return ridge for values, logistic regression for protein classes, and the CNN for residue classes."""
    if task.target == "value":
        return "ridge"
    return "cnn" if task.level == "residue" else "logistic"
