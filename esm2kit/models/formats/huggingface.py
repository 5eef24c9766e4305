"""Read and write EsmForMaskedLM folders of Hugging Face without loss.

Source: transformers `models/esm/modeling_esm.py`.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, write_json
from esm2kit.models.checkpoint import check_file_size, save_tensors
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, ROPE_THETA, RotaryEmbedding
from esm2kit.models.formats.fair_esm import CONTACT_HEAD, EMBEDDING, add_missing_tensors
from esm2kit.models.formats.hf_config import HfConfig, build_hf_config, read_hf_config
from esm2kit.models.formats.readers import (
    ADAPTER_CONFIG,
    State,
    check_tensors,
    clean_names,
    raise_adapter,
    read_pickle,
    unwrap,
)
from esm2kit.models.formats.shards import open_safetensors, weight_files
from esm2kit.sequences.alphabet import TOKENS

logger = logging.getLogger(__name__)

# fair-esm's module name -> transformers' module name. Parameter names (`.weight`, `.bias`) are the same in both.
PARTS = {
    "embed_tokens": "esm.embeddings.word_embeddings",
    "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "contact_head.regression": "esm.contact_head.regression",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
}
LAYER_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
HF_EMBEDDING = "embeddings.word_embeddings.weight"
# transformers stores one table of rotary frequencies per model, older checkpoints and fair-esm one per layer
HF_INV_FREQ = "esm.rotary_embeddings.inv_freq"
# names in files that save_pretrained of transformers 5 writes: the table (with a literal *), and LayerNorm parameters
HF_STARRED_INV_FREQ = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"
HF_LEGACY = {".gamma": ".weight", ".beta": ".bias"}
HF_LAYER_INV_FREQ = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
# learned positions and pooler: present in some files, not used by ESM-2
HF_UNUSED = re.compile(r"esm\.(embeddings\.position_(ids|embeddings\.weight)|pooler\..*)$")


def map_names(config: ESM2Config) -> dict[str, str]:
    """Map fair-esm's tensor names to transformers'.

    Args:
        config: the model's configuration.

    Returns:
        fair-esm's name -> transformers' name, without rotary frequencies and the tied output matrix.
    """
    parts = dict(PARTS)
    for layer in range(config.num_layers):
        parts |= {f"layers.{layer}.{fair}": f"esm.encoder.layer.{layer}.{hf}" for fair, hf in LAYER_PARTS.items()}
    names = {f"{fair}.{kind}": f"{hf}.{kind}" for fair, hf in parts.items() for kind in ("weight", "bias")}
    names.pop("embed_tokens.bias")
    names["lm_head.bias"] = "lm_head.bias"
    return {fair: hf for fair, hf in names.items() if config.lm_head or not fair.startswith("lm_head.")}


def to_hf(state: State, config: ESM2Config) -> State:
    """Convert a state dict to transformers' names.

    Args:
        state: tensors under fair-esm's names.
        config: the model's configuration.

    Returns:
        Tensors under transformers' names, without the tied output matrix.

    Raises:
        InputError: the layers have different rotary frequencies.
    """
    frequencies = [state[f"layers.{layer}.self_attn.rot_emb.inv_freq"] for layer in range(config.num_layers)]
    if any(not torch.equal(inv_freq_P, frequencies[0]) for inv_freq_P in frequencies):
        raise InputError(
            "the layers have different rotary frequencies, but transformers supports only one table for all layers.",
            code="export.frequencies",
        )
    renamed = {hf: state[fair] for fair, hf in map_names(config).items()}
    # one table per layer as in Meta's files on the hub, which older transformers and other engines require
    return renamed | {HF_LAYER_INV_FREQ.format(layer): inv_freq_P for layer, inv_freq_P in enumerate(frequencies)}


def from_hf(state: State, config: HfConfig, source: Path | str) -> State:
    """Convert a state dict to fair-esm's names; a missing contact head and rotary frequencies get their defaults.

    Tensors of wrappers' names are read, as DataParallel, Lightning and torch.compile save them. Tensors that are not
    part of the encoder or the LM head, such as a classifier, are not used.

    Args:
        state: the tensors of an EsmForMaskedLM, an EsmModel, or a model with another head.
        config: the configuration.
        source: the file or folder, for the message.

    Returns:
        Tensors under fair-esm's names.

    Raises:
        InputError: a tensor is missing or unknown, or the LM head is not tied to the embedding.
    """
    found, decoder = _rename(state, config, source)
    if decoder is not None:
        _check_tied(decoder, found[EMBEDDING], source)
    return add_missing_tensors(config.model, _default_tensors(config) | found)


def _check_tied(decoder: Tensor, embedding: Tensor, source: Path | str) -> None:
    """Check that the matrix of the LM head is the token embedding."""
    if not torch.equal(decoder, embedding):
        raise InputError(
            f"{source}: this is not an ESM-2: the matrix of its LM head differs from the token embedding.",
            code="checkpoint.not-esm2",
            path=source,
            name="lm_head.decoder.weight",
        )


def _rename(state: dict[str, Any], config: HfConfig, source: Path | str) -> tuple[dict[str, Any], Any]:
    """Give the tensors of a file, or the functions that read them, fair-esm's names.

    Args:
        state: as for `from_hf`; the values are not used.
        config: the configuration.
        source: the file or folder, for the message.

    Returns:
        The tensors of the encoder and its LM head, and the untied matrix of the LM head, or None.

    Raises:
        InputError: a tensor is missing or unknown.
    """
    names = find_names(state, source)
    others = sorted(state.keys() - names.keys())
    if others:
        logger.info("%s: %d tensors outside the encoder are not used, such as %s", source, len(others), others[0])
    state = {names[name]: tensor for name, tensor in state.items() if name in names}
    decoder = state.pop("lm_head.decoder.weight", None)
    state.pop("lm_head.decoder.bias", None)
    if not config.model.lm_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
    found: dict[str, Any] = {}
    for fair, hf in map_names(config.model).items():
        if hf in state:
            found[fair] = state.pop(hf)
        elif not fair.startswith(CONTACT_HEAD):
            raise InputError(
                f"{source}: tensor '{hf}' is missing. Download the checkpoint again.",
                code="checkpoint.tensor",
                name=hf,
                found=None,
            )
    shared = state.pop(HF_INV_FREQ, None)
    for layer in range(config.model.num_layers):
        inv_freq_P = state.pop(HF_LAYER_INV_FREQ.format(layer), shared)
        if inv_freq_P is not None:
            found[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = inv_freq_P
    if state:
        raise InputError(
            f"{source}: ESM-2 has no tensor '{min(state)}'. Use an ESM-2 checkpoint.",
            code="checkpoint.tensor",
            name=min(state),
            expected=None,
        )
    return found, decoder if config.model.lm_head else None


def _default_tensors(config: HfConfig) -> State:
    """Return the tensors that files may omit: contact head, and rotary frequencies of the configuration's base."""
    defaults = add_missing_tensors(config.model, {})
    if config.rope_theta != ROPE_THETA:
        inv_freq_P = RotaryEmbedding(config.model.head_dim, config.rope_theta).inv_freq
        defaults |= {name: inv_freq_P for name in defaults if name.endswith("inv_freq")}
    return defaults


