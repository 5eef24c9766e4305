"""The device to use, the memory in use, and the measured matrix-product rate that speeds are compared with."""

import ctypes
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from esm2kit.core.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_VARIABLE = "ESM2KIT_DEVICE"  # environment variable: the device that `auto` means
CGROUPS = Path("/sys/fs/cgroup")


def resolve_device(requested: str) -> str:
    """Resolve the name of a device.

    Args:
        requested: `cpu`, `cuda`, `mps` (the GPU of Apple chips), or `auto` for what the environment variable
            ESM2KIT_DEVICE names; without it, for a GPU if torch finds one.

    Returns:
        `cpu`, `cuda` or `mps`.

    Raises:
        InputError: a GPU was requested that torch does not find, or the device is of another kind.
    """
    source = "device"
    if requested == "auto":
        requested, source = os.environ.get(DEVICE_VARIABLE) or "auto", f"the environment variable {DEVICE_VARIABLE}"
    if requested not in DEVICES:
        raise InputError(
            f"{source} must be auto, cpu, cuda or mps, found '{requested}'",
            code="device.unknown",
            requested=requested,
        )
    if requested == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"{source} is 'cuda', but torch finds no GPU. Use cpu or auto.",
            code="device.absent",
            found="cpu",
            requested=requested,
        )
    if requested == "mps" and not torch.backends.mps.is_available():
        raise InputError(
            f"{source} is 'mps', but torch finds no GPU of an Apple chip. Use cpu or auto.",
            code="device.absent",
            found="cpu",
            requested=requested,
        )
    if requested != "auto":
        return requested
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(requested: str, local_rank: int) -> torch.device:
    """Choose the device of this process: each process of a node gets a GPU of its own.

    Args:
        requested: As for `resolve_device`.
        local_rank: Rank of the process among those of the node.

    Returns:
        The device.

    Raises:
        InputError: As `resolve_device`.
    """
    kind = resolve_device(requested)
    # srun can make a single GPU visible to each task, which then has index 0
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)


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
        peak: Read the peak instead of the current use. macOS, which has no /proc, reports only the peak.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if sys.platform == "win32":
        return _read_windows_memory(peak)
    if not status.is_file():
        import resource  # Windows has no such module

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # not ru_maxrss, which on Linux starts from the peak of the parent process
    return int(status.read_text(encoding="utf-8").split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def read_free_memory(device: torch.device) -> int | None:
    """Read the memory that a device has free.

    Args:
        device: For a CPU, the memory that the system can give without swapping, within the limit of its container or
            job; macOS reports only its total memory.

    Returns:
        Bytes, or None if the system does not report them.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        has_pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_pages else None
    free = int(meminfo.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]) * 1024
    groups = Path("/proc/self/cgroup")
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []
    folder = CGROUPS / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    while folder.is_relative_to(CGROUPS):  # of a container or a job of SLURM, in version 2, and those around it
        try:
            limit, used = (int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
            cached = (folder / "memory.stat").read_text(encoding="utf-8").split("inactive_file ")[1].split()[0]
            free = min(free, max(0, limit - used + int(cached)))
        except (OSError, ValueError, IndexError):  # without a limit the value is `max`
            pass
        folder = folder.parent
    return free


class _WindowsMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("current", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


def _read_windows_memory(peak: bool) -> int:
    """Read the resident memory of this process on Windows, its peak or its current size, in bytes."""
    memory = _WindowsMemory(size=ctypes.sizeof(_WindowsMemory))
    kernel = ctypes.WinDLL("kernel32")
    process = ctypes.c_void_p(-1)  # stands for this process
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(memory), memory.size)
    return int(memory.peak if peak else memory.current)


def return_freed_memory() -> None:
    """Return freed memory to the system; takes milliseconds with glibc and does nothing with other allocators.

    Batches of varying size fragment glibc's heap. Without this call a training process grows by gigabytes that it does
    not use.
    """
    trim = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)
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


# Parts of the messages with which torch's allocators of a CPU and of mps report that memory is exhausted.
EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an exception means that the memory of a device is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in EXHAUSTED)


@contextmanager
def explain_out_of_memory(action: str, remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Raise an error of one line if the memory is exhausted inside.

    The tensors of the failed operation are released, so that the caller can try again with other settings.

    Args:
        action: What is done inside, such as "embedding batches of 32,768 tokens".
        remedies: Returns the settings that help, the best first, each with the memory that it needs.

    Yields:
        None.

    Raises:
        InputError: The memory of a GPU or of this machine is exhausted.
        RuntimeError: Any other error inside, unchanged.
        MemoryError: Never; it becomes an InputError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        *first, last = remedies()
        choices = f"{', '.join(first)} or {last}" if first else last
        raise InputError(
            f"the memory is exhausted while {action}. Use {choices}.",
            code="memory.exhausted",
            action=action,
            remedies=[*first, last],
        ) from None
