"""Tests that are functions of a device: on the CPU in the ordinary suite, and on the GPUs of this machine."""

import pytest
import torch

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
NO_MPS = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="torch finds no GPU of an Apple chip")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])
MPS = pytest.param("mps", marks=NO_MPS)


def on_devices(*devices: object) -> pytest.MarkDecorator:
    """Run a test on the CPU, on a CUDA GPU and on further devices, each skipped with its reason where it is absent."""
    return pytest.mark.parametrize("device", ["cpu", CUDA, *devices])


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())
