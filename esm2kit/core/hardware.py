"""What a machine is, and what it can do at best: the measured rate that speeds are held against."""

import ctypes
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from esm2kit.core.errors import InputError


def resolve_device(asked: str) -> str:
    """cpu or cuda; auto is cuda where there is a GPU.

    Raises: InputError if cuda was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda was asked for and torch finds no GPU: use device cpu or auto",
            code="device.absent",
            found="cpu",
            asked=asked,
        )
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_memory_use(device: torch.device, peak: bool = False) -> int:
    """Bytes held: of a GPU, or resident in this process.

    Args:
        device: a GPU tells the most since its statistics were last reset, whatever `peak` says.
        peak: the most so far instead of what is held now. Without Linux's /proc it always is the most so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # not ru_maxrss, which begins with the peak of the process that started this one
    return int(status.read_text().split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def return_freed_memory() -> None:
    """Have the allocator hand back what was freed, some milliseconds; where it is glibc's, and nothing elsewhere.

    Batches of ever other sizes leave its heap in pieces that fit no later one, and a training process grows by
    gigabytes that nothing uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def matmul_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 0.5
) -> float:
    """FLOP/s of a square matrix product, the best of repeated ones: the ceiling of a transformer's speed.

    Args:
        device: cpu or cuda.
        dtype: of both factors.
        size: rows and columns; by default what fills the device, 1,024 on a CPU and 8,192 on a GPU.
        seconds: how long to repeat.
    """
    size = size or (8192 if device == "cuda" else 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        _ = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
