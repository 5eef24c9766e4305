"""How a probe is fitted, and others' probing protocols by name, so that their scores can be compared; without torch."""

from dataclasses import dataclass
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, suggest_name
from esm2kit.tasks.task import Task

ProbeName = Literal["ridge", "logistic", "fnn", "cnn", "light_attention"]
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


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is fitted.

    Args:
        probe: ridge (values), logistic (classes), fnn, cnn (residues) or light_attention (proteins, from residues).
        hidden: hidden units of a network; 0 for as many as the features have columns.
        dropout: share of hidden units set to zero while training.
        learning_rate: Adam's.
        optimizer: adam, whose weight decay is added to the gradient, or adamw_amsgrad, which biotrainer calls adam:
            weights decay by themselves, and a step is held to the largest second moment so far.
        weight_decay: of that optimizer.
        epochs: passes over train at most.
        batch_size: proteins a step.
        patience: epochs without a better validation loss before a seed stops; None trains all epochs.
        keep: weights of the `best` validation loss, or of the `last` epoch.
        standardize: z-score features on train.
        scale_targets: z-score values on train while training; scores are in the target's unit either way.
        row_budget: rows (residues) in memory at once; a larger batch is worked off in parts, with the same gradient.
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
        raise InputError(
            f"unknown preset {preset!r}; {suggest_name(preset, SOURCES)}",
            code="probe.preset",
            found=preset,
            allowed=tuple(SOURCES),
        )
    return ProbeConfig(probe or default_probe(task))


def default_probe(task: Task) -> ProbeName:
    """ridge for values, logistic regression for a protein's class, the CNN for residue classes."""
    if task.target == "value":
        return "ridge"
    return "cnn" if task.level == "residue" else "logistic"
