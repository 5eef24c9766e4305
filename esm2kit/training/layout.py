"""How a global batch divides over devices: the batch equation.

`global_batch_size = micro_batch_size x accumulate_grad_batches x data_parallel_size`, and
`devices x num_nodes = data_parallel_size x tensor_model_parallel_size`: nothing else decides the loss curve.
"""

from dataclasses import dataclass
from typing import Literal

from esm2kit.core.errors import InputError

StrategyName = Literal["auto", "ddp", "fsdp2"]


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
            raise InputError("devices, num_nodes and all batch sizes must be 1 or more", code="layout.size")
        if devices * num_nodes % tensor_model_parallel_size:
            raise InputError(
                f"devices {devices} x num_nodes {num_nodes} = {devices * num_nodes} does not divide into groups of "
                f"tensor_model_parallel_size {tensor_model_parallel_size}",
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
                f"{layout.global_batch_size}; change one of them",
                code="layout.equation",
                requested=global_batch_size,
                found=layout.global_batch_size,
            )
        return layout


def is_sharded(name: StrategyName, layout: BatchLayout) -> bool:
    """Whether a rank holds a part of the model only."""
    return layout.tensor_model_parallel_size > 1 or name == "fsdp2"
