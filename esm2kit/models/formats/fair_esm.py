"""Read and write fair-esm's .pt files.

Source: fair-esm 2.0.0 `pretrained._load_model_and_alphabet_core_v2`.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.models.checkpoint import check_file_size
from esm2kit.models.config import ESM2Config, check_lm_head
from esm2kit.models.esm2 import ESM2, RotaryEmbedding
from esm2kit.models.formats.readers import State, check_no_adapters, check_tensors, clean_names, read_pickle, unwrap

logger = logging.getLogger(__name__)
CONTACT_HEAD = "contact_head.regression."
EMBEDDING = "embed_tokens.weight"
# The constant of fair-esm's LayerNorm, which its files do not store.
LAYER_NORM_EPS = 1e-5


def list_files(path: Path) -> list[Path]:
    """Return the files that the model's digest covers."""
    return [path]


def read_config(path: Path) -> ESM2Config:
    """Read the configuration without reading tensors, which are memory-mapped; raises as `read`."""
    return _open(path)[0]


def read(path: Path) -> tuple[ESM2Config, State]:
    """Read a fair-esm .pt file, with the contact head from `<name>-contact-regression.pt` in the same folder.

    If that file does not exist, the contact head is zero and predicts 0.5 for every pair; a warning is logged. A
    trainer's file with the state_dict of a fair-esm model is read too, such as one of Lightning.

    Args:
        path: the file.

    Returns:
        The model's configuration, and its tensors under fair-esm's names.

    Raises:
        InputError: the file is damaged, contains code, or is another model (ESM-1b, MSA Transformer ...).
    """
    config, state = _open(path)
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


def open_tensors(path: Path) -> tuple[ESM2Config, Callable[[Iterable[str]], State]]:
    """Open a file as for `read`, to read its tensors when they are used; see `checkpoint.open_tensors`."""
    config, state = read(path)
    # the contact head may be in a second file, and is small
    small = {name: tensor.clone() for name, tensor in state.items() if name.startswith(CONTACT_HEAD)}
    del state

    def read_names(wanted: Iterable[str]) -> State:
        state = add_missing_tensors(config, _open(path)[1]) | small  # memory-mapped
        return {name: state[name] for name in wanted if name in state}

    return config, read_names


