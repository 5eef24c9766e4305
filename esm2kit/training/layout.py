"""The batch equation: how a global batch is divided over devices.

`global_batch_size = micro_batch_size x accumulate_grad_batches x data_parallel_size` and
`devices x num_nodes = data_parallel_size x tensor_model_parallel_size`. Layouts with the same global batch size give
the same loss curve. With `micro_batch_tokens`, micro-batches have a token budget instead of a number of sequences, and
`global_batch_size = sequences per data-parallel rank x data_parallel_size`, where the first factor is a mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from esm2kit.core.errors import InputError
from esm2kit.sequences.batching import bucket_size, split_micro_batches, split_within_tokens

StrategyName = Literal["auto", "ddp", "fsdp2"]


@dataclass(frozen=True)
class BatchLayout:
    """The division of a global batch over devices; `of` derives sizes that are not specified.

    Args:
        micro_batch_size: Sequences per device and micro-batch; with micro_batch_tokens, per device and update.
        accumulate_grad_batches: Micro-batches per device and update; with micro_batch_tokens it is 1, and the number of
            micro-batches follows from the lengths of the sequences.
        data_parallel_size: Number of ranks that process different sequences.
        tensor_model_parallel_size: Number of devices that share one copy of the model.
        micro_batch_tokens: Most tokens per device and micro-batch, or None for a fixed number of sequences.
    """

    micro_batch_size: int
    accumulate_grad_batches: int
    data_parallel_size: int
    tensor_model_parallel_size: int
    micro_batch_tokens: int | None = None

    @property
    def global_batch_size(self) -> int:
        """Sequences per update."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.data_parallel_size

    @property
    def equation(self) -> str:
        """The batch equation with its numbers, for the log."""
        if self.micro_batch_tokens is not None:
            return (
                f"global_batch_size {self.global_batch_size} = {self.micro_batch_size} sequences per rank x "
                f"data_parallel_size {self.data_parallel_size}, in micro-batches of at most micro_batch_tokens "
                f"{self.micro_batch_tokens}"
            )
        return (
            f"global_batch_size {self.global_batch_size} = micro_batch_size {self.micro_batch_size} x "
            f"accumulate_grad_batches {self.accumulate_grad_batches} x data_parallel_size {self.data_parallel_size}"
        )

    def split(self, num_tokens: Sequence[int], rank: int) -> list[list[int]]:
        """Divide the samples of a global batch into micro-batches, and return those of a rank.

        The division is a pure function of the sizes. All ranks get the same number of micro-batches, because sharded
        models require the same number of forward passes on each of them.

        Args:
            num_tokens: Tokens per sample of the global batch, with BOS and EOS.
            rank: Data-parallel rank.

        Returns:
            Positions of the samples of each of the rank's micro-batches.
        """
        ranks = self.data_parallel_size
        if self.micro_batch_tokens is None:
            micro_batches = split_micro_batches(num_tokens, self.accumulate_grad_batches * ranks)
        else:
            # a packed batch is rounded up to a bucket, and must not exceed the budget then either
            budget = self.micro_batch_tokens - self.micro_batch_tokens % bucket_size(self.micro_batch_tokens)
            micro_batches = split_within_tokens(num_tokens, budget, ranks)
        return micro_batches[rank::ranks]

    @classmethod
    def of(
        cls,
        devices: int = 1,
        num_nodes: int = 1,
        tensor_model_parallel_size: int = 1,
        micro_batch_size: int | None = None,
        accumulate_grad_batches: int | None = None,
        global_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
    ) -> "BatchLayout":
        """Derive a layout from any consistent subset of the sizes.

        Args:
            devices: Devices per node.
            num_nodes: Number of nodes.
            tensor_model_parallel_size: Devices that share one copy of the model.
            micro_batch_size: Sequences per device and micro-batch. Default: derived from global_batch_size, else 8.
            accumulate_grad_batches: Micro-batches per device and update. Default: derived from global_batch_size,
                else 1.
            global_batch_size: Sequences per update. Default: the product of the other sizes; with micro_batch_tokens 8
                per data-parallel rank.
            micro_batch_tokens: Most tokens per device and micro-batch, instead of micro_batch_size and
                accumulate_grad_batches.

        Returns:
            A layout in which the batch equation holds.

        Raises:
            InputError: A size is below 1, the devices do not divide into tensor-parallel groups, the sizes contradict
                the batch equation, or micro-batches are given both a number of sequences and a token budget.
        """
        given = (devices, num_nodes, tensor_model_parallel_size, micro_batch_size, accumulate_grad_batches)
        if any(value is not None and value < 1 for value in (*given, global_batch_size, micro_batch_tokens)):
            raise InputError("devices, num_nodes and all batch sizes must be at least 1", code="layout.size")
        sizes = {"micro_batch_size": micro_batch_size, "accumulate_grad_batches": accumulate_grad_batches}
        for name, value in sizes.items():
            if micro_batch_tokens is not None and value is not None:
                raise InputError(
                    f"micro_batch_tokens {micro_batch_tokens} and {name} {value} both divide the batch of a device. "
                    "Pass one of them.",
                    code="layout.two-divisions",
                    micro_batch_tokens=micro_batch_tokens,
                    name=name,
                    found=value,
                )
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
        if micro_batch_tokens is not None:
            return cls._of_tokens(micro_batch_tokens, global_batch_size, data_parallel, tensor_model_parallel_size)
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

    @classmethod
    def _of_tokens(cls, tokens: int, global_batch_size: int | None, ranks: int, tensor: int) -> "BatchLayout":
        """Build a layout whose micro-batches have a token budget."""
        size = 8 * ranks if global_batch_size is None else global_batch_size
        if size % ranks:
            raise InputError(
                f"global_batch_size {size} is not a multiple of data_parallel_size {ranks}. Change one of them.",
                code="layout.equation",
                requested=size,
                found=size // ranks * ranks,
            )
        return cls(size // ranks, 1, ranks, tensor, tokens)


def is_sharded(name: StrategyName, layout: BatchLayout) -> bool:
    """Check whether each rank holds only a part of the model."""
    return layout.tensor_model_parallel_size > 1 or name == "fsdp2"


def uses_fsdp(name: StrategyName, layout: BatchLayout) -> bool:
    """Check whether the data-parallel ranks divide weights, gradients and averages; see `parallel.shard_model`."""
    return is_sharded(name, layout) and (layout.data_parallel_size > 1 or layout.tensor_model_parallel_size == 1)
