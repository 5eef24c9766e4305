"""Hugging Face's EsmForMaskedLM folders, read and written, nothing lost.

Source: transformers `models/esm/modeling_esm.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, write_json
from esm2kit.models.checkpoint import check_file_size, save_tensors
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.fair_esm import CONTACT_HEAD, add_missing_tensors
from esm2kit.models.formats.readers import State, check_tensors, read_pickle, read_safetensors
from esm2kit.models.formats.shards import open_safetensors, weight_files
from esm2kit.sequences.alphabet import MASK_IDX, PAD_IDX, TOKENS, VOCAB_SIZE

# fair-esm's name of a part -> transformers'; what follows (`.weight`, `.bias`) is the same in both.
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
# transformers keeps one table of rotary frequencies a model, older checkpoints one a layer; fair-esm one a layer
HF_INV_FREQ = "esm.rotary_embeddings.inv_freq"
# what save_pretrained of transformers 5 calls these: that table, star and all, and a LayerNorm's two tensors
HF_STARRED_INV_FREQ = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"
HF_LEGACY = {".gamma": ".weight", ".beta": ".bias"}
HF_LAYER_INV_FREQ = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
# learned positions and pooler: in some files, used by no ESM-2
HF_UNUSED = re.compile(r"esm\.(embeddings\.position_(ids|embeddings\.weight)|pooler\..*)$")


def map_names(num_layers: int) -> dict[str, str]:
    """fair-esm's name -> transformers' name of every tensor both keep, the tied output matrix aside."""
    parts = dict(PARTS)
    for layer in range(num_layers):
        parts |= {
            f"layers.{layer}.{ours}": f"esm.encoder.layer.{layer}.{theirs}" for ours, theirs in LAYER_PARTS.items()
        }
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items() for kind in ("weight", "bias")}
    names.pop("embed_tokens.bias")
    names["lm_head.bias"] = "lm_head.bias"
    return names


def to_hf(state: State, config: ESM2Config) -> State:
    """A state dict under transformers' names, the tied output matrix once."""
    frequencies = [state[f"layers.{layer}.self_attn.rot_emb.inv_freq"] for layer in range(config.num_layers)]
    if any(not torch.equal(own, frequencies[0]) for own in frequencies):
        raise InputError(
            "the layers differ in their rotary frequencies; transformers keeps one table for all",
            code="export.frequencies",
        )
    renamed = {theirs: state[ours] for ours, theirs in map_names(config.num_layers).items()}
    # one a layer, as Meta's files on the hub have them: what older transformers and other engines look for
    return renamed | {HF_LAYER_INV_FREQ.format(layer): own for layer, own in enumerate(frequencies)}


