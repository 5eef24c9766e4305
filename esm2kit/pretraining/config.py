"""Everything a pretraining run depends on; the published recipe is the default."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, nearest, refuse_unknown_choices
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.training.layout import BatchLayout, StrategyName
from esm2kit.training.precision import TrainingPrecision


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an ESM-2 on a preprocessed folder; optimizer, schedule and masks default to the published recipe.

    Args:
        data: folder that `esm2kit preprocess` made.
        out_dir: checkpoints, metrics.csv and logs go here.
        model: a published size such as esm2_t12_35M_UR50D, or `custom` with the three fields below; by default the size
            of init_from, or else esm2_t6_8M_UR50D.
        num_layers: layers of a custom model.
        embed_dim: width of a custom model.
        attention_heads: heads of a custom model.
        init_from: begin from these weights (official name or path) instead of random ones: second-stage pretraining.
        seed: decides initial weights, order, cluster members, crops and masks.
        max_steps: updates in all.
        devices: devices of one node.
        num_nodes: nodes.
        tensor_model_parallel_size: devices that share one model's matrices.
        strategy: ddp, fsdp2, or auto (ddp where there is more than one data-parallel rank).
        micro_batch_size: sequences one device holds at a time.
        accumulate_grad_batches: micro-batches a device works through for one update; above 1 it holds whole gradients,
            4 bytes a parameter, under fsdp2 too.
        global_batch_size: sequences of one update = micro_batch_size x accumulate_grad_batches x data-parallel ranks;
            yours to give: the published updates of 2M tokens hold about 6,000 of UniRef's sequences.
        max_tokens: crop longer sequences to a window of so many tokens, BOS and EOS included.
        lr: peak learning rate; by default 4e-4, and 1.6e-4 for the 15B size.
        warmup_steps: updates of linear warm-up.
        decay_share: share of max_steps at whose end the linear decay has come down to min_lr_share; flat from there.
        min_lr_share: final learning rate as a share of the peak.
        weight_decay: decoupled weight decay; by default 0.01, and 0.1 for the 15B size.
        beta1: AdamW's decay of the gradient average.
        beta2: AdamW's decay of the squared-gradient average.
        eps: AdamW's epsilon.
        gradient_clip_val: largest total gradient norm; 0 leaves gradients as they are.
        mask_prob: share of residues to predict.
        precision: 32-true; bf16-mixed (bf16 arithmetic operation by operation, on fp32 weights); or bf16-true (bf16
            throughout, on copies of fp32 master weights: less memory for activations). FSDP2 gathers bf16 for both.
        accelerator: cpu, cuda, or auto.
        compile: compile the layers with torch.compile.
        activation_checkpointing: recompute layers in the backward pass; less memory, about a third more time.
        val_check_interval: updates between validations.
        validation_masking: hidden puts <mask> on every residue that is scored; bert leaves a tenth of them readable and
            swaps a tenth, as in training and in published perplexities. A model that copies what it can read and knows
            only frequencies scores well below the unigram floor under bert, and at it under hidden.
        tokens_per_validation_batch: token budget of a rank's validation batch.
        downstream_task: at validations also probe the model on this task, a FLIP one or the name or path of your own;
            the score on its validation set is a column of metrics.csv.
        downstream_split: of the task; FLIP's default if not given.
        downstream_data: folder of task folders.
        downstream_every: probe at every so-many-th validation.
        downstream_limit: proteins of each set at most, a stratified draw.
        save_top_k: checkpoints to keep by lowest val_loss, the last one aside.
        log_every_n_steps: updates between rows of metrics.csv.
        num_workers: processes that prepare batches.
        resume_if_exists: go on from the last checkpoint in out_dir where there is one.
        logger: metrics.csv is always written; tensorboard and wandb (Weights & Biases, a package to install first) get
            the same figures and the settings. WANDB_MODE=offline keeps wandb off the network.
        wandb_project: name of the Weights & Biases project.
    """

    data: Path
    out_dir: Path
    model: str | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    attention_heads: int | None = None
    init_from: str | None = None
    seed: int = 0
    max_steps: int = 500_000
    devices: int = 1
    num_nodes: int = 1
    tensor_model_parallel_size: int = 1
    strategy: StrategyName = "auto"
    micro_batch_size: int | None = None
    accumulate_grad_batches: int | None = None
    global_batch_size: int | None = None
    max_tokens: int = 1024
    lr: float | None = None
    warmup_steps: int = 2000
    decay_share: float = 0.9
    min_lr_share: float = 0.1
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    gradient_clip_val: float = 1.0
    mask_prob: float = 0.15
    precision: TrainingPrecision = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    val_check_interval: int = 1000
    validation_masking: Literal["hidden", "bert"] = "hidden"
    tokens_per_validation_batch: int = 4096
    downstream_task: str | None = None
    downstream_split: str | None = None
    downstream_data: Path = Path("flip")
    downstream_every: int = 1
    downstream_limit: int = 500
    save_top_k: int = 1
    log_every_n_steps: int = 10
    num_workers: int = 0
    resume_if_exists: bool = True
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    wandb_project: str = "esm2kit"

    def __post_init__(self) -> None:
        refuse_unknown_choices(self)
        least = {"max_tokens": 3}  # BOS, one residue and EOS
        least |= dict.fromkeys(("max_steps", "val_check_interval", "log_every_n_steps", "downstream_every"), 1)
        least |= dict.fromkeys(("downstream_limit", "tokens_per_validation_batch"), 1)
        least |= dict.fromkeys(("warmup_steps", "save_top_k", "num_workers", "weight_decay", "gradient_clip_val"), 0)
        least |= {"eps": 0}
        for name, value in least.items():
            found = getattr(self, name)
            if found is not None and found < value:
                raise InputError(f"{name} must be at least {value}, found {found}")
        for name in ("decay_share", "min_lr_share", "mask_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be at least 0 and at most 1, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        for name in ("lr", "mask_prob"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InputError(f"{name} must be above 0, found {getattr(self, name)}")

    @property
    def layout(self) -> BatchLayout:
        return BatchLayout.of(**{field.name: getattr(self, field.name) for field in LAYOUT_FIELDS})

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 1.6e-4 if self.model == "esm2_t48_15B_UR50D" else 4e-4

    @property
    def model_config(self) -> ESM2Config:
        """The shape asked for. Raises: InputError for a name that is no published size, or a custom shape left open."""
        custom = (self.num_layers, self.embed_dim, self.attention_heads)
        if self.model == "custom":
            if None in custom:
                raise InputError("model custom wants num_layers, embed_dim and attention_heads")
            return ESM2Config(*custom)
        if custom != (None, None, None):
            raise InputError("num_layers, embed_dim and attention_heads want --model custom")
        name = self.model or "esm2_t6_8M_UR50D"
        if name not in SIZES:
            raise InputError(f"model {name!r} is unknown; {nearest(name, ['custom', *SIZES])}")
        return SIZES[name]


LAYOUT_FIELDS = [field for field in fields(PretrainConfig) if field.name in BatchLayout.of.__annotations__]


def lr_at(step: int, config: PretrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, linear decay, flat.

    Source: Lin et al. 2023, supplement A.2.4.
    """
    warmup, end = config.warmup_steps, config.decay_share * config.max_steps
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    decayed = min(1.0, (step + 1 - warmup) / max(1.0, end - warmup))
    return config.peak_lr * (1 - (1 - config.min_lr_share) * decayed)
