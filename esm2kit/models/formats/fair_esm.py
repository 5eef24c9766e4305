"""fair-esm's .pt files, read and written.

Source: fair-esm 2.0.0 `pretrained._load_model_and_alphabet_core_v2`.
"""

import logging
import re
from argparse import Namespace
from pathlib import Path

import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.models.checkpoint import refuse_larger
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.common import CONTACT_HEAD, _plain, build, defaults, read_pickle

logger = logging.getLogger(__name__)


def load_fair_esm(path: Path) -> ESM2:
    """The ESM-2 in fair-esm's .pt; the contact head comes from `<name>-contact-regression.pt` beside it, if there.

    Without that file the contact head is zero and every contact probability 0.5, and a log line says so.
    Raises: InputError if it holds code, is damaged, or is another model (ESM-1b, MSA Transformer ...).
    """
    path = Path(path)
    data = read_pickle(path)
    try:
        shape = data["cfg"]["model"]
        config = ESM2Config(
            shape.encoder_layers, shape.encoder_embed_dim, shape.encoder_attention_heads, bool(shape.token_dropout)
        )
        state = data["model"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: a .pt file, but not fair-esm's ESM-2 (no cfg.model in it); only ESM-2 is read"
        ) from None
    refuse_larger(config, [path])
    state = {
        re.sub(r"^encoder\.(sentence_encoder\.)?", "", name): tensor for name, tensor in _plain(state, path).items()
    }
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        found = read_pickle(regression)
        state |= _plain(found.get("model") if isinstance(found, dict) else found, regression)
    elif not any(name.startswith(CONTACT_HEAD) for name in state):
        logger.warning("%s has no %s beside it: contacts will be 0.5 everywhere", path.name, regression.name)
    contact_head, inv_freq_P = defaults(config)
    state = contact_head | state
    for layer in range(config.num_layers):
        state.setdefault(f"layers.{layer}.self_attn.rot_emb.inv_freq", inv_freq_P)
    state.setdefault("lm_head.weight", state.get("embed_tokens.weight"))
    return build(config, {name: tensor for name, tensor in state.items() if tensor is not None}, path)


def save_fair_esm(model: ESM2, path: Path) -> None:
    """Write `<name>.pt` and `<name>-contact-regression.pt`, as fair-esm's `load_model_and_alphabet_local` wants them.

    Raises: InputError if the name does not begin with esm2: fair-esm takes any other for an ESM-1.
    """
    path = Path(path)
    if not path.name.startswith("esm2") or path.suffix != ".pt":
        raise InputError(f"{path}: fair-esm knows an ESM-2 by its file's name; call it esm2_....pt")
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
    # the model last: it alone would be read as one without contacts
    with atomic_path(path.with_name(f"{path.stem}-contact-regression.pt")) as part:
        torch.save({"model": contact}, part)
    with atomic_path(path) as part:
        torch.save({"cfg": {"model": shape}, "model": prefixed}, part)
