"""The batch equation: how a global batch is divided over devices.

`global_batch_size = micro_batch_size x accumulate_grad_batches x data_parallel_size` and
`devices x num_nodes = data_parallel_size x tensor_model_parallel_size`. Layouts with the same global batch size give
the same loss curve.
"""

from dataclasses import dataclass
from typing import Literal

from esm2kit.core.errors import InputError

StrategyName = Literal["auto", "ddp", "fsdp2"]


@dataclass(frozen=True)
class BatchLayout:
    """The division of a global batch over devices; `of` derives sizes that are not specified.

    Args:
        micro_batch_size: Sequences per device and micro-batch.
        accumulate_grad_batches: Micro-batches per device and update.
        data_parallel_size: Number of ranks that process different sequences.
        tensor_model_parallel_size: Number of devices that share one copy of the model.
    """

    micro_batch_size: int
    accumulate_grad_batches: int
    data_parallel_size: int
    tensor_model_parallel_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences per update."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.data_parallel_size

    @property
    def equation(self) -> str:
        """The batch equation with its numbers, for the log."""
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
        """Derive a layout from any consistent subset of the sizes.

        Args:
            devices: Devices per node.
            num_nodes: Number of nodes.
            tensor_model_parallel_size: Devices that share one copy of the model.
            micro_batch_size: Sequences per device and micro-batch. Default: derived from global_batch_size, else 8.
            accumulate_grad_batches: Micro-batches per device and update. Default: derived from global_batch_size,
                else 1.
            global_batch_size: Sequences per update. Default: the product of the other sizes.

        Returns:
            A layout in which the batch equation holds.

        Raises:
            InputError: A size is below 1, the devices do not divide into tensor-parallel groups, or the sizes
                contradict the batch equation.
        """
        given = (devices, num_nodes, tensor_model_parallel_size, micro_batch_size, accumulate_grad_batches)
        if any(value is not None and value < 1 for value in (*given, global_batch_size)):
            raise InputError("devices, num_nodes and all batch sizes must be at least 1", code="layout.size")
        if devices * num_nodes % tensor_model_parallel_size:
            raise InputError(
                f"devices {devices} x num_nodes {num_nodes} = {devices * num_nodes} is not a multiple of "
                f"tensor_model_parallel_size {tensor_model_parallel_size}. Change one of them.",
                code="layout.groups",
                devices=devices * num_nodes,
                tensor_model_parallel_size=tensor_model_parallel_size,
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
                f"global_batch_size {global_batch_size} was requested, but micro_batch_size {layout.micro_batch_size} "
                f"x accumulate_grad_batches {layout.accumulate_grad_batches} x data_parallel_size {data_parallel} = "
                f"{layout.global_batch_size}. Change one of them.",
                code="layout.equation",
                requested=global_batch_size,
                found=layout.global_batch_size,
            )
        return layout


def is_sharded(name: StrategyName, layout: BatchLayout) -> bool:
    """Check whether each rank holds only a part of the model."""
    return layout.tensor_model_parallel_size > 1 or name == "fsdp2"
