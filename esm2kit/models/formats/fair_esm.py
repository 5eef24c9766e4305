"""Read and write fair-esm's .pt files.

Source: fair-esm 2.0.0 `pretrained._load_model_and_alphabet_core_v2`.
"""

import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.models.checkpoint import check_file_size
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, RotaryEmbedding
from esm2kit.models.formats.readers import State, check_tensors, read_pickle

logger = logging.getLogger(__name__)
CONTACT_HEAD = "contact_head.regression."


def list_files(path: Path) -> list[Path]:
    """Return the files that the model's digest covers."""
    return [path]


def read_config(path: Path) -> ESM2Config:
    """Read the configuration without reading tensors, which are memory-mapped; raises as `read`."""
    return _open(path)[0]


def read(path: Path) -> tuple[ESM2Config, State]:
    """Read a fair-esm .pt file, with the contact head from `<name>-contact-regression.pt` in the same folder.

    If that file does not exist, the contact head is zero and predicts 0.5 for every pair; a warning is logged.

    Args:
        path: the .pt file.

    Returns:
        The model's configuration, and its tensors under fair-esm's names.

    Raises:
        InputError: the file is damaged, contains code, or is another model (ESM-1b, MSA Transformer ...).
    """
    config, found = _open(path)
    state = {
        re.sub(r"^encoder\.(sentence_encoder\.)?", "", name): tensor
        for name, tensor in check_tensors(found, path).items()
    }
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        head = read_pickle(regression)
        state |= check_tensors(head.get("model") if isinstance(head, dict) else head, regression)
    elif not any(name.startswith(CONTACT_HEAD) for name in state):
        logger.warning(
            "%s: %s was not found in the same folder. All contact probabilities will be 0.5.",
            path.name,
            regression.name,
        )
    return config, add_missing_tensors(config, state)


def _open(path: Path) -> tuple[ESM2Config, Any]:
    """Return the configuration and the unchecked content of `model`."""
    data = read_pickle(path)
    try:
        shape = data["cfg"]["model"]
        config = ESM2Config(
            shape.encoder_layers, shape.encoder_embed_dim, shape.encoder_attention_heads, bool(shape.token_dropout)
        )
        state = data["model"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: this .pt file is not an ESM-2 of fair-esm: cfg.model is incomplete. Only ESM-2 is supported.",
            code="checkpoint.not-esm2",
            path=path,
        ) from None
    check_file_size(config, [path])
    return config, state


def add_missing_tensors(config: ESM2Config, state: State) -> State:
    """Add tensors that files may omit: contact head (zeros), rotary frequencies, and the tied output matrix.

    Args:
        config: the model's configuration.
        state: tensors under fair-esm's names.

    Returns:
        The tensors with the defaults added.
    """
    inv_freq_P = RotaryEmbedding(config.head_dim).inv_freq
    inputs = config.num_layers * config.attention_heads
    defaults = {f"{CONTACT_HEAD}weight": torch.zeros(1, inputs), f"{CONTACT_HEAD}bias": torch.zeros(1)}
    defaults |= {f"layers.{layer}.self_attn.rot_emb.inv_freq": inv_freq_P for layer in range(config.num_layers)}
    if "embed_tokens.weight" in state:
        defaults["lm_head.weight"] = state["embed_tokens.weight"]
    return defaults | state


def save_fair_esm(model: ESM2, path: Path) -> None:
    """Write `<name>.pt` and `<name>-contact-regression.pt` for fair-esm's `load_model_and_alphabet_local`.

    Args:
        model: any ESM-2.
        path: the .pt file.

    Raises:
        InputError: the file name does not start with esm2, so fair-esm would read it as an ESM-1.
    """
    path = Path(path)
    if not path.name.startswith("esm2") or path.suffix != ".pt":
        raise InputError(
            f"{path}: fair-esm recognises an ESM-2 by its file name. Choose a name such as esm2_custom.pt.",
            code="export.name",
            path=path,
        )
    config = model.config
    shape = Namespace(
        arch="esm2",
        encoder_layers=config.num_layers,
        encoder_embed_dim=config.embed_dim,
        encoder_attention_heads=config.attention_heads,
        token_dropout=config.token_dropout,
    )
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    contact = {name: state.pop(name).clone() for name in list(state) if name.startswith(CONTACT_HEAD)}
    prefixed = {
        f"encoder.{name}" if name.startswith("lm_head.") else f"encoder.sentence_encoder.{name}": tensor
        for name, tensor in state.items()
    }
    # The model is written last: without the other file it would be read as a model without contact head.
    with atomic_path(path.with_name(f"{path.stem}-contact-regression.pt")) as part:
        torch.save({"model": contact}, part)
    with atomic_path(path) as part:
        torch.save({"cfg": {"model": shape}, "model": prefixed}, part)