def _open(path: Path) -> tuple[ESM2Config, State]:
    """Return the configuration and the memory-mapped tensors under fair-esm's names."""
    data = read_pickle(path)
    settings = data.get("cfg", {}) if isinstance(data, dict) else {}
    if isinstance(data, dict) and "args" in data and not settings:
        _raise_not_esm2(path, "args")
    config = None
    if settings:
        try:
            shape = settings["model"]
            config = ESM2Config(
                shape.encoder_layers, shape.encoder_embed_dim, shape.encoder_attention_heads, bool(shape.token_dropout)
            )
        except (KeyError, TypeError, AttributeError):
            _raise_not_esm2(path, "cfg.model")
    found = check_tensors(unwrap(data), path)
    if config is None:
        _check_names(found, path)
    names = _find_names(found, path)
    state = {fair: found[name] for name, fair in names.items()}
    if config is None:  # fair-esm's ESM2 has one layer_norm_eps, and token_dropout by default
        config = infer_config({name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    check_file_size(config, [path])
    return replace(config, lm_head=any(name.startswith("lm_head.") for name in state)), state


def _raise_not_esm2(path: Path, name: str) -> NoReturn:
    raise InputError(
        f"{path}: this .pt file is not an ESM-2 of fair-esm: its {name} is incomplete or of another model. Only ESM-2 "
        "is supported.",
        code="checkpoint.not-esm2",
        path=path,
        name=name,
    )


def _check_names(names: Collection[str], path: Path) -> None:
    """Check that a state dict without configuration has fair-esm's names, whose settings follow from the shapes."""
    check_no_adapters(names, path)
    if any(name.endswith("embeddings.word_embeddings.weight") for name in names):
        raise InputError(
            f"{path}: these are the tensors of a Hugging Face model without its config.json. Put the file as "
            f"{'model.safetensors' if path.suffix == '.safetensors' else 'pytorch_model.bin'} into a folder with the "
            "model's config.json, and pass the folder.",
            code="checkpoint.no-config",
            path=path,
        )
    if not any(name.endswith(EMBEDDING) for name in names):
        raise InputError(
            f"{path}: this file holds no ESM-2: no tensor is called '{EMBEDDING}'. Save the model's state_dict.",
            code="checkpoint.not-esm2",
            path=path,
            name=EMBEDDING,
        )


def _find_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return fair-esm's name of every tensor of the model by its name in the file."""
    cleaned, _ = clean_names(names, EMBEDDING, path)
    cleaned = {name: re.sub(r"(?<![^.])encoder\.(sentence_encoder\.)?", "", clean) for name, clean in cleaned.items()}
    prefix = next(name for name in cleaned.values() if name.endswith(EMBEDDING)).removesuffix(EMBEDDING)
    return {name: clean.removeprefix(prefix) for name, clean in cleaned.items() if clean.startswith(prefix)}


def infer_config(shapes: Mapping[str, tuple[int, ...]], source: Path) -> ESM2Config:
    """Infer the configuration from tensor shapes; attention heads from rotary frequencies or the contact head.

    Args:
        shapes: fair-esm's name -> shape.
        source: the file or folder, for the message.

    Returns:
        The configuration, with the `token_dropout` and `layer_norm_eps` of every published ESM-2.

    Raises:
        InputError: the shapes are not those of an ESM-2, or do not determine the number of attention heads.
    """
    num_layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(shapes[EMBEDDING]) != 2:
        raise InputError(
            f"{source}: this is not an ESM-2: {EMBEDDING} has shape {shapes[EMBEDDING]}, expected (tokens, embed_dim).",
            code="checkpoint.not-esm2",
            path=source,
            name=EMBEDDING,
            found=shapes[EMBEDDING],
        )
    embed_dim = shapes[EMBEDDING][1]
    frequencies, head = shapes.get("layers.0.self_attn.rot_emb.inv_freq"), shapes.get(f"{CONTACT_HEAD}weight")
    heads = 0
    if frequencies and frequencies[0]:
        heads = embed_dim // (2 * frequencies[0])
    elif head and num_layers:
        heads = head[-1] // num_layers
    if not heads or not num_layers:
        raise InputError(
            f"{source}: the number of attention heads is unknown, because rotary frequencies and contact head are both "
            "missing. Save the complete state_dict.",
            code="checkpoint.heads",
            path=source,
        )
    return ESM2Config(num_layers, embed_dim, heads, lm_head=any(name.startswith("lm_head.") for name in shapes))


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
    if EMBEDDING in state and config.lm_head:
        defaults["lm_head.weight"] = state[EMBEDDING]
    return defaults | state


def save_fair_esm(model: ESM2, path: Path) -> None:
    """Write `<name>.pt` and `<name>-contact-regression.pt` for fair-esm's `load_model_and_alphabet_local`.

    Args:
        model: any ESM-2.
        path: the .pt file.

    Raises:
        InputError: the file name does not start with esm2, so fair-esm would read it as an ESM-1, or the model has no
            LM head or another layer_norm_eps than fair-esm's.
    """
    path = Path(path)
    if not path.name.startswith("esm2") or path.suffix != ".pt":
        raise InputError(
            f"{path}: fair-esm recognises an ESM-2 by its file name. Choose a name such as esm2_custom.pt.",
            code="export.name",
            path=path,
        )
    config = model.config
    check_lm_head(config)
    if config.layer_norm_eps != LAYER_NORM_EPS:
        raise InputError(
            f"fair-esm supports only layer_norm_eps {LAYER_NORM_EPS}, but this model has {config.layer_norm_eps}. "
            "Export it with --format huggingface.",
            code="export.layer-norm-eps",
            found=config.layer_norm_eps,
        )
    # fair-esm reads attributes. Meta's files have an argparse.Namespace here, which torch.load no longer allows by
    # default; an OrderedDict with attributes is allowed.
    shape: OrderedDict[str, object] = OrderedDict()
    shape.__dict__.update(
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
