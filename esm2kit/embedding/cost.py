"""Estimate what embedding takes before it starts: seconds on this machine, and bytes of vectors."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from esm2kit.core.processes import count_cores
from esm2kit.embedding.batch import count_columns
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Precision, resolve_precision
from esm2kit.sequences.windows import Windowing

# Share of the rate of matrix products that embedding reaches: 8M on a CPU and 650M on an H100 (docs/measured.md). Small
# models on a GPU reach less, but take seconds.
SHARE_OF_PRODUCTS = {"cpu": 0.64, "cuda": 0.46, "mps": 0.46}
SECONDS_OF_TRIAL = 0.05
ROWS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of the products of a trial


class EmbeddingCost(NamedTuple):
    """What one pass of a model takes.

    Args:
        seconds: Estimate for this machine and its present load, without loading the model.
        num_bytes: Bytes of the vectors; files are slightly larger.
    """

    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        seconds = self.seconds
        time_text = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        time_text = time_text if seconds < 5400 else f"{seconds / 3600:.1f} h"
        size = self.num_bytes / 1e6
        return f"about {time_text} and {f'{size:,.1f} MB' if size < 1e4 else f'{size / 1e3:,.1f} GB'} of vectors"


def estimate_cost(
    shape: ESM2Config,
    num_residues: Sequence[int],
    layers: int,
    poolings: Sequence[str],
    dtype: str,
    device: str,
    windowing: Windowing,
) -> EmbeddingCost:
    """Estimate the cost of embedding proteins with one pass of a model.

    Args:
        shape: Architecture of the model.
        num_residues: Residues per protein.
        layers: Layers that are saved. They change the bytes, and hardly the time.
        poolings: What is saved of each layer, with "none" for one vector per residue.
        dtype: Type of the stored values.
        device: cpu, cuda or mps.
        windowing: How long proteins are split.

    Returns:
        The estimate of the time, and the exact number of bytes.
    """
    num_tokens = [stop - start + 2 for count in num_residues for start, stop in windowing.split(count)]
    rate = measure_products(shape.embed_dim, device, resolve_precision("auto", torch.device(device)))
    seconds = shape.forward_flops(num_tokens, 0) / (rate * SHARE_OF_PRODUCTS[device])
    values = sum(
        sum(num_residues) * shape.embed_dim
        if name == "none"
        else len(num_residues) * count_columns(name, shape.embed_dim)
        for name in poolings
    )
    return EmbeddingCost(seconds, layers * values * np.dtype(dtype).itemsize)


def measure_products(width: int, device: str, precision: Precision) -> float:
    """Measure the rate of matrix products of a model's width, in floating-point operations per second.

    Args:
        width: Width of the model.
        device: cpu, cuda or mps.
        precision: float32, or bfloat16 on a GPU.

    Returns:
        The rate of the device; of a CPU, that of one thread times the number of cores.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rows, threads = ROWS[device], torch.get_num_threads()
    left, right = (
        torch.ones(rows, width, dtype=dtype, device=device),
        torch.ones(width, 4 * width, dtype=dtype, device=device),
    )
    product = torch.empty(rows, 4 * width, dtype=dtype, device=device)
    torch.set_num_threads(1)
    try:
        count, elapsed = 1, 0.0
        while elapsed < SECONDS_OF_TRIAL:  # doubles the work until it takes long enough to be measured
            count *= 2
            start = time.perf_counter()
            for _ in range(count):
                torch.mm(left, right, out=product)
            product[0, 0].item()  # waits for a GPU
            elapsed = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    rate = count * 8 * rows * width**2 / elapsed
    return rate * count_cores() if device == "cpu" else rate
