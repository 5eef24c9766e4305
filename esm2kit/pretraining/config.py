"""Everything a pretraining run depends on; the published recipe is the default."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_range, suggest_name
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.training.config import FREE, TrainingConfig
from esm2kit.training.schedule import compute_lr


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Pretrain an ESM-2 on a preprocessed folder; optimizer, schedule and masks default to the published recipe.

    Args:
        data: folder that `esm2kit preprocess` made.
        model: a published size such as esm2_t12_35M_UR50D, or `custom` with the three fields below; by default the size
            of init_from, or else esm2_t6_8M_UR50D.
        num_layers: layers of a custom model.
        embed_dim: width of a custom model.
        attention_heads: heads of a custom model.
        init_from: begin from these weights (official name or path) instead of random ones: second-stage pretraining.
        seed: decides initial weights, order, cluster members, crops and masks.
        tensor_model_parallel_size: devices that share one model's matrices.
        accumulate_grad_batches: micro-batches a device works through for one update; above 1 it holds whole gradients,
            4 bytes a parameter, under fsdp2 too.
        global_batch_size: sequences of one update = micro_batch_size x accumulate_grad_batches x data-parallel ranks;
            yours to give: the published updates of 2M tokens hold about 6,000 of UniRef's sequences.
        max_tokens: crop longer sequences to a window of so many tokens, BOS and EOS included.
        lr: peak learning rate; by default 4e-4, and 1.6e-4 for the 15B size.
        decay_share: share of max_steps at whose end the linear decay has come down to min_lr_share; flat from there.
        min_lr_share: final learning rate as a share of the peak.
        weight_decay: decoupled weight decay; by default 0.01, and 0.1 for the 15B size.
        mask_prob: share of residues to predict.
        compile: compile the layers with torch.compile.
        validation_masking: hidden puts <mask> on every residue that is scored; bert leaves a tenth of them readable and
            swaps a tenth, as in training and in published perplexities. A model that copies what it can read and knows
            only frequencies scores well below the unigram floor under bert, and at it under hidden.
        downstream_task: at validations also probe the model on this task, a FLIP one or the name or path of your own;
            the score on its validation set is a column of metrics.csv.
        downstream_split: of the task; FLIP's default if not given.
        downstream_data: folder of task folders.
        downstream_every: probe at every so-many-th validation.
        downstream_limit: proteins of each set at most, a stratified draw.
        num_workers: processes that prepare batches.
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
    compile: bool = field(default=False, metadata=FREE)
    downstream_task: str | None = field(default=None, metadata=FREE)
    downstream_split: str | None = field(default=None, metadata=FREE)
    downstream_data: Path = field(default=Path("flip"), metadata=FREE)
    downstream_every: int = field(default=1, metadata=FREE)
    downstream_limit: int = field(default=500, metadata=FREE)
    num_workers: int = field(default=0, metadata=FREE)
    max_steps: int = field(default=500_000, kw_only=True, metadata=FREE)
    warmup_steps: int = field(default=2000, kw_only=True)
    beta2: float = field(default=0.98, kw_only=True)
    val_check_interval: int = field(default=1000, kw_only=True, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "downstream_every", "downstream_limit", at_least=1)
        check_range(self, "num_workers", at_least=0)
        check_range(self, "decay_share", "min_lr_share", at_least=0, at_most=1)
        check_range(self, "mask_prob", above=0, at_most=1)

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 1.6e-4 if self.model == "esm2_t48_15B_UR50D" else 4e-4

    @property
    def resolved(self) -> "PretrainConfig":
        """With lr and weight_decay as the published recipe has them where they are left open."""
        decay = 0.1 if self.model == "esm2_t48_15B_UR50D" else 0.01
        return replace(self, lr=self.peak_lr, weight_decay=decay if self.weight_decay is None else self.weight_decay)

    @property
    def model_config(self) -> ESM2Config:
        """The shape asked for. Raises: InputError for a name that is no published size, or a custom shape left open."""
        custom = (self.num_layers, self.embed_dim, self.attention_heads)
        if self.model == "custom":
            if None in custom:
                raise InputError(
                    "model custom requires num_layers, embed_dim and attention_heads", code="model.custom-shape"
                )
            return ESM2Config(*custom)
        if custom != (None, None, None):
            raise InputError(
                "num_layers, embed_dim and attention_heads require --model custom", code="model.not-custom"
            )
        name = self.model or "esm2_t6_8M_UR50D"
        if name not in SIZES:
            raise InputError(
                f"model {name!r} is unknown; {suggest_name(name, ['custom', *SIZES])}",
                code="model.unknown-size",
                name=name,
            )
        return SIZES[name]


def lr_at(step: int, config: PretrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, linear decay, flat.

    Source: Lin et al. 2023, supplement A.2.4.
    """
    warmup, end = config.warmup_steps, config.decay_share * config.max_steps
    return compute_lr(config.peak_lr, step + 1, warmup, warmup, end, final_share=config.min_lr_share)
