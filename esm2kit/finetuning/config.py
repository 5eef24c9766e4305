"""Settings of fine-tuning and prediction, and the presets that fill in defaults."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.config import FREE
from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import LORA_TARGETS, check_model_name, check_ways, complete_model_names
from esm2kit.tasks.config import TaskConfig, check_task
from esm2kit.tasks.task import Task
from esm2kit.training.config import TrainingConfig
from esm2kit.training.schedule import Decay, compute_lr

HeadName = Literal["fnn", "cnn", "light_attention", "hf"]
Mode = Literal["full", "last_n", "lora", "frozen"]
FinetunePreset = Literal["esm2kit", "schmirler"]

SOURCES: dict[str, str] = {
    "esm2kit": "esm2kit recipe: AdamW, warm-up and linear decay, best checkpoint on validation",
    "schmirler": (
        "Schmirler et al. 2024, 10.1038/s41467-024-51844-2, supplementary table S12 and published notebooks: head of "
        "EsmForSequenceClassification, AdamW without weight decay, constant learning rate, clip 1.0, LoRA rank 4"
    ),
}
# From table S12: epochs of full fine-tuning, epochs of LoRA, validations per epoch of full fine-tuning.
SCHMIRLER_EPOCHS = {"gb1": (20, 50, 5), "aav": (10, 20, 5), "meltome": (10, 20, 10), "scl": (10, 5, 10)}
SCHMIRLER_RESIDUE = (5, 5, 20)
# Chosen on ten small data sets and confirmed on ten others: benchmarks/small_tasks.py, docs/measured.md.
HEAD_LR, MIN_UPDATES = 1e-3, 300


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig, TaskConfig):
    """Fine-tune an ESM-2 with a head on a labelled task.

    Some defaults depend on the preset. The value of preset esm2kit comes first, that of preset schmirler follows in
    brackets.

    Args:
        out_dir: Folder for checkpoints, metrics.csv, finetuned.safetensors, predictions and the report.
        model: Pretrained model: an official name or its short form such as 8M, a fair-esm .pt file, a Hugging Face
            folder or an esm2kit checkpoint.
        untrained_seed: Start from random weights with this seed instead of pretrained weights. Default: pretrained.
        head_from: Start from the head of this fine-tuned model. Default: a head with random weights.
        preset: Recipe for the defaults below: esm2kit's, or the published one of Schmirler et al. 2024 (schmirler).
        mode: Weights to train: all (full), the last layers (last_n), low-rank adapters (lora) or the head (frozen).
        last_n: Number of layers that mode last_n trains, counted from the last.
        lora_rank: Rank of the adapters. Default: 8 (schmirler: 4).
        lora_alpha: Scale of the adapters, which are multiplied by lora_alpha / lora_rank. Default: 16 (schmirler: 1).
        lora_targets: Matrices that get adapters: q_proj, k_proj, v_proj, out_proj, fc1, fc2.
        lora_biases: In mode lora, also train the biases of the layers. Default: false (schmirler: true).
        head: Head on the encoder: fnn (on the mean over residues, or on each residue), cnn (residue tasks),
            light_attention (protein tasks), or hf, which is the head of transformers' EsmForSequenceClassification or
            EsmForTokenClassification. Default: fnn, or cnn for residue tasks (schmirler: hf).
        hidden: Hidden units of the head. 0 uses the width of the model.
        dropout: Dropout rate of the head's hidden units. Default: 0.25 (schmirler: 0).
        standardize: Z-score the inputs of the head with the moments that they have on the training set before
            training. Default: true (schmirler: false).
        scale_targets: Z-score values during training. Predictions are in the unit of the target either way.
            Default: true (schmirler: false).
        class_weights: Weight the loss so that all classes of the training set contribute equally.
        limit: Maximum number of proteins per set, in a stratified sample. Default: all proteins.
        seeds: Seeds of the head, the adapters, the batch order and dropout. Each seed is a separate run.
        epochs: Passes over the training set. Default: 10 (schmirler: 5 to 50, depending on task and mode). A small
            training set gets more, see min_updates.
        min_updates: Least number of updates, for small training sets. Ignored if max_steps is set. Default: 300, or
            0 if epochs is set (schmirler: 0).
        max_steps: Number of updates. Default: derived from epochs and min_updates.
        lr: Peak learning rate. Default: 1e-4, 3e-4 in mode lora, 1e-3 in mode frozen (schmirler: 2e-5, 3e-4 in mode
            lora).
        head_lr: Peak learning rate of the head. Default: 1e-3, or lr if that is higher (schmirler: lr).
        layer_lr_decay: Ratio of the learning rate of a layer to that of the layer above it. With 1 all layers have the
            same rate.
        warmup_steps: Updates of linear warm-up. Default: 5% of all updates (schmirler: 0).
        schedule: Learning rate after warm-up: linear to zero, cosine to zero, or constant. Default: linear, constant in
            mode frozen (schmirler: constant).
        weight_decay: Decoupled weight decay. Default: 0 (schmirler: 0).
        patience: Validations without a lower val_loss before the run stops. Default: train to the end.
        validations_per_epoch: Validations and checkpoints per epoch. Default: 1 (schmirler: 1 to 20, depending on task
            and mode).
        val_check_interval: Updates between validations. Default: derived from validations_per_epoch.
        micro_batch_size: Sequences per device and micro-batch. Default: derived from global_batch_size, otherwise 8.
        accumulate_grad_batches: Micro-batches per device and update. Default: derived from global_batch_size, otherwise
            1.
        global_batch_size: Sequences per update = micro_batch_size x accumulate_grad_batches x data-parallel ranks.
            Default: that product (schmirler: 8, 1 for residue tasks).
        max_tokens: Maximum window length in tokens, including BOS and EOS. Training samples one window of a longer
            sequence. Prediction covers it with overlapping windows.
        benchmark: Also score a probe of the initial weights and the baselines for the report.
        resamples: Bootstrap replicates for the confidence intervals.
        coverage: Share of new values that the prediction intervals of the report should contain.
        merge: In mode lora, also write merged.safetensors, a complete model with the adapters merged.
        export_hf: Also write the result as a Hugging Face folder. Requires head hf.
    """

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
    min_updates: int | None = None
    head_lr: float | None = None
    layer_lr_decay: float = 1.0
    schedule: Decay | None = None
    patience: int | None = field(default=None, metadata=FREE)
    validations_per_epoch: int | None = field(default=None, metadata=FREE)
    benchmark: bool = field(default=True, metadata=FREE)
    resamples: int = field(default=1000, metadata=FREE)
    coverage: float = field(default=0.9, metadata=FREE)
    merge: bool = field(default=False, metadata=FREE)
    export_hf: bool = field(default=False, metadata=FREE)
    out_dir: Path = field(default=Path("finetune"), kw_only=True, metadata=FREE)

    option_groups = OptionGroups(
        usual="task data_dir model mode out_dir epochs lr patience seeds",
        data="limit scale_targets class_weights",
        model=(
            "preset head hidden dropout standardize head_from untrained_seed last_n lora_rank lora_alpha lora_targets "
            "lora_biases"
        ),
        training="min_updates max_steps validations_per_epoch",
        optimizer="head_lr layer_lr_decay schedule",
        evaluation="benchmark resamples coverage",
        output="merge export_hf",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_task(self)
        complete_model_names(self, "model")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(
                f"seeds must be one or more different integers, found {self.seeds}",
                code="option.seeds",
                found=self.seeds,
            )
        check_range(self, "last_n", "limit", "patience", "validations_per_epoch", "save_top_k", at_least=1)
        check_range(self, "hidden", "min_updates", at_least=0)
        check_range(self, "head_lr", "layer_lr_decay", "epochs", above=0)
        check_range(self, "dropout", at_least=0, below=1)
        check_range(self, "resamples", at_least=100, hint="fewer replicates give no 95% interval")
        check_range(self, "coverage", above=0, below=1)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model.

        Raises:
            InputError: The model does not exist.
        """
        check_model_name(self.model)


