"""DDP, FSDP2 and tensor parallelism: strategies, sharding, and gradients of sharded parameters."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from esm2kit.core.errors import InputError
from esm2kit.core.process_group import sum_over_group
from esm2kit.models.esm2 import ESM2
from esm2kit.models.sharded import shard_layers
from esm2kit.training.layout import BatchLayout, StrategyName, is_sharded

DATA_DIM, TENSOR_DIM = "data_parallel", "tensor_parallel"


def make_strategy(name: StrategyName, layout: BatchLayout, accelerator: str) -> Strategy | str:
    """Build the Lightning strategy: single device, DDP, or a device mesh for FSDP2, tensor parallelism or both."""
    if is_sharded(name, layout):
        # CheckpointWriter gathers the shards and writes safetensors, so Lightning's checkpoints are not used
        return ModelParallelStrategy(
            layout.data_parallel_size, layout.tensor_model_parallel_size, save_distributed_checkpoint=False
        )
    if layout.data_parallel_size > 1 or name == "ddp":
        return DDPStrategy(process_group_backend="nccl" if accelerator == "cuda" else "gloo")
    return "auto"


def shard_model(model: ESM2, mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> None:
    """Shard an ESM-2 over a (data_parallel, tensor_parallel) mesh, in place.

    Tensor parallelism comes first. It splits query, key, value and fc1 by columns, so that each rank holds complete
    attention heads, and out_proj and fc2 by rows, whose partial sums are all-reduced. FSDP2 then shards each layer over
    the data-parallel dimension.

    Args:
        model: The full model, identical on all ranks.
        mesh: Lightning's device mesh with the two named dimensions.
        param_dtype: Type to compute in; the sharded master weights keep their own type.

    Raises:
        InputError: The number of attention heads is not a multiple of the tensor-parallel size.
    """
    tensor_mesh, data_mesh = mesh[TENSOR_DIM], mesh[DATA_DIM]
    if model.config.attention_heads % tensor_mesh.size():
        raise InputError(
            f"attention_heads {model.config.attention_heads} is not a multiple of tensor_model_parallel_size "
            f"{tensor_mesh.size()}. Lower tensor_model_parallel_size.",
            code="layout.heads",
            attention_heads=model.config.attention_heads,
            tensor_model_parallel_size=tensor_mesh.size(),
        )
    if tensor_mesh.size() > 1:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1")
        plan = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("self_attn.out_proj", "fc2")}
        for layer in model.layers:
            parallelize_module(layer, tensor_mesh, plan)
    if data_mesh.size() > 1 or tensor_mesh.size() == 1:
        # inputs are not cast: autocast selects the type per operation, as under DDP
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        shard_layers(model, data_mesh, policy)


@contextmanager
def gradient_sync(strategy: Strategy, model: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients across data-parallel ranks in the backward pass inside, if `enabled`.

    Gradients are exchanged once per update, after its last micro-batch. Until then FSDP2 keeps unsharded float32
    gradients on every rank. If they do not fit in memory, use one micro-batch per update.

    Args:
        strategy: The strategy of the trainer.
        model: The model, sharded or not.
        enabled: Whether the backward pass inside exchanges gradients.

    Yields:
        None.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    waits = not enabled and isinstance(strategy, DDPStrategy)
    with strategy.block_backward_sync() if waits else nullcontext():
        yield


def data_parallel_group(strategy: Strategy) -> dist.ProcessGroup | None:
    """Return the process group of the ranks with different micro-batches; None on one device."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh[DATA_DIM].get_group()
    return None if isinstance(strategy, SingleDeviceStrategy) else dist.group.WORLD


def data_parallel_rank(strategy: Strategy) -> tuple[int, int]:
    """Return (rank, size) among the ranks with different micro-batches; tensor-parallel peers share one rank."""
    if isinstance(strategy, SingleDeviceStrategy):
        return 0, 1
    arguments = strategy.distributed_sampler_kwargs
    return arguments["rank"], arguments["num_replicas"]


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by placement: fused and foreach kernels cannot mix Tensors and DTensors."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.requires_grad:
            groups[_placement(parameter)].append(parameter)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a total norm of at most `max_norm`; works for any mixture of Tensors and DTensors.

    Args:
        parameters: The parameters of the optimizer. Each shard counts once, and replicas count once.
        max_norm: Largest total L2 norm; 0 computes the norm without clipping.

    Returns:
        The total L2 norm before clipping: a float32 scalar, identical on all ranks.
    """
    by_placement: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_placement[_placement(parameter.grad)].append(parameter.grad)
    total: Tensor | None = None
    for gradients in by_placement.values():
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        norms = torch.stack(torch._foreach_norm(local))
        square = norms.float().square().sum()
        if isinstance(gradients[0], DTensor):
            for dimension, placement in enumerate(gradients[0].placements):
                if not isinstance(placement, Replicate):  # Shard, or FSDP2's strided shard of a tensor-parallel shard
                    square = sum_over_group(gradients[0].device_mesh.get_group(dimension), square)
        total = square if total is None else total + square
    norm = torch.zeros(()) if total is None else total.sqrt()
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in by_placement.values():
            local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            torch._foreach_mul_(local, scale)
    return norm


def _placement(tensor: Tensor) -> object:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