def from_hf(state: State, config: ESM2Config, source: Path | str) -> State:
    """A state dict under fair-esm's names; what a file may leave out (contact head, frequencies) takes its default.

    Args:
        state: EsmForMaskedLM's tensors, or EsmModel's (no `esm.` in front, no LM head: then not enough).
        config: the model's shape.
        source: for the message.
    Raises: InputError for a tensor that ESM-2 does not have, or that is not there.
    """
    state = {_modernise_name(name): tensor for name, tensor in state.items() if not HF_UNUSED.match(name)}
    decoder = state.pop("lm_head.decoder.weight", None)
    state.pop("lm_head.decoder.bias", None)
    found: State = {}
    for ours, theirs in map_names(config.num_layers).items():
        if theirs in state:
            found[ours] = state.pop(theirs)
        elif not ours.startswith(CONTACT_HEAD):
            raise InputError(
                f"{source}: tensor {theirs} is absent; give an EsmForMaskedLM checkpoint of ESM-2",
                code="checkpoint.tensor",
                name=theirs,
                found=None,
            )
    shared = state.pop(HF_INV_FREQ, None)
    for layer in range(config.num_layers):
        own = state.pop(HF_LAYER_INV_FREQ.format(layer), shared)
        if own is not None:
            found[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = own
    if state:
        raise InputError(
            f"{source}: tensor {sorted(state)[0]} is none of ESM-2's; give an ESM-2 checkpoint",
            code="checkpoint.tensor",
            name=min(state),
            expected=None,
        )
    if decoder is not None and not torch.equal(decoder, found["embed_tokens.weight"]):
        raise InputError(
            f"{source}: the LM head's matrix is not the token embedding, as it is in ESM-2: another model",
            code="checkpoint.not-esm2",
            path=source,
            name="lm_head.decoder.weight",
        )
    return add_missing_tensors(config, found)


def _modernise_name(name: str) -> str:
    """A tensor's name as transformers' modules have it, whatever its files call it."""
    if name == HF_STARRED_INV_FREQ:
        return HF_INV_FREQ
    for legacy, modern in HF_LEGACY.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + modern
    return name


def build_hf_config(config: ESM2Config) -> dict[str, Any]:
    """What transformers' config.json says of an ESM-2."""
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.attention_heads,
        "intermediate_size": config.ffn_dim,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 1026,
        "position_embedding_type": "rotary",
        "token_dropout": config.token_dropout,
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": PAD_IDX,
        "mask_token_id": MASK_IDX,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def config_from_hf(found: dict[str, Any], source: Path | str) -> ESM2Config:
    """The shape config.json gives. Raises: InputError if it is not an ESM-2's."""
    wanted = {"model_type": "esm", "position_embedding_type": "rotary", "vocab_size": VOCAB_SIZE}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{source}: {name} is {found.get(name)!r}, ESM-2 has {value!r}: not an ESM-2 model",
                code="checkpoint.not-esm2",
                path=source,
                name=name,
                found=found.get(name),
            )
    if found.get("is_folding_model") or found.get("emb_layer_norm_before"):
        raise InputError(
            f"{source}: a folding model or one with an early LayerNorm, not an ESM-2 language model",
            code="checkpoint.not-esm2",
            path=source,
            name="is_folding_model",
        )
    config = ESM2Config(
        found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"], bool(found.get("token_dropout"))
    )
    if found.get("intermediate_size") != config.ffn_dim:
        raise InputError(
            f"{source}: intermediate_size is {found.get('intermediate_size')}, ESM-2 has {config.ffn_dim}",
            code="checkpoint.not-esm2",
            path=source,
            name="intermediate_size",
            found=found.get("intermediate_size"),
        )
    return config


def save_hf(model: ESM2, folder: Path) -> None:
    """Write a folder that `AutoModelForMaskedLM.from_pretrained` and `AutoTokenizer.from_pretrained` open.

    Args:
        model: any ESM-2.
        folder: gets model.safetensors, config.json, vocab.txt, tokenizer_config.json, special_tokens_map.json.
    """
    folder = Path(folder)
    special = {"unk": "<unk>", "cls": "<cls>", "pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}
    special_map = {f"{kind}_token": token for kind, token in special.items()}
    write_json(
        folder / "tokenizer_config.json", special_map | {"tokenizer_class": "EsmTokenizer", "model_max_length": 1024}
    )
    write_json(folder / "special_tokens_map.json", special_map)
    with atomic_path(folder / "vocab.txt") as part:
        part.write_text("\n".join(TOKENS))
    save_tensors(folder / "model.safetensors", to_hf(model.state_dict(), model.config), {"format": "pt"})
    write_json(folder / "config.json", build_hf_config(model.config))


def list_files(folder: Path) -> list[Path]:
    """The files a model's digest is taken of."""
    return weight_files(folder)


def read_config(folder: Path) -> ESM2Config:
    """The shape that a Hugging Face folder's config.json gives; raises as `read`."""
    try:
        config = config_from_hf(json.loads((folder / "config.json").read_text()), folder / "config.json")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(
            f"{folder}: no readable config.json of a Hugging Face model ({error})",
            code="checkpoint.config",
            path=folder,
        ) from None
    check_file_size(config, weight_files(folder))
    return config


def read(folder: Path) -> tuple[ESM2Config, State]:
    """Read a Hugging Face folder: config.json with model.safetensors or pytorch_model.bin, whole or sharded.

    Returns:
        The model's shape, and its tensors under fair-esm's names.

    Raises:
        InputError: files are missing or damaged, or the model is not an ESM-2.
    """
    config, parts = read_config(folder), weight_files(folder)
    if len(parts) == 1 and parts[0].suffix == ".safetensors":
        state = read_safetensors(parts[0])
    elif parts[0].suffix == ".safetensors":
        shards = open_safetensors(folder, parts)
        state = {name: shards.read(name) for name in shards.shapes}
    else:
        state = {name: tensor for file in parts for name, tensor in check_tensors(read_pickle(file), file).items()}
    return config, from_hf(state, config, folder)
