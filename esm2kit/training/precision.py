"""Which numbers training computes in: float32, bfloat16 operation by operation, or bfloat16 over float32 masters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from esm2kit.training.config import TrainingPrecision


def matmul_dtype(precision: TrainingPrecision) -> torch.dtype:
    """The type of a forward pass's matrix products."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def lightning_precision(precision: TrainingPrecision) -> str:
    """What Lightning is told: its own bf16-true would make the weights bfloat16, and no master would be left."""
    return "32-true" if precision == "bf16-true" else precision


def gather_dtype(precision: TrainingPrecision) -> torch.dtype | None:
    """The type FSDP2 gathers parameters in; None as they are.

    bfloat16 under bf16-mixed too, where the rows between the layers then are bfloat16 as well: autocast over gathered
    float32 would keep its own copy of every matrix until the backward pass, whole on every rank.
    """
    return None if precision == "32-true" else torch.bfloat16


@contextmanager
def precision_context(model: nn.Module, precision: TrainingPrecision) -> Iterator[None]:
    """Forward and backward passes inside compute in this precision; for bf16-true on bfloat16 copies of all parameters.

    The parameters themselves are the float32 masters: the optimizer, clipping, checkpoints and data-parallel exchange
    see them alone. A copy is made of each on entering and is part of the graph, so its gradient arrives at the master
    in float32, and micro-batches add up there. FSDP2 does the same with what it gathers (`MixedPrecisionPolicy`), so
    its models are left alone, and bf16-mixed is Lightning's autocast.

    Bytes a parameter, on a device that holds it whole: master 4, gradient 4, AdamW 8, copy 2 = 18, as under autocast,
    which also keeps copies of the matrices. What bf16-true saves is activations: residual stream, norms and their
    gradients take 2 bytes a number instead of 4. Under FSDP2 over R ranks it is 16 / R, and 2 for the layers at hand;
    and 4 with accumulate_grad_batches above 1, since a rank keeps whole gradients until the last micro-batch.

    Args:
        model: whose parameters are float32.
        precision: as in the configuration.
    """
    if precision != "bf16-true" or isinstance(model, FSDPModule):
        yield
        return
    held = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    masters = [(home, name, home[name]) for home, name in held if home[name] is not None]
    copies = {master: master.to(torch.bfloat16) for _, _, master in masters}
    try:
        for home, name, master in masters:
            home[name] = copies[master]
        yield
    finally:
        for home, name, master in masters:
            home[name] = master