def resolve_defaults(config: FinetuneConfig, task: Task, num_train: int) -> FinetuneConfig:
    """Fill in the defaults of a configuration from its preset.

    Args:
        config: Configuration of the user.
        task: Determines level and target, and for preset schmirler the epochs.
        num_train: Number of training proteins, to convert epochs to updates.

    Returns:
        A configuration in which all settings that training reads are set, including max_steps and val_check_interval.
    """
    filled = {name: value for name, value in _preset_defaults(config, task).items() if getattr(config, name) is None}
    if config.epochs is not None and config.min_updates is None:  # an explicit length is kept
        filled["min_updates"] = 0
    config = replace(config, **filled)
    if config.head_lr is None:
        config = replace(config, head_lr=config.lr if config.preset == "schmirler" else max(config.lr, HEAD_LR))
    per_epoch = num_train / config.layout.global_batch_size
    max_steps = config.max_steps or max(math.ceil(config.epochs * per_epoch), config.min_updates)
    warmup = max_steps // 20 if config.warmup_steps is None else config.warmup_steps
    interval = config.val_check_interval or max(1, round(per_epoch / config.validations_per_epoch))
    return replace(config, max_steps=max_steps, warmup_steps=warmup, val_check_interval=min(interval, max_steps))


def _preset_defaults(config: FinetuneConfig, task: Task) -> dict[str, Any]:
    """Return the defaults of the preset for a task and mode."""
    residue, lora, frozen = task.level == "residue", config.mode == "lora", config.mode == "frozen"
    if config.preset == "schmirler":
        epochs, lora_epochs, validations = SCHMIRLER_EPOCHS.get(
            task.name, SCHMIRLER_RESIDUE if residue else (10, 20, 10)
        )
        settings: dict[str, Any] = {
            "head": "hf", "dropout": 0.0, "scale_targets": False, "standardize": False, "lr": 3e-4 if lora else 2e-5,
            "min_updates": 0, "epochs": lora_epochs if lora else epochs,
            "validations_per_epoch": 1 if lora and not residue else validations,
            "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0,
            "lora_rank": 4, "lora_alpha": 1.0, "lora_biases": True,
        }  # fmt: skip
        if config.micro_batch_size is None and config.global_batch_size is None:
            settings["global_batch_size"] = max(1 if residue else 8, config.devices * config.num_nodes)
        return settings
    return {
        "head": "cnn" if residue else "fnn", "dropout": 0.25, "scale_targets": True, "standardize": True,
        "lr": 1e-3 if frozen else 3e-4 if lora else 1e-4, "epochs": 10.0, "min_updates": MIN_UPDATES,
        "validations_per_epoch": 1,
        "schedule": "constant" if frozen else "linear", "weight_decay": 0.0,
        "lora_rank": 8, "lora_alpha": 16.0, "lora_biases": False,
    }  # fmt: skip


