"""DDP, FSDP2 and tensor parallelism: strategies, sharding, and what each layout requires of gradients."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from esm2kit.core.errors import InputError
from esm2kit.core.process_group import sum_over_group
from esm2kit.models.esm2 import ESM2
from esm2kit.training.layout import BatchLayout, StrategyName, is_sharded

DATA_DIM, TENSOR_DIM = "data_parallel", "tensor_parallel"


def make_strategy(name: StrategyName, layout: BatchLayout, accelerator: str) -> Strategy | str:
    """The Lightning strategy for a layout: one device, DDP, or a device mesh for FSDP2, tensor parallel and both."""
    if is_sharded(name, layout):
        # never DTensor checkpoints of Lightning's own: CheckpointWriter gathers and writes safetensors
        return ModelParallelStrategy(
            layout.data_parallel_size, layout.tensor_model_parallel_size, save_distributed_checkpoint=False
        )
    if layout.data_parallel_size > 1 or name == "ddp":
        return DDPStrategy(process_group_backend="nccl" if accelerator == "cuda" else "gloo")
    return "auto"


def shard_model(model: ESM2, mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> None:
    """Lay an ESM-2 over a (data_parallel, tensor_parallel) mesh, in place.

    Tensor parallel first: query, key, value and fc1 by columns, so that a rank holds whole heads; out_proj and fc2 by
    rows, whose partial sums are added up. Then FSDP2 layer by layer over the data dimension.

    Args:
        model: the whole model, the same on every rank.
        mesh: Lightning's mesh with the two named dimensions.
        param_dtype: compute in this type while the sharded master weights keep theirs.
    Raises: InputError if the heads do not divide among the tensor-parallel ranks.
    """
    tensor_mesh, data_mesh = mesh[TENSOR_DIM], mesh[DATA_DIM]
    if model.config.attention_heads % tensor_mesh.size():
        raise InputError(
            f"attention_heads {model.config.attention_heads} do not divide among "
            f"tensor_model_parallel_size {tensor_mesh.size()}",
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
        # inputs stay as they are: autocast decides operation by operation, as it does under DDP
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=data_mesh, mp_policy=policy)
        fully_shard(model, mesh=data_mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "masked_logits")
        register_fsdp_forward_method(model, "encode")


@contextmanager
def gradient_sync(strategy: Strategy, model: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients across data-parallel ranks where `enabled`: once an update, after its last micro-batch.

    Until then FSDP2 keeps whole float32 gradients on every rank; a model that leaves no room for them wants one
    micro-batch an update.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    waits = not enabled and isinstance(strategy, DDPStrategy)
    with strategy.block_backward_sync() if waits else nullcontext():
        yield


def data_parallel_group(strategy: Strategy) -> dist.ProcessGroup | None:
    """The ranks that see different micro-batches; None on one device."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh[DATA_DIM].get_group()
    return None if isinstance(strategy, SingleDeviceStrategy) else dist.group.WORLD


def data_parallel_rank(strategy: Strategy) -> tuple[int, int]:
    """(rank, size) among the ranks that see different micro-batches; tensor-parallel peers share theirs."""
    if isinstance(strategy, SingleDeviceStrategy):
        return 0, 1
    arguments = strategy.distributed_sampler_kwargs
    return arguments["rank"], arguments["num_replicas"]


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters apart by where they live: fused and foreach kernels refuse to mix Tensors with DTensors."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.requires_grad:
            groups[_placement(parameter)].append(parameter)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a total norm of at most `max_norm`, whatever mixture of Tensor and DTensor they are.

    Args:
        parameters: those the optimizer steps; each shard counts once, replicas once.
        max_norm: 0 measures without clipping.
    Returns: the total L2 norm before clipping, a scalar in float32, the same on every rank.
    """
    by_placement: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_placement[_placement(parameter.grad)].append(parameter.grad)
    total = torch.zeros(())
    for gradients in by_placement.values():
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        norms = torch.stack(torch._foreach_norm(local))
        square = norms.float().square().sum()
        if isinstance(gradients[0], DTensor):
            for dimension, placement in enumerate(gradients[0].placements):
                if not isinstance(placement, Replicate):  # Shard, or FSDP2's strided shard of a tensor-parallel one
                    square = sum_over_group(gradients[0].device_mesh.get_group(dimension), square)
        total = total.to(square.device) + square
    norm = total.sqrt()
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in by_placement.values():
            local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            torch._foreach_mul_(local, scale)
    return norm


def _placement(tensor: Tensor) -> object:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