def find_names(names: Iterable[str], source: Path | str) -> dict[str, str]:
    """Find the tensors of the encoder and of its LM head.

    Args:
        names: tensor names of a file.
        source: the file or folder, for the message.

    Returns:
        Name in the file -> transformers' name in an EsmForMaskedLM; without tensors that ESM-2 does not use.

    Raises:
        InputError: the names are not those of one ESM-2.
    """
    cleaned, encoder = clean_names(names, HF_EMBEDDING, source)
    lm_head = f"{encoder.removesuffix('esm.')}lm_head."
    found = {}
    for name, clean in cleaned.items():
        if clean.startswith(lm_head):
            found[name] = _modernise_name(f"lm_head.{clean.removeprefix(lm_head)}")
        elif clean.startswith(encoder):
            found[name] = _modernise_name(f"esm.{clean.removeprefix(encoder)}")
    return {name: modern for name, modern in found.items() if not HF_UNUSED.match(modern)}


def _modernise_name(name: str) -> str:
    """Convert a tensor name of a file to the name of transformers' modules."""
    if name == HF_STARRED_INV_FREQ:
        return HF_INV_FREQ
    for legacy, modern in HF_LEGACY.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + modern
    return name


def save_hf(model: ESM2, folder: Path) -> None:
    """Write a folder for `AutoModelForMaskedLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Args:
        model: any ESM-2.
        folder: the output: model.safetensors, config.json, vocab.txt, tokenizer_config.json, special_tokens_map.json.
    """
    folder = Path(folder)
    special = {"unk": "<unk>", "cls": "<cls>", "pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}
    special_map = {f"{kind}_token": token for kind, token in special.items()}
    write_json(
        folder / "tokenizer_config.json", special_map | {"tokenizer_class": "EsmTokenizer", "model_max_length": 1024}
    )
    write_json(folder / "special_tokens_map.json", special_map)
    with atomic_path(folder / "vocab.txt") as part:
        part.write_text("\n".join(TOKENS), encoding="utf-8")
    save_tensors(folder / "model.safetensors", to_hf(model.state_dict(), model.config), {"format": "pt"})
    write_json(folder / "config.json", build_hf_config(model.config))


def list_files(folder: Path) -> list[Path]:
    """Return the files that the model's digest covers."""
    return weight_files(folder)


def read_config(folder: Path) -> ESM2Config:
    """Read the configuration from config.json and the tensors' names; raises as `read`."""
    return _open(folder)[0].model


def read_untrained_config(folder: Path) -> ESM2Config:
    """Read the configuration of a model without its weights; the tensors' names are used if they are there.

    Args:
        folder: the folder with config.json.

    Returns:
        The configuration.

    Raises:
        InputError: config.json is not that of an ESM-2, or weights exist and are damaged.
    """
    try:
        weight_files(folder)
    except InputError as error:
        if error.code != "checkpoint.no-weights":
            raise
        return read_hf_config(folder).model
    return read_config(folder)


def _open(folder: Path) -> tuple[HfConfig, dict[str, Callable[[], Tensor]]]:
    """Return the configuration, and for every tensor of the folder a function that reads it."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise_adapter(folder, ADAPTER_CONFIG)
    config, files = read_hf_config(folder), weight_files(folder)
    check_file_size(config.model, files)
    tensors = _find_tensors(folder, files)
    has_head = any(name.startswith("lm_head.") for name in find_names(tensors, folder).values())
    if has_head and not config.tied:
        logger.warning("%s: the LM head is not used, because tie_word_embeddings is false.", folder)
    model = replace(config.model, lm_head=has_head and config.tied)
    return config._replace(model=model), tensors


def open_tensors(folder: Path) -> tuple[ESM2Config, Callable[[Iterable[str]], State]]:
    """Open a folder as for `read`, to read its tensors when they are used; see `checkpoint.open_tensors`."""
    config, tensors = _open(folder)
    names, decoder = _rename({name: name for name in tensors}, config, folder)
    if decoder is not None:
        _check_tied(tensors[decoder](), tensors[names[EMBEDDING]](), folder)
    del tensors
    defaults, files = _default_tensors(config), weight_files(folder)

    def read_names(wanted: Iterable[str]) -> State:
        tensors = _find_tensors(folder, files)  # not kept, as those of pickles keep their file mapped
        sources = {name: EMBEDDING if name == "lm_head.weight" else name for name in wanted}
        found = {name: tensors[names[source]]() for name, source in sources.items() if source in names}
        return {name: defaults[name] for name in sources if name in defaults} | found

    return config.model, read_names


def _find_tensors(folder: Path, files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """Return for every tensor of the files a function that reads it; those of pickles are memory-mapped already."""
    if files[0].suffix == ".safetensors":
        shards = open_safetensors(folder, files)
        return {name: partial(shards.read, name) for name in shards.shapes}
    tensors: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        found = check_tensors(unwrap(read_pickle(file)), file)
        tensors |= {name: partial(_identity, tensor) for name, tensor in found.items()}
    return tensors


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def read(folder: Path) -> tuple[ESM2Config, State]:
    """Read a Hugging Face folder: config.json with model.safetensors or pytorch_model.bin, as one file or shards.

    Args:
        folder: the folder of an EsmForMaskedLM, an EsmModel, or a model with another head. Without LM head, the
            configuration has `lm_head` False.

    Returns:
        The model's configuration, and its tensors under fair-esm's names.

    Raises:
        InputError: files are missing or damaged, or the model is not an ESM-2.
    """
    config, tensors = _open(folder)
    return config.model, from_hf({name: read_tensor() for name, read_tensor in tensors.items()}, config, folder)
