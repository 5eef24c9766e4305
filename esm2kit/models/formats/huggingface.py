"""Read and write EsmForMaskedLM folders of Hugging Face without loss.

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
# transformers stores one table of rotary frequencies per model, older checkpoints and fair-esm one per layer
HF_INV_FREQ = "esm.rotary_embeddings.inv_freq"
# names in files that save_pretrained of transformers 5 writes: the table (with a literal *), and LayerNorm parameters
HF_STARRED_INV_FREQ = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"
HF_LEGACY = {".gamma": ".weight", ".beta": ".bias"}
HF_LAYER_INV_FREQ = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
# learned positions and pooler: present in some files, not used by ESM-2
HF_UNUSED = re.compile(r"esm\.(embeddings\.position_(ids|embeddings\.weight)|pooler\..*)$")


def map_names(num_layers: int) -> dict[str, str]:
    """Map fair-esm's tensor names to transformers'.

    Args:
        num_layers: transformer layers of the model.

    Returns:
        fair-esm's name -> transformers' name, without rotary frequencies and the tied output matrix.
    """
    parts = dict(PARTS)
    for layer in range(num_layers):
        parts |= {f"layers.{layer}.{fair}": f"esm.encoder.layer.{layer}.{hf}" for fair, hf in LAYER_PARTS.items()}
    names = {f"{fair}.{kind}": f"{hf}.{kind}" for fair, hf in parts.items() for kind in ("weight", "bias")}
    names.pop("embed_tokens.bias")
    names["lm_head.bias"] = "lm_head.bias"
    return names


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
    renamed = {hf: state[fair] for fair, hf in map_names(config.num_layers).items()}
    # one table per layer as in Meta's files on the hub, which older transformers and other engines require
    return renamed | {HF_LAYER_INV_FREQ.format(layer): inv_freq_P for layer, inv_freq_P in enumerate(frequencies)}


def from_hf(state: State, config: ESM2Config, source: Path | str) -> State:
    """Convert a state dict to fair-esm's names; a missing contact head and rotary frequencies get their defaults.

    Args:
        state: the tensors of an EsmForMaskedLM. An EsmModel is rejected because it has no LM head.
        config: the model's configuration.
        source: the file or folder, for the message.

    Returns:
        Tensors under fair-esm's names.

    Raises:
        InputError: a tensor is missing or unknown, or the LM head is not tied to the embedding.
    """
    state = {_modernise_name(name): tensor for name, tensor in state.items() if not HF_UNUSED.match(name)}
    decoder = state.pop("lm_head.decoder.weight", None)
    state.pop("lm_head.decoder.bias", None)
    found: State = {}
    for fair, hf in map_names(config.num_layers).items():
        if hf in state:
            found[fair] = state.pop(hf)
        elif not fair.startswith(CONTACT_HEAD):
            raise InputError(
                f"{source}: tensor '{hf}' is missing. Use an EsmForMaskedLM checkpoint of ESM-2.",
                code="checkpoint.tensor",
                name=hf,
                found=None,
            )
    shared = state.pop(HF_INV_FREQ, None)
    for layer in range(config.num_layers):
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
    if decoder is not None and not torch.equal(decoder, found["embed_tokens.weight"]):
        raise InputError(
            f"{source}: this is not an ESM-2: the matrix of its LM head differs from the token embedding.",
            code="checkpoint.not-esm2",
            path=source,
            name="lm_head.decoder.weight",
        )
    return add_missing_tensors(config, found)


def _modernise_name(name: str) -> str:
    """Convert a tensor name of a file to the name of transformers' modules."""
    if name == HF_STARRED_INV_FREQ:
        return HF_INV_FREQ
    for legacy, modern in HF_LEGACY.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + modern
    return name


def build_hf_config(config: ESM2Config) -> dict[str, Any]:
    """Build the content of transformers' config.json.

    Args:
        config: the model's configuration.

    Returns:
        Values that JSON can hold.
    """
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
    """Read a configuration from the content of transformers' config.json.

    Args:
        found: the content.
        source: the file, for the message.

    Returns:
        The model's configuration.

    Raises:
        InputError: the model is not an ESM-2.
    """
    required = {"model_type": "esm", "position_embedding_type": "rotary", "vocab_size": VOCAB_SIZE}
    for name, value in required.items():
        if found.get(name) != value:
            raise InputError(
                f"{source}: this is not an ESM-2: {name} is {found.get(name)!r}, expected {value!r}.",
                code="checkpoint.not-esm2",
                path=source,
                name=name,
                found=found.get(name),
            )
    if found.get("is_folding_model") or found.get("emb_layer_norm_before"):
        raise InputError(
            f"{source}: this is not an ESM-2 language model but a folding model or one with emb_layer_norm_before.",
            code="checkpoint.not-esm2",
            path=source,
            name="is_folding_model",
        )
    config = ESM2Config(
        found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"], bool(found.get("token_dropout"))
    )
    if found.get("intermediate_size") != config.ffn_dim:
        raise InputError(
            f"{source}: this is not an ESM-2: intermediate_size is {found.get('intermediate_size')}, expected "
            f"{config.ffn_dim}.",
            code="checkpoint.not-esm2",
            path=source,
            name="intermediate_size",
            found=found.get("intermediate_size"),
        )
    return config


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
        part.write_text("\n".join(TOKENS))
    save_tensors(folder / "model.safetensors", to_hf(model.state_dict(), model.config), {"format": "pt"})
    write_json(folder / "config.json", build_hf_config(model.config))


def list_files(folder: Path) -> list[Path]:
    """Return the files that the model's digest covers."""
    return weight_files(folder)


def read_config(folder: Path) -> ESM2Config:
    """Read the configuration from config.json; raises as `read`."""
    try:
        config = config_from_hf(json.loads((folder / "config.json").read_text()), folder / "config.json")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(
            f"{folder}: config.json cannot be read as that of a Hugging Face model ({error}). Download it again.",
            code="checkpoint.config",
            path=folder,
        ) from None
    check_file_size(config, weight_files(folder))
    return config


def read(folder: Path) -> tuple[ESM2Config, State]:
    """Read a Hugging Face folder: config.json with model.safetensors or pytorch_model.bin, as one file or shards.

    Args:
        folder: the folder.

    Returns:
        The model's configuration, and its tensors under fair-esm's names.

    Raises:
        InputError: files are missing or damaged, or the model is not an ESM-2.
    """
    config, files = read_config(folder), weight_files(folder)
    if len(files) == 1 and files[0].suffix == ".safetensors":
        state = read_safetensors(files[0])
    elif files[0].suffix == ".safetensors":
        shards = open_safetensors(folder, files)
        state = {name: shards.read(name) for name in shards.shapes}
    else:
        state = {name: tensor for file in files for name, tensor in check_tensors(read_pickle(file), file).items()}
    return config, from_hf(state, config, folder)
