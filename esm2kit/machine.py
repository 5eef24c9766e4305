"""What a machine can do at best: the measured rate that speeds are held against."""

import time

import torch


def matmul_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, seconds: float = 0.5
) -> float:
    """FLOP/s of a square matrix product, the best of repeated ones: the ceiling of a transformer's speed.

    Args:
        device: cpu or cuda.
        dtype: of both factors.
        size: rows and columns; large enough to fill the device.
        seconds: how long to repeat.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        _ = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
