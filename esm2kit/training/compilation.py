"""Compiled layers: whether the compiler works on this machine, and what is logged about it."""

import logging

import torch
from torch import nn

from esm2kit.core.process_group import maximum_over_ranks
from esm2kit.models.compiled import summarise_compiler_error
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, TransformerLayer, rotary_tables
from esm2kit.models.packing import Packed

logger = logging.getLogger(__name__)

BACKEND = "inductor"  # torch.compile's default
# Tokens of the sequences of the trial. A number of rows that equals a dimension of the model, such as 32 or 64, would
# be compiled as the same number, and the first update would compile again: 41 is a prime and a dimension of no model.
TRIED_TOKENS = (29, 12)


def compile_layers(esm2: ESM2, precision: str, device: torch.device) -> bool:
    """Compile the layers of a model, or log in one line that the compiler does not work here.

    Layers are compiled during the first updates. All of them share the compiled code, which works for every number of
    tokens. A trial on one layer decides first whether the compiler works, and all ranks take the same decision.

    Args:
        esm2: The model, sharded or not.
        precision: The resolved precision.
        device: The device of this rank.

    Returns:
        Whether the layers are compiled.
    """
    logger.info(
        "compiling the layers with torch.compile: the first updates take longer, by seconds to minutes, and later ones "
        "less time; --compile false leaves it out"
    )
    problem = find_compiler_problem(esm2.config, precision, device)
    if maximum_over_ranks(torch.tensor(float(problem is not None), device=device)).item():
        logger.warning(
            "torch.compile does not work here (%s); the run continues without it. --compile false skips this attempt",
            problem or "on another rank",
        )
        return False
    for layer in esm2.layers:
        layer.compile(dynamic=True, backend=BACKEND)
    return True


def find_compiler_problem(config: ESM2Config, precision: str, device: torch.device) -> str | None:
    """Compile one layer with its backward pass. It has the size of the model, so that the run reuses the compiled code.

    Args:
        config: Architecture of the model.
        precision: The resolved precision.
        device: The device of this rank.

    Returns:
        What the compiler reported, or None if it worked.
    """
    with torch.device("meta"):
        layer = TransformerLayer(config)
    # without random numbers, so that the trial does not change those of the run
    layer = layer.to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.zeros_(tensor)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    layer.to(dtype)
    layer.compile(dynamic=True, backend=BACKEND)
    packed = Packed(TRIED_TOKENS, device)
    cos, sin = rotary_tables(layer.self_attn.rot_emb.inv_freq, packed.max_tokens)
    x_ND = torch.zeros(packed.num_rows, config.embed_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            layer(x_ND, cos[packed.position_N], sin[packed.position_N], packed).sum().backward()
    except Exception as error:  # compilers and their backends raise exceptions of many types
        torch.compiler.reset()
        return summarise_compiler_error(error)
    return None