def lr_factor(step: int, config: FinetuneConfig) -> float:
    """Compute the factor of the peak learning rate: linear warm-up, then the schedule.

    Args:
        step: Number of the update, from 0.
        config: Configuration with resolved defaults.

    Returns:
        A factor between 0 and 1.
    """
    warmup = config.warmup_steps
    return compute_lr(1.0, step + 1, warmup, warmup + 1, config.max_steps + 1, config.schedule)


# File name endings of prediction tables, and their delimiters.
SUFFIXES = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class PredictConfig:
    """Predict labels for the proteins of a FASTA.

    Args:
        model: Fine-tuned model (finetuned.safetensors or its folder), the folder of a benchmark, whose best row on
            validation predicts, or one of its probes (probes/<row>.safetensors).
        fasta: FASTA file (plain, .gz or .zst), several files, or a folder. For a model of pairs also a table with the
            columns sequence_a and sequence_b, or a FASTA with INTERACTOR=.
        pairs: For a model of pairs, a table with two columns of names of fasta, such as protein_a and protein_b.
        out: Output file: .tsv, .csv or .h5. A manifest is written next to it.
        base: Encoder of adapters (mode lora) or of a probe. Default: its location during training.
        precision: Precision of the encoder. float32 is exact; bfloat16 (CPU and CUDA) and int8 (CPU) are faster and
            approximate. auto is bfloat16 on a CUDA GPU that has it and float32 elsewhere; for a saved probe it is the
            precision of its benchmark.
        device: Device of the model. auto uses a GPU if one is available.
        devices: Number of GPUs, or of processes on a CPU. Each predicts a share of the proteins.
        batch_tokens: Tokens per batch. Default: 1024 on a CPU, 32768 on a GPU.
        layer_by_layer: Read each layer of the encoder when it is used, instead of loading the whole model. Default: if
            the model does not fit in the free memory of the device.
        shard: Divide the layers of the model over the devices, which then compute their shares together. auto does so
            with GPUs if the model does not fit on one of them but does on all.
        coverage: Share of new values that the prediction intervals should contain (columns lower and upper).
        plot: Also write a plot next to out, as <out>.svg: a histogram of values, a bar per class, or the predictions
            along the sequences of a residue task.
    """

    model: Path
    fasta: Path | list[Path]
    out: Path
    pairs: Path | None = None
    base: str | None = None
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    batch_tokens: int | None = None
    layer_by_layer: bool | None = None
    shard: bool | Literal["auto"] = "auto"
    coverage: float = 0.9
    plot: bool = True

    option_groups = OptionGroups(
        usual="fasta model out coverage pairs",
        model="base",
        hardware="device devices precision batch_tokens layer_by_layer shard",
        output="plot",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "base")
        check_choices(self)
        if Path(self.out).suffix not in (*SUFFIXES, ".h5"):
            raise InputError(
                f"out must end in {', '.join(SUFFIXES)} or .h5, found {str(self.out)!r}",
                code="predict.suffix",
                path=self.out,
            )
        check_range(self, "devices", "batch_tokens", at_least=1)
        check_range(self, "coverage", above=0, below=1)
        check_ways(self.shard, self.layer_by_layer)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: that the FASTA exists.

        Raises:
            InputError: It does not exist.
        """
        from esm2kit.sequences.fasta import find_fasta_files

        find_fasta_files(self.fasta)
