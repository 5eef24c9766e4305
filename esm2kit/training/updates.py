"""Results of an update that are read without stopping the device.

Reading a number of a GPU waits until all work before it is finished, and the GPU is idle until it receives more. The
numbers of an update are therefore copied while the device works on, and read one update later, or when a row of the log
or a checkpoint requires them.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esm2kit.models.packing import to_device


def send_to_device(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device; a GPU receives them from pinned memory, so that this process does not wait for it."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type for sums over batches: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class HostCopy:
    """A copy of a tensor on the host, which a GPU makes once it has computed the tensor.

    Args:
        values: A tensor of any device.
    """

    def __init__(self, values: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = values

    @cached_property
    def numbers(self) -> list[float]:
        """The numbers; waits until the copy is complete."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class Update(NamedTuple):
    """An update that the device may still work on.

    Args:
        step: Its number, from 1.
        batches: This rank's micro-batches.
        lr: Learning rate.
        copy: Loss, gradient norm, and whether a rank received a stop signal; tokens of all ranks; tokens and
            floating-point operations of all ranks since the process started.
    """

    step: int
    batches: list[Any]
    lr: float
    copy: HostCopy

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by name; reading them waits for the device."""
        names = ("train_loss", "grad_norm", "stop", "tokens", "total_tokens", "total_flops")
        return dict(zip(names, self.copy.numbers, strict=True)) | {"lr": self.lr}

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        loss, norm, *_ = self.copy.numbers
        return math.isfinite(loss) and math.isfinite(norm)

    @property
    def stops_the_run(self) -> bool:
        """Whether a rank had received a stop signal when the update began."""
        return self.copy.numbers[2] > 0
