"""How a global batch is laid over devices, and what each layout asks of gradients.

`global_batch_size = micro_batch_size x accumulate_grad_batches x data_parallel_size`, and
`devices x num_nodes = data_parallel_size x tensor_model_parallel_size`: nothing else decides the loss curve.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from esm2kit.errors import InputError
from esm2kit.model import ESM2

StrategyName = Literal["auto", "ddp", "fsdp2"]
DATA_DIM, TENSOR_DIM = "data_parallel", "tensor_parallel"


@dataclass(frozen=True)
class BatchLayout:
    """A global batch over devices; `of` derives what is not given."""

    micro_batch_size: int
    accumulate_grad_batches: int
    data_parallel_size: int
    tensor_model_parallel_size: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulate_grad_batches * self.data_parallel_size

    @property
    def equation(self) -> str:
        return (
            f"global_batch_size {self.global_batch_size} = micro_batch_size {self.micro_batch_size} x "
            f"accumulate_grad_batches {self.accumulate_grad_batches} x data_parallel_size {self.data_parallel_size}"
        )

    @classmethod
    def of(
        cls,
        devices: int = 1,
        num_nodes: int = 1,
        tensor_model_parallel_size: int = 1,
        micro_batch_size: int | None = None,
        accumulate_grad_batches: int | None = None,
        global_batch_size: int | None = None,
    ) -> "BatchLayout":
        """Derive a layout from any consistent subset.

        Args:
            devices: devices of one node.
            num_nodes: nodes.
            tensor_model_parallel_size: devices that share one model's matrices.
            micro_batch_size: sequences one device holds at a time; 8 where nothing says otherwise.
            accumulate_grad_batches: micro-batches a device works through for one update; 1 where nothing else says.
            global_batch_size: sequences one update sees.
        Raises: InputError showing the equation that does not come out.
        """
        given = (devices, num_nodes, tensor_model_parallel_size, micro_batch_size, accumulate_grad_batches)
        if any(value is not None and value < 1 for value in (*given, global_batch_size)):
            raise InputError("devices, num_nodes and all batch sizes must be 1 or more")
        if devices * num_nodes % tensor_model_parallel_size:
            raise InputError(
                f"devices {devices} x num_nodes {num_nodes} = {devices * num_nodes} does not divide into groups of "
                f"tensor_model_parallel_size {tensor_model_parallel_size}"
            )
        data_parallel = devices * num_nodes // tensor_model_parallel_size
        micro, accumulate = micro_batch_size, accumulate_grad_batches
        if global_batch_size is not None:
            if micro is None:
                micro = max(1, global_batch_size // (data_parallel * (accumulate or 1)))
            if accumulate is None:
                accumulate = max(1, global_batch_size // (data_parallel * micro))
        layout = cls(micro or 8, accumulate or 1, data_parallel, tensor_model_parallel_size)
        if global_batch_size not in (None, layout.global_batch_size):
            raise InputError(
                f"global_batch_size {global_batch_size} was asked for, but micro_batch_size {layout.micro_batch_size} "
                f"x accumulate_grad_batches {layout.accumulate_grad_batches} x data_parallel_size {data_parallel} = "
                f"{layout.global_batch_size}; change one of them"
            )
        return layout


def is_sharded(name: StrategyName, layout: BatchLayout) -> bool:
    """Whether a rank holds a part of the model only."""
    return layout.tensor_model_parallel_size > 1 or name == "fsdp2"


def make_strategy(name: StrategyName, layout: BatchLayout, accelerator: str) -> Strategy | str:
    """The Lightning strategy for a layout: one device, DDP, or a device mesh for FSDP2, tensor parallel and both."""
    if is_sharded(name, layout):
        # never DTensor checkpoints of Lightning's own: pretrain.py gathers and writes safetensors
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
            f"tensor_model_parallel_size {tensor_mesh.size()}"
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


def sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """The sum over a group's ranks, the same on each."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank of the job, tensor-parallel peers included: all ranks get one answer."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gathered(items: list[str]) -> list[str]:
    """Every rank's items, rank by rank; the same list on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


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
                    square = sum_over(gradients[0].device_mesh.get_group(dimension), square)
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
