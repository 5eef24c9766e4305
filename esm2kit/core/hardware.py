"""The device to use, the memory in use, and the measured matrix-product rate that speeds are compared with."""

import ctypes
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from esm2kit.core.errors import InputError


def resolve_device(requested: str) -> str:
    """Resolve the name of a device.

    Args:
        requested: `cpu`, `cuda`, or `auto` for cuda if a GPU is available.

    Returns:
        `cpu` or `cuda`.

    Raises:
        InputError: cuda was requested, but torch finds no GPU.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda' was requested, but torch finds no GPU. Use --device cpu or --device auto.",
            code="device.absent",
            found="cpu",
            requested=requested,
        )
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


def cpu_name() -> str:
    """Return the processor's model name, or its architecture if the system does not report a name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_memory_use(device: torch.device, peak: bool = False) -> int:
    """Read the memory use of a GPU, or the resident memory of this process.

    Args:
        device: For a GPU the peak since its statistics were last reset is read, whatever `peak` is.
        peak: Read the peak instead of the current use. Systems without /proc (macOS) report only the peak.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # not ru_maxrss, which on Linux starts from the peak of the parent process
    return int(status.read_text(encoding="utf-8").split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def return_freed_memory() -> None:
    """Return freed memory to the system; takes milliseconds with glibc and does nothing with other allocators.

    Batches of varying size fragment glibc's heap. Without this call a training process grows by gigabytes that it does
    not use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def matmul_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 0.5
) -> float:
    """Measure the speed of a square matrix product, an upper bound on the speed of a transformer.

    Args:
        device: `cpu` or `cuda`.
        dtype: Data type of both matrices.
        size: Rows and columns. Default: large enough to use the complete device, 1,024 on a CPU and 8,192 on a GPU.
        seconds: How long to repeat the product.

    Returns:
        FLOP/s of the fastest repetition.
    """
    size = size or (8192 if device == "cuda" else 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        _ = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest
