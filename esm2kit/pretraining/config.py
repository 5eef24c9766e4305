"""Settings of a pretraining run; the defaults are the published recipe."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from esm2kit.core.config import FREE
from esm2kit.core.errors import InputError, check_range, check_type, suggest_name
from esm2kit.core.options import OptionGroups
from esm2kit.models.config import MODEL_NAMES, SIZES, ESM2Config, check_model_name, complete_model_names
from esm2kit.tasks.task import Level, Target
from esm2kit.training.config import TrainingConfig
from esm2kit.training.schedule import compute_lr


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Pretrain an ESM-2 on a preprocessed dataset; optimizer, schedule and masks default to the published recipe.

    Args:
        data: Dataset folder from `esm2kit preprocess`.
        model: Published size such as 35M or esm2_t12_35M_UR50D, or custom with num_layers, embed_dim and
            attention_heads. Default: the size of init_from, otherwise esm2_t6_8M_UR50D.
        num_layers: Number of layers of a custom model.
        embed_dim: Embedding dimension of a custom model.
        attention_heads: Attention heads per layer of a custom model.
        init_from: Official name or path of the initial weights, for second-stage pretraining. Default: random weights.
        seed: Random seed of the initial weights, sample order, cluster members, crops and masks.
        tensor_model_parallel_size: Devices that share one copy of the model.
        accumulate_grad_batches: Micro-batches per device and update. Default: derived from global_batch_size,
            otherwise 1. Above 1, each device holds unsharded gradients (4 bytes per parameter), also with fsdp2.
        global_batch_size: Sequences per update. Default: micro_batch_size x accumulate_grad_batches x data-parallel
            ranks. The published updates of 2M tokens hold about 6,000 sequences of UniRef.
        max_tokens: Longest window of a sequence in tokens, including BOS and EOS. Longer sequences are cropped.
        lr: Peak learning rate. Default: 4e-4, or 1.6e-4 for the 15B size.
        decay_share: Share of max_steps after which the linear decay reaches min_lr_share. The rate is constant
            afterwards.
        min_lr_share: Final learning rate as a share of the peak.
        weight_decay: Decoupled weight decay. Default: 0.01, or 0.1 for the 15B size.
        mask_prob: Share of residues to predict.
        validation_masking: Masking of the scored residues in validation. hidden replaces all of them with <mask>. bert
            leaves a tenth of them unchanged and replaces a tenth with random residues, as in training and in published
            perplexities. A model that copies visible residues and otherwise predicts their frequencies scores well
            below the unigram baseline under bert, but not under hidden.
        downstream_task: Task to probe the model on at validations: a FLIP task, or the name or path of a custom task.
            Its validation score is a column of metrics.csv. Default: no task.
        downstream_split: Split of the task. Default: FLIP's default split.
        downstream_data: Folder of task folders.
        downstream_target: Column of the targets in your own task's table. Default: the column target.
        downstream_target_type: Type of the targets: class or value. Default: inferred from the labels.
        downstream_level: What one target belongs to: a protein or a residue. Default: inferred from the targets.
        downstream_every: Validations per evaluation of the probe: 2 evaluates it at every second validation.
        downstream_limit: Largest number of proteins per set, as a stratified sample.
    """

    data: Path = field(metadata=FREE)
    model: str | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    attention_heads: int | None = None
    init_from: str | None = None
    seed: int = 0
    decay_share: float = 0.9
    min_lr_share: float = 0.1
    mask_prob: float = 0.15
    validation_masking: Literal["hidden", "bert"] = "hidden"
    tensor_model_parallel_size: int = field(default=1, metadata=FREE)
    downstream_task: str | None = field(default=None, metadata=FREE)
    downstream_split: str | None = field(default=None, metadata=FREE)
    downstream_data: Path = field(default=Path("flip"), metadata=FREE)
    downstream_target: str | None = field(default=None, metadata=FREE)
    downstream_target_type: Target | None = field(default=None, metadata=FREE)
    downstream_level: Level | None = field(default=None, metadata=FREE)
    downstream_every: int = field(default=1, metadata=FREE)
    downstream_limit: int = field(default=500, metadata=FREE)
    max_steps: int = field(default=500_000, kw_only=True, metadata=FREE)
    warmup_steps: int = field(default=2000, kw_only=True)
    beta2: float = field(default=0.98, kw_only=True)
    val_check_interval: int = field(default=1000, kw_only=True, metadata=FREE)

    option_groups = OptionGroups(
        usual="data out_dir model max_steps global_batch_size lr precision devices seed",
        model="num_layers embed_dim attention_heads init_from",
        training="mask_prob validation_masking",
        optimizer="decay_share min_lr_share",
        evaluation=(
            "downstream_task downstream_split downstream_data downstream_target downstream_target_type downstream_level"
            " downstream_every downstream_limit"
        ),
        hardware="tensor_model_parallel_size",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        complete_model_names(self, "model", "init_from")
        check_range(self, "downstream_every", "downstream_limit", at_least=1)
        check_range(self, "decay_share", "min_lr_share", at_least=0, at_most=1)
        check_range(self, "mask_prob", above=0, at_most=1)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the layout, the model and that the dataset is finished.

        Raises:
            InputError: One of them does not exist or is not possible.
        """
        from esm2kit.sequences.dataset import read_manifest

        self.layout  # raises  # noqa: B018
        if self.init_from is None:
            self.model_config  # raises  # noqa: B018
        else:
            check_model_name(self.init_from)
        read_manifest(self.data)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate; the published rate if `lr` is None."""
        return self.lr if self.lr is not None else 1.6e-4 if self.model == "esm2_t48_15B_UR50D" else 4e-4

    @property
    def resolved(self) -> "PretrainConfig":
        """The configuration with the published lr and weight_decay in place of None."""
        decay = 0.1 if self.model == "esm2_t48_15B_UR50D" else 0.01
        return replace(self, lr=self.peak_lr, weight_decay=decay if self.weight_decay is None else self.weight_decay)

    @property
    def model_config(self) -> ESM2Config:
        """The shape of the requested model.

        Raises:
            InputError: The name is not a published size, or the custom shape is incomplete.
        """
        custom = (self.num_layers, self.embed_dim, self.attention_heads)
        if self.model == "custom":
            if None in custom:
                raise InputError(
                    "model 'custom' requires num_layers, embed_dim and attention_heads", code="model.custom-shape"
                )
            return ESM2Config(*custom)
        if custom != (None, None, None):
            raise InputError(
                "num_layers, embed_dim and attention_heads require --model custom", code="model.not-custom"
            )
        name = self.model or "esm2_t6_8M_UR50D"
        if name not in SIZES:
            raise InputError(
                f"unknown model {name!r}; {suggest_name(name, ['custom', *MODEL_NAMES])}",
                code="model.unknown-size",
                name=name,
            )
        return SIZES[name]


def lr_at(step: int, config: PretrainConfig) -> float:
    """Compute the learning rate of an update: linear warm-up, linear decay, then constant.

    Args:
        step: Updates made before, so the first update is 0.
        config: The run.

    Returns:
        The learning rate.

    Source:
        Lin et al. 2023, supplement A.2.4.
    """
    check_type(config, PretrainConfig, "config")
    warmup, end = config.warmup_steps, config.decay_share * config.max_steps
    return compute_lr(config.peak_lr, step + 1, warmup, warmup, end, final_share=config.min_lr_share)
