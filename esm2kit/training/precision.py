"""Numeric precision of training: float32, autocast to bfloat16, or bfloat16 with float32 master weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from esm2kit.models.encoder import Precision, resolve_precision
from esm2kit.training.config import TrainingPrecision


def matmul_dtype(precision: TrainingPrecision) -> torch.dtype:
    """Return the type of the matrix products in a forward pass."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def encoder_precision(precision: TrainingPrecision, device: torch.device | str) -> Precision:
    """Return the precision of an `Encoder` that a run uses before and after training, such as for test predictions.

    Args:
        precision: The resolved precision of the run.
        device: The device of the encoder.

    Returns:
        float32 for a run in 32-true, otherwise what `auto` means on the device.
    """
    return resolve_precision("float32" if precision == "32-true" else "auto", device)


def lightning_precision(precision: TrainingPrecision) -> str:
    """Return Lightning's precision setting; its bf16-true would convert the master weights to bfloat16."""
    return "32-true" if precision == "bf16-true" else precision


def gather_dtype(precision: TrainingPrecision) -> torch.dtype | None:
    """Return the type in which FSDP2 gathers parameters.

    Under bf16-mixed it is bfloat16 too, and so are the activations between layers. With gathered float32 parameters,
    autocast would keep an unsharded copy of every matrix on every rank until the backward pass.

    Args:
        precision: The setting of the configuration.

    Returns:
        A torch type, or None for the type of the parameters.
    """
    return None if precision == "32-true" else torch.bfloat16


@contextmanager
def precision_context(model: nn.Module, precision: TrainingPrecision) -> Iterator[None]:
    """Run forward and backward passes in the given precision; bf16-true uses bfloat16 copies of all parameters.

    Both bf16 precisions cast a weight once in this context, however many micro-batches run in it. Under bf16-mixed it
    is autocast that casts; its cache, which Lightning turns off, is on here and is emptied at the end, because the
    update that follows changes the weights.

    The parameters are float32 master weights, and the optimizer, gradient clipping, checkpoints and the data-parallel
    exchange use only them. The copies are part of the autograd graph, so the gradients of all micro-batches accumulate
    in float32 at the master weights. FSDP2 casts the parameters that it gathers (`MixedPrecisionPolicy`), so this
    context makes no copies of them.

    Memory per parameter on a device with the full model: 4 bytes for the master weight, 4 for its gradient, 8 for AdamW
    and 2 for the copy, 18 in total. Autocast takes the same, because it keeps copies of the matrices. bf16-true saves
    activation memory: the residual stream, the norms and their gradients take 2 bytes per number instead of 4. With
    FSDP2 over R ranks the memory per parameter is 16 / R bytes, plus 2 for the layers that are gathered. If
    accumulate_grad_batches is above 1, it is 4 bytes more, because each rank keeps unsharded gradients until the last
    micro-batch.

    Args:
        model: A model with float32 parameters.
        precision: The setting of the configuration.

    Yields:
        None.
    """
    if precision == "bf16-mixed":
        was_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(True)
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_cache_enabled(was_enabled)
        return
    if precision != "bf16-true" or isinstance(model, FSDPModule):
        yield
        return
    slots = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    masters = [(owner, name, owner[name]) for owner, name in slots if owner[name] is not None]
    copies = {master: master.to(torch.bfloat16) for master in dict.fromkeys(master for _, _, master in masters)}
    try:
        for owner, name, master in masters:
            owner[name] = copies[master]
        yield
    finally:
        for owner, name, master in masters:
            owner[name] = master
