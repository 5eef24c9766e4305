"""Measure the peak of the memory that torch allocates on the CPU."""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.profiler import profile


def measure_peak(run: Callable[[], object]) -> int:
    """Run something and return the largest sum of bytes that it had allocated and not yet freed."""
    with profile(profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def count_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Count the bytes of a model's tensors and of an optimizer's state; shared tensors count once."""
    averages = [tensor for state in optimizer.state.values() for tensor in state.values()]
    sizes = [
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        for tensors in ([*model.parameters(), *model.buffers()], averages)
    ]
    return sum(sizes[0].values()), sum(sizes[1].values())
