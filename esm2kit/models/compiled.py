"""Compile the layers of a model for inference on a GPU.

Two functions are compiled, what comes before attention and what comes after it, and every layer runs through them. So
there are two graphs, whatever the number of layers, the number of rows and the lengths of the sequences.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.hardware import is_out_of_memory
from esm2kit.models.esm2 import ESM2, TransformerLayer, rotate
from esm2kit.models.packing import Packed, to_device
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX

logger = logging.getLogger(__name__)
# Compiling is assumed to take a minute. On one H100 it saved 0.8 s per million residues at 650M (240,000 residues/s,
# compiled 299,000, docs/measured.md); other sizes are assumed to save in proportion to their parameters.
REPAID_AT = 75e6 * 650e6  # residues times parameters
# Tokens of the sequences of two trials. A number of rows that equals a dimension of the model, such as 32 or 64, would
# be compiled as the same number: 61 and 151 are primes and dimensions of no model.
TRIED_TOKENS = ([24, 37], [151])


# Packages whose errors are those of the compiler.
COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


@contextmanager
def explain_compiler_errors() -> Iterator[None]:
    """Raise an error of one line if compiled layers fail inside, after the trial of the compiler has worked.

    The compiler runs again for shapes and modes that the trial does not have, so it can fail at any time.

    Yields:
        None.

    Raises:
        InputError: The compiler, or the code that it generated, failed.
        Exception: Any other error inside, unchanged.
    """
    try:
        yield
    except Exception as error:
        modules = [kind.__module__ for kind in type(error).__mro__]
        if is_out_of_memory(error) or not any(name.startswith(COMPILER) for name in modules):
            raise
        raise InputError(
            f"torch.compile failed during the run ({summarise_compiler_error(error)}). Run again with --compile false; "
            "what is finished is kept.",
            code="compile.failed",
            reason=type(error).__name__,
        ) from error


def summarise_compiler_error(error: Exception) -> str:
    """Return what a compiler reported on one line: the first line names the backend, the second its error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def is_repaid(num_residues: int, num_parameters: int) -> bool:
    """Return whether a run is long enough to repay the time of compiling."""
    return num_residues * num_parameters >= REPAID_AT


def project(layer: TransformerLayer, x_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the rotated queries and keys, and the values, (N, H, K) each."""
    attention, normed_ND = layer.self_attn, layer.self_attn_layer_norm(x_ND)
    heads = (-1, attention.head_dim)
    query = rotate(attention.q_proj(normed_ND).unflatten(-1, heads), cos, sin)
    key = rotate(attention.k_proj(normed_ND).unflatten(-1, heads), cos, sin)
    return query, key, attention.v_proj(normed_ND).unflatten(-1, heads)


def combine(layer: TransformerLayer, x_ND: Tensor, attended_NHK: Tensor) -> Tensor:
    """Compute the rows after a layer from those before it and the attention's result."""
    x_ND = x_ND + layer.self_attn.out_proj(attended_NHK.flatten(-2))
    return x_ND + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x_ND))))


def compile_layers(model: ESM2, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compile the layers of a model for inference with packed batches; without success they stay as they are.

    Args:
        model: on its device.
        backend: of torch.compile.

    Returns:
        Whether the layers are compiled.
    """
    compiled = [torch.compile(part, dynamic=True, fullgraph=True, backend=backend) for part in (project, combine)]
    for layer in model.layers:
        layer.forward = partial(_run, layer, *compiled)
    try:
        with torch.inference_mode():
            for num_tokens in TRIED_TOKENS:
                model.encode(*_sample_batch(num_tokens, model.embed_tokens.weight.device))
    except Exception as error:  # the compiler and the programs that it calls raise errors of many kinds
        for layer in model.layers:
            del layer.forward
        reason = summarise_compiler_error(error)
        logger.warning("the layers cannot be compiled, so they run as they are (%s: %s)", type(error).__name__, reason)
        return False
    return True


def _run(
    layer: TransformerLayer, project: Callable, combine: Callable, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed
) -> Tensor:
    return combine(layer, x, layout.attend(*project(layer, x, cos, sin)))


def _sample_batch(num_tokens: list[int], device: torch.device) -> tuple[Tensor, Packed]:
    tokens = [torch.tensor([BOS_IDX, *[5] * (count - 2), EOS_IDX]) for count in num_tokens]
    return to_device(torch.cat(tokens), device), Packed(num_tokens, device)
