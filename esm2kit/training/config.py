"""Settings shared by all training stages, with their help texts and range checks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.core.config import FREE, inherit_help
from esm2kit.core.errors import check_choices, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.training.layout import BatchLayout, StrategyName

TrainingPrecision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training engine; each stage adds its own fields.

    A stage's docstring inherits the entries below for all fields that it does not document itself.

    Args:
        out_dir: Folder for checkpoints, metrics.csv and logs.
        max_steps: Total number of updates.
        devices: Devices per node.
        num_nodes: Number of nodes.
        strategy: Parallel strategy: ddp, fsdp2, or auto. auto is ddp if there is more than one data-parallel rank.
        micro_batch_size: Sequences per device and micro-batch. Default: derived from global_batch_size, otherwise 8.
        micro_batch_tokens: Most tokens per device and micro-batch, instead of micro_batch_size and
            accumulate_grad_batches. A longer sequence is a micro-batch of its own. The number of micro-batches follows
            from the lengths of the sequences. Default: on a CUDA GPU without those two, by the size of the model and
            the memory of the GPU (16384 for 650M on 80 GB).
        accumulate_grad_batches: Micro-batches per device and update. Default: derived from global_batch_size,
            otherwise 1.
        global_batch_size: Sequences per update. Default: micro_batch_size x accumulate_grad_batches x data-parallel
            ranks.
        max_tokens: Longest window of a sequence in tokens, including BOS and EOS.
        lr: Peak learning rate. Default: set by the stage.
        warmup_steps: Updates of linear warm-up.
        weight_decay: Decoupled weight decay. Default: set by the stage.
        beta1: Decay rate of AdamW's gradient average.
        beta2: Decay rate of AdamW's squared-gradient average.
        eps: AdamW's epsilon.
        gradient_clip_val: Largest total gradient norm. 0 turns clipping off.
        precision: Numeric precision. auto is bf16-mixed on a CUDA GPU with bf16, otherwise 32-true. 32-true computes in
            fp32. bf16-mixed uses autocast over fp32 weights. bf16-true computes in bf16 on copies of fp32 master
            weights, which saves activation memory. FSDP2 gathers bf16 parameters for both.
        accelerator: Device type: cpu, cuda, mps, or auto for a GPU if there is one.
        compile: Compile the layers with torch.compile, which delays the first updates. auto compiles on a CUDA GPU.
        num_workers: Processes per device that prepare batches. 0 prepares them in the training process. Default: 4 on a
            CUDA GPU with enough cores, otherwise 0.
        activation_checkpointing: Recompute layers in the backward pass. Saves memory and takes about a third more time.
            auto recomputes if the run would not fit in the memory of the device otherwise, by an estimate.
        val_check_interval: Updates between validations.
        tokens_per_validation_batch: Tokens per validation batch and rank.
        save_top_k: Number of checkpoints with the lowest val_loss to keep, in addition to the last one.
        log_every_n_steps: Updates between rows of metrics.csv.
        resume_if_exists: Resume from the last checkpoint in out_dir if there is one.
        logger: Logger in addition to metrics.csv: tensorboard or wandb (Weights & Biases). Each requires its package.
            Both receive the same metrics and the settings. Set WANDB_MODE=offline to use wandb without a network.
        wandb_project: Name of the Weights & Biases project.
    """

    out_dir: Path = field(metadata=FREE)
    max_steps: int | None = field(default=None, metadata=FREE)
    devices: int = field(default=1, metadata=FREE)
    num_nodes: int = field(default=1, metadata=FREE)
    strategy: StrategyName = field(default="auto", metadata=FREE)
    micro_batch_size: int | None = field(default=None, metadata=FREE)
    micro_batch_tokens: int | None = field(default=None, metadata=FREE)
    accumulate_grad_batches: int | None = field(default=None, metadata=FREE)
    global_batch_size: int | None = field(default=None, metadata=FREE)
    max_tokens: int = 1024
    lr: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    gradient_clip_val: float = 1.0
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = field(default="auto", metadata=FREE)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=FREE)
    compile: bool | Literal["auto"] = field(default="auto", metadata=FREE)
    num_workers: int | None = field(default=None, metadata=FREE)
    activation_checkpointing: bool | Literal["auto"] = field(default="auto", metadata=FREE)
    val_check_interval: int | None = field(default=None, metadata=FREE)
    tokens_per_validation_batch: int = field(default=4096, metadata=FREE)
    save_top_k: int = field(default=1, metadata=FREE)
    log_every_n_steps: int = field(default=10, metadata=FREE)
    resume_if_exists: bool = field(default=True, metadata=FREE)
    logger: Literal["csv", "tensorboard", "wandb"] = field(default="csv", metadata=FREE)
    wandb_project: str = field(default="esm2kit", metadata=FREE)

    option_groups = OptionGroups(
        usual="out_dir max_steps lr",
        data="max_tokens",
        training=(
            "global_batch_size micro_batch_size micro_batch_tokens accumulate_grad_batches val_check_interval "
            "resume_if_exists"
        ),
        optimizer="warmup_steps weight_decay beta1 beta2 eps gradient_clip_val",
        hardware=(
            "accelerator devices num_nodes strategy precision compile num_workers activation_checkpointing "
            "tokens_per_validation_batch"
        ),
        output="save_top_k log_every_n_steps logger wandb_project",
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherit_help(cls, TrainingConfig)

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)
        check_range(self, "max_tokens", at_least=3)  # BOS, one residue and EOS
        at_least_one = ("max_steps", "val_check_interval", "log_every_n_steps", "tokens_per_validation_batch")
        check_range(self, *at_least_one, at_least=1)
        not_negative = ("warmup_steps", "save_top_k", "weight_decay", "gradient_clip_val", "eps", "num_workers")
        check_range(self, *not_negative, at_least=0)
        check_range(self, "beta1", "beta2", at_least=0, below=1)
        check_range(self, "lr", above=0)

    @property
    def layout(self) -> BatchLayout:
        """The batch layout that these settings describe."""
        names = (name for name in BatchLayout.of.__annotations__ if hasattr(self, name))
        return BatchLayout.of(**{name: getattr(self, name) for name in names})
