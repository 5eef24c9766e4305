"""Everything a fine-tuning run depends on, and the recipes that fill what a run leaves open."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.models.config import LORA_TARGETS, ESM2Config
from esm2kit.tasks.task import Target, Task
from esm2kit.training.config import FREE, TrainingConfig, TrainingPrecision
from esm2kit.training.schedule import Decay, compute_lr

HeadName = Literal["fnn", "cnn", "light_attention", "hf"]
Mode = Literal["full", "last_n", "lora", "frozen"]
FinetunePreset = Literal["esm2kit", "schmirler"]

SOURCES: dict[str, str] = {
    "esm2kit": "this library's own: AdamW, warm-up and linear decay, best checkpoint on validation",
    "schmirler": (
        "Schmirler et al. 2024, 10.1038/s41467-024-51844-2, supplementary table S12 and the published notebooks: the "
        "head of EsmForSequenceClassification, AdamW without weight decay, constant rate, clip 1.0, LoRA of rank 4"
    ),
}
# Epochs of a full run and of LoRA, and validations an epoch of a full run: table S12.
SCHMIRLER_EPOCHS = {"gb1": (20, 50, 5), "aav": (10, 20, 5), "meltome": (10, 20, 10), "scl": (10, 5, 10)}
SCHMIRLER_RESIDUE = (5, 5, 20)


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tune an ESM-2 with a head on a labelled task.

    Usually enough: task, data_dir, model, mode and out_dir, then epochs, lr, patience and seeds. Where a
    default is null, the preset's value told below applies, in brackets that of preset schmirler.

    Args:
        task: a FLIP task, or the name or path of a folder or file of your own in the same forms.
        split: of the task; FLIP's default if not given.
        data_dir: folder of task folders: <data_dir>/<task>/<file>.
        download: fetch a FLIP task that data_dir lacks.
        target: class or value, for a task of your own whose targets could be both.
        out_dir: checkpoints, metrics.csv, finetuned.safetensors, predictions and the report go here.
        model: where to begin: official name, fair-esm .pt, Hugging Face folder, or our checkpoint.
        untrained_seed: begin with the model's architecture and random weights from this seed instead.
        head_from: begin with the head of this fine-tuned model instead of a fresh one.
        preset: fills what is null below: esm2kit, or schmirler for the published recipe.
        mode: train all (full), the last_n layers, low-rank adapters (lora), or the head alone (frozen).
        last_n: layers that mode last_n trains, counted from the last.
        lora_rank: rank of the adapters; the preset's is 8 [4].
        lora_alpha: adapters are scaled by lora_alpha / lora_rank; the preset's is 16 [1].
        lora_targets: matrices that get adapters: q_proj, k_proj, v_proj, out_proj, fc1, fc2.
        lora_biases: mode lora also trains the layers' biases; the preset's is false [true].
        head: fnn (on the mean over residues, or on each), cnn (residues), light_attention (proteins), or hf, the heads
            of transformers' EsmForSequenceClassification and EsmForTokenClassification; the preset's is fnn, for
            residue tasks cnn [hf].
        hidden: hidden units of the head; 0 for as many as the model is wide.
        dropout: share of the head's hidden units set to zero while training; the preset's is 0.25 [0].
        standardize: z-score what the head reads by its moments on train; for mode frozen, where they stand still;
            the preset's is true in that mode, else false [false].
        scale_targets: z-score values on train while training; predictions are in the target's unit either way;
            the preset's is true [false].
        class_weights: weigh every class of train the same.
        limit: proteins of each set at most, a stratified draw.
        seeds: of head, adapters, order and dropout; each is a run of its own.
        epochs: passes over train; the preset's are 10 [5 to 50 by task and mode].
        max_steps: updates in all, instead of epochs.
        lr: peak learning rate; the preset's is 1e-4, in mode lora 3e-4, frozen 1e-3 [2e-5, in mode lora 3e-4].
        head_lr: of the head; by default lr.
        layer_lr_decay: every layer's rate is this times that of the layer above it; 1 gives all the same.
        warmup_steps: updates of linear warm-up; if not given a twentieth of all [0].
        schedule: what follows warm-up: linear to zero, cosine to zero, or constant; the preset's is linear, in mode
            frozen constant [constant].
        weight_decay: decoupled weight decay; the preset's is 0 [0].
        patience: validations without a better val_loss before the run stops; null trains to the end.
        validations_per_epoch: how often to validate and save; the preset's is 1 [1 to 20 by task and mode].
        val_check_interval: updates between validations, instead.
        micro_batch_size: sequences one device holds at a time; 8 where nothing else says.
        accumulate_grad_batches: micro-batches a device works through for one update; 1 where nothing else says.
        global_batch_size: sequences of one update = micro_batch_size x accumulate_grad_batches x data-parallel ranks
            [8, for residue tasks 1].
        max_tokens: train on windows of so many tokens of longer sequences, BOS and EOS included; predict by windows.
        benchmark: also probe the weights the run began with and compute the baselines, for the report.
        resamples: bootstrap draws of the report's intervals.
        merge: mode lora also writes merged.safetensors, adapters added to their matrices: a model like any other.
        export_hf: also write the result as a Hugging Face folder; wants head hf.
    """

    task: str = "secondary_structure"
    split: str | None = None
    data_dir: Path = field(default=Path("flip"), metadata=FREE)
    download: bool = field(default=True, metadata=FREE)
    target: Target | None = None
    model: str = "esm2_t6_8M_UR50D"
    untrained_seed: int | None = None
    head_from: Path | None = None
    preset: FinetunePreset = "esm2kit"
    mode: Mode = "full"
    last_n: int = 1
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    lora_biases: bool | None = None
    head: HeadName | None = None
    hidden: int = 32
    dropout: float | None = None
    standardize: bool | None = None
    scale_targets: bool | None = None
    class_weights: bool = False
    limit: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: float | None = None
    head_lr: float | None = None
    layer_lr_decay: float = 1.0
    schedule: Decay | None = None
    patience: int | None = field(default=None, metadata=FREE)
    validations_per_epoch: int | None = field(default=None, metadata=FREE)
    benchmark: bool = field(default=True, metadata=FREE)
    resamples: int = field(default=1000, metadata=FREE)
    merge: bool = field(default=False, metadata=FREE)
    export_hf: bool = field(default=False, metadata=FREE)
    out_dir: Path = field(default=Path("finetune"), kw_only=True, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(
                f"seeds must be different numbers, at least one; found {self.seeds}",
                code="option.seeds",
                found=self.seeds,
            )
        check_range(self, "last_n", "limit", "patience", "validations_per_epoch", "save_top_k", at_least=1)
        check_range(self, "hidden", at_least=0)
        check_range(self, "head_lr", "layer_lr_decay", "epochs", above=0)
        check_range(self, "dropout", at_least=0, below=1)
        check_range(self, "resamples", at_least=100, hint="fewer give no 95% interval")
        if self.standardize and self.mode != "frozen":
            raise InputError(
                f"standardize requires mode frozen: in mode {self.mode} the head's inputs change while it learns",
                code="option.standardize",
                mode=self.mode,
            )


def resolve_defaults(config: FinetuneConfig, task: Task, num_train: int) -> FinetuneConfig:
    """The configuration with everything decided: what the run leaves open comes from its preset.

    Args:
        config: as given.
        task: decides level, target and, in the published recipe, epochs.
        num_train: proteins of train, to turn epochs into updates.
    Returns: a configuration in which nothing that training reads is None, max_steps and val_check_interval included.
    """
    filled = {name: value for name, value in _preset(config, task).items() if getattr(config, name) is None}
    config = replace(config, **filled)
    config = replace(config, head_lr=config.lr if config.head_lr is None else config.head_lr)
    per_epoch = num_train / config.layout.global_batch_size
    max_steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    warmup = max_steps // 20 if config.warmup_steps is None else config.warmup_steps
    interval = config.val_check_interval or max(1, round(per_epoch / config.validations_per_epoch))
    return replace(config, max_steps=max_steps, warmup_steps=warmup, val_check_interval=min(interval, max_steps))


def _preset(config: FinetuneConfig, task: Task) -> dict[str, Any]:
    residue, lora, frozen = task.level == "residue", config.mode == "lora", config.mode == "frozen"
    if config.preset == "schmirler":
        epochs, lora_epochs, validations = SCHMIRLER_EPOCHS.get(
            task.name, SCHMIRLER_RESIDUE if residue else (10, 20, 10)
        )
        settings: dict[str, Any] = {
            "head": "hf", "dropout": 0.0, "scale_targets": False, "standardize": False, "lr": 3e-4 if lora else 2e-5,
            "epochs": lora_epochs if lora else epochs,
            "validations_per_epoch": 1 if lora and not residue else validations,
            "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0,
            "lora_rank": 4, "lora_alpha": 1.0, "lora_biases": True,
        }  # fmt: skip
        if config.micro_batch_size is None and config.global_batch_size is None:
            settings["global_batch_size"] = max(1 if residue else 8, config.devices * config.num_nodes)
        return settings
    return {
        "head": "cnn" if residue else "fnn", "dropout": 0.25, "scale_targets": True, "standardize": frozen,
        "lr": 1e-3 if frozen else 3e-4 if lora else 1e-4, "epochs": 10.0, "validations_per_epoch": 1,
        "schedule": "constant" if frozen else "linear", "weight_decay": 0.0,
        "lora_rank": 8, "lora_alpha": 16.0, "lora_biases": False,
    }  # fmt: skip


def lr_factor(step: int, config: FinetuneConfig) -> float:
    """Share of the peak learning rate at update `step` (from 0): linear warm-up, then the schedule.

    Args:
        step: updates made before.
        config: with its defaults resolved.
    """
    warmup = config.warmup_steps
    return compute_lr(1.0, step + 1, warmup, warmup + 1, config.max_steps + 1, config.schedule)


def training_memory(
    shape: ESM2Config,
    tokens: int,
    mode: Mode = "full",
    precision: TrainingPrecision = "bf16-mixed",
    activation_checkpointing: bool = True,
    lora_rank: int = 8,
) -> dict[str, float]:
    """GB (1e9 bytes) that training one micro-batch takes on one device: arithmetic, not a measurement.

    Weights, gradients and AdamW's two averages are float32: 4 + 4 + 8 bytes a trained parameter, 4 a frozen one; bf16
    arithmetic adds a 2-byte copy of every matrix. A layer of width D keeps for its backward pass 42 D bytes a token in
    bf16-mixed, 33 D in bf16-true, 66 D in float32 (its input, two norms, q, k, v, the attended rows, both sides of the
    GELU), counted on CPU by the test of this function; with activation checkpointing every layer keeps its input, 4 D
    (2 D in bf16-true), and one layer at a time the rest. Attention keeps no T x T matrix: its kernels recompute it.
    Head, logits and whatever the CUDA allocator keeps for itself come on top. Not measured on a GPU.

    The sum for 650M, mode full, bf16-mixed, checkpointing, 8,192 tokens: weights 2.60 + gradients 2.60 + AdamW 5.21 +
    bf16 copy 1.30 + activations 1.82 = 13.5 GB, which leaves 10 of 24 GB. Without checkpointing activations are
    14.5 GB and the sum 26.2 GB: too much.

    Args:
        shape: of the encoder.
        tokens: of a micro-batch.
        mode: what is trained; last_n and frozen are counted as frozen here, so give full for an upper bound.
        precision: as FinetuneConfig.
        activation_checkpointing: as FinetuneConfig.
        lora_rank: of mode lora, on all six matrices of a layer.
    Returns: {"weights", "gradients", "optimizer", "bf16_copy", "activations", "total"}.
    """
    width, layers = shape.embed_dim, shape.num_layers
    total = shape.num_parameters
    adapted = lora_rank * layers * (4 * 2 * width + 2 * 5 * width)
    trained = {"full": total, "lora": adapted}.get(mode, 0)
    kept = {"32-true": 66, "bf16-mixed": 42, "bf16-true": 33}[precision] * width
    layer_input = (2 if precision == "bf16-true" else 4) * width
    activations = tokens * (layers * layer_input + kept) if activation_checkpointing else tokens * layers * kept
    parts = {
        "weights": 4.0 * (total + (adapted if mode == "lora" else 0)),
        "gradients": 4.0 * trained,
        "optimizer": 8.0 * trained,
        "bf16_copy": 0.0 if precision == "32-true" else 2.0 * total,
        "activations": float(activations),
    }
    parts = {name: size / 1e9 for name, size in parts.items()}
    return parts | {"total": sum(parts.values())}


# What a table of predictions may end in, and its delimiter.
SUFFIXES = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class PredictConfig:
    """Predict labels for the proteins of a FASTA.

    Args:
        model: finetuned.safetensors of `esm2kit finetune`, or the folder it lies in.
        fasta: FASTA file (plain, .gz or .zst), several of them, or a folder.
        out: the file to write: .tsv, .csv or .h5; a manifest goes beside it.
        base: only for adapters (mode lora): where their base model is now; by default where it was in training.
        precision: float32 is exact; bfloat16 and int8 (CPU) are faster and approximate.
        device: auto takes a GPU if there is one.
        batch_tokens: tokens that go through the model together; 1024 on a CPU, 32768 on a GPU if not given.
    """

    model: Path
    fasta: Path | list[Path]
    out: Path
    base: str | None = None
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if Path(self.out).suffix not in (*SUFFIXES, ".h5"):
            raise InputError(
                f"out {self.out} must end in {', '.join(SUFFIXES)} or .h5", code="predict.suffix", path=self.out
            )
        check_range(self, "batch_tokens", at_least=1)
