"""The settings that every training stage shares, with their documentation and their checks."""

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import check_choices, check_range
from esm2kit.training.layout import BatchLayout, StrategyName

TrainingPrecision = Literal["32-true", "bf16-mixed", "bf16-true"]
# Metadata of a field that may differ between a run and its resumption: where the run happens and how it is laid out,
# which leave the curve alone; max_steps and precision, by which a longer or faster continuation is asked for; and what
# only reads the result.
FREE = {"resume": "free"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the training engine reads of a stage's configuration; each stage adds its own fields.

    A stage's docstring is completed with the lines below for the fields that it does not describe itself.

    Args:
        out_dir: checkpoints, metrics.csv and logs go here.
        max_steps: updates in all.
        devices: devices of one node.
        num_nodes: nodes.
        strategy: ddp, fsdp2, or auto (ddp where there is more than one data-parallel rank).
        micro_batch_size: sequences one device holds at a time.
        accumulate_grad_batches: micro-batches a device works through for one update.
        global_batch_size: sequences of one update = micro_batch_size x accumulate_grad_batches x data-parallel ranks.
        max_tokens: longest window of a sequence, BOS and EOS included.
        lr: peak learning rate; None until the stage decides it.
        warmup_steps: updates of linear warm-up.
        weight_decay: decoupled weight decay; None until the stage decides it.
        beta1: AdamW's decay of the gradient average.
        beta2: AdamW's decay of the squared-gradient average.
        eps: AdamW's epsilon.
        gradient_clip_val: largest total gradient norm; 0 leaves gradients as they are.
        precision: 32-true; bf16-mixed (bf16 arithmetic operation by operation, on fp32 weights); or bf16-true (bf16
            throughout, on copies of fp32 master weights: less memory for activations). FSDP2 gathers bf16 for both.
        accelerator: cpu, cuda, or auto.
        activation_checkpointing: recompute layers in the backward pass; less memory, about a third more time.
        val_check_interval: updates between validations.
        tokens_per_validation_batch: token budget of a rank's validation batch.
        save_top_k: checkpoints to keep by lowest val_loss, the last one aside.
        log_every_n_steps: updates between rows of metrics.csv.
        resume_if_exists: go on from the last checkpoint in out_dir where there is one.
        logger: metrics.csv is always written; tensorboard and wandb (Weights & Biases, a package to install first) get
            the same figures and the settings. WANDB_MODE=offline keeps wandb off the network.
        wandb_project: name of the Weights & Biases project.
    """

    out_dir: Path = field(metadata=FREE)
    max_steps: int | None = field(default=None, metadata=FREE)
    devices: int = field(default=1, metadata=FREE)
    num_nodes: int = field(default=1, metadata=FREE)
    strategy: StrategyName = field(default="auto", metadata=FREE)
    micro_batch_size: int | None = field(default=None, metadata=FREE)
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
    precision: TrainingPrecision = field(default="32-true", metadata=FREE)
    accelerator: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREE)
    activation_checkpointing: bool = field(default=False, metadata=FREE)
    val_check_interval: int | None = field(default=None, metadata=FREE)
    tokens_per_validation_batch: int = field(default=4096, metadata=FREE)
    save_top_k: int = field(default=1, metadata=FREE)
    log_every_n_steps: int = field(default=10, metadata=FREE)
    resume_if_exists: bool = field(default=True, metadata=FREE)
    logger: Literal["csv", "tensorboard", "wandb"] = field(default="csv", metadata=FREE)
    wandb_project: str = field(default="esm2kit", metadata=FREE)

    def __init_subclass__(cls) -> None:
        if not (cls.__doc__ and TrainingConfig.__doc__):  # python -OO has none
            return
        own, entry = inspect.cleandoc(cls.__doc__), re.compile(r"^    (?=\w+: )", re.M)
        described = {line.partition(":")[0] for line in entry.split(own)[1:]}
        shared = entry.split(inspect.cleandoc(TrainingConfig.__doc__))[1:]
        added = [f"    {line.rstrip()}" for line in shared if line.partition(":")[0] not in described]
        cls.__doc__ = "\n".join([own, *added, ""])

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "max_tokens", at_least=3)  # BOS, one residue and EOS
        at_least_one = ("max_steps", "val_check_interval", "log_every_n_steps", "tokens_per_validation_batch")
        check_range(self, *at_least_one, at_least=1)
        check_range(self, "warmup_steps", "save_top_k", "weight_decay", "gradient_clip_val", "eps", at_least=0)
        check_range(self, "beta1", "beta2", at_least=0, below=1)
        check_range(self, "lr", above=0)

    @property
    def layout(self) -> BatchLayout:
        names = (name for name in BatchLayout.of.__annotations__ if hasattr(self, name))
        return BatchLayout.of(**{name: getattr(self, name) for name in names})
