"""Convert between transformers' config.json of an ESM-2 and `ESM2Config`.

Every field of transformers' EsmConfig is in one of three tables: it is read, it must have one value, or it does not
change the numbers of a model in evaluation. A field that is in none of them is logged.

Source: transformers 5.23 `models/esm/configuration_esm.py`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs
from esm2kit.models.config import ESM2Config
from esm2kit.sequences.alphabet import MASK_IDX, PAD_IDX, TOKENS, VOCAB_SIZE

logger = logging.getLogger(__name__)
# Fields that are read, with transformers' default for a file that lacks them.
READ_FIELDS: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "token_dropout": False,
    "layer_norm_eps": 1e-12,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Fields that change the numbers: the first value is ESM-2's, the others mean the same. A missing field is None, except
# where transformers' default differs.
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("esm",),
    "position_embedding_type": ("rotary",),
    "vocab_size": (VOCAB_SIZE,),
    "pad_token_id": (PAD_IDX, None),
    "mask_token_id": (MASK_IDX, None),
    "vocab_list": (list(TOKENS), None),
    "hidden_act": ("gelu", None),
    "emb_layer_norm_before": (False, None),
    "is_folding_model": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "auto_map": (None,),
}
MISSING_MEANS = {"position_embedding_type": "absolute"}
# Fields without effect in evaluation. Weights of any dtype are computed in float32 unless `precision` says otherwise.
UNUSED_FIELDS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_probs_dropout_prob", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "eos_token_id", "esmfold_config", "finetuning_task",
    "hidden_dropout_prob", "id2label", "initializer_range", "label2id", "max_position_embeddings", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip


class HfConfig(NamedTuple):
    """What config.json says about a model.

    Args:
        model: the model's configuration; whether there is an LM head depends on the tensors.
        rope_theta: base of the rotary frequencies, for files that do not store them.
        tied: whether the LM head's matrix is the token embedding.
    """

    model: ESM2Config
    rope_theta: float
    tied: bool


def build_hf_config(config: ESM2Config) -> dict[str, Any]:
    """Build the content of transformers' config.json.

    Args:
        config: the model's configuration.

    Returns:
        Values that JSON can hold.
    """
    return {
        "architectures": ["EsmForMaskedLM" if config.lm_head else "EsmModel"],
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
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": PAD_IDX,
        "mask_token_id": MASK_IDX,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def read_hf_config(folder: Path) -> HfConfig:
    """Read config.json, and check the tokens of vocab.txt if the folder has one.

    Args:
        folder: a Hugging Face folder.

    Returns:
        The configuration.

    Raises:
        InputError: a file is damaged, or the model is not an ESM-2.
    """
    file = folder / "config.json"
    check_git_lfs(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: config.json cannot be read as that of a Hugging Face model ({error}). Download it again.",
            code="checkpoint.config",
            path=folder,
        ) from None
    if not isinstance(found, dict):
        raise InputError(
            f"{folder}: config.json is not that of a Hugging Face model: it holds a {type(found).__name__}, not named "
            "fields. Download it again.",
            code="checkpoint.config",
            path=folder,
        )
    _check_vocabulary(folder / "vocab.txt")
    return parse_hf_config(found, file)


def parse_hf_config(found: Mapping[str, Any], source: Path | str) -> HfConfig:
    """Read a configuration from the content of transformers' config.json.

    Args:
        found: the content; a missing field has transformers' default.
        source: the file, for the message.

    Returns:
        The configuration.

    Raises:
        InputError: a field has a value that ESM-2 does not have. The message names it.
    """
    for name, allowed in FIXED_FIELDS.items():
        value = found.get(name, MISSING_MEANS.get(name))
        if not any(value == each and type(value) is type(each) for each in allowed):
            _raise_not_esm2(source, name, value, allowed[0])
    values = {name: found.get(name, default) for name, default in READ_FIELDS.items()}
    for name, default in READ_FIELDS.items():
        if type(values[name]) is not type(default) and not (name == "rope_theta" and type(values[name]) is int):
            if name == "token_dropout" and values[name] is None:
                continue
            _raise_not_esm2(source, name, values[name], f"a value such as {default!r}")
    if values["rope_theta"] <= 1:
        _raise_not_esm2(source, "rope_theta", values["rope_theta"], 10000.0)
    unknown = sorted(found.keys() - READ_FIELDS.keys() - FIXED_FIELDS.keys() - UNUSED_FIELDS - {"head_dim"})
    if unknown:
        logger.warning("%s: transformers' ESM-2 has no field %s; not used.", source, ", ".join(unknown))
    config = ESM2Config(
        values["num_hidden_layers"],
        values["hidden_size"],
        values["num_attention_heads"],
        bool(values["token_dropout"]),
        values["layer_norm_eps"],
    )
    if values["intermediate_size"] != config.ffn_dim:
        _raise_not_esm2(source, "intermediate_size", values["intermediate_size"], config.ffn_dim)
    if found.get("head_dim") not in (None, config.head_dim):
        _raise_not_esm2(source, "head_dim", found["head_dim"], config.head_dim)
    return HfConfig(config, float(values["rope_theta"]), values["tie_word_embeddings"])


def _raise_not_esm2(source: Path | str, name: str, value: Any, expected: Any) -> NoReturn:
    expected = expected if isinstance(expected, str) and expected.startswith("a value") else repr(expected)
    raise InputError(
        f"{source}: esm2kit does not support this model: {name} is {value!r:.80}, expected {expected:.80}. Use an "
        "ESM-2 checkpoint.",
        code="checkpoint.not-esm2",
        path=source,
        name=name,
        found=value,
    )


def _check_vocabulary(file: Path) -> None:
    """Check that a folder's vocab.txt, if there is one, lists ESM-2's tokens in ESM-2's order."""
    if not file.is_file():
        return
    tokens = file.read_text(encoding="utf-8", errors="replace").split()
    if tokens != list(TOKENS):
        pairs = zip(tokens, TOKENS, strict=False)
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(tokens), VOCAB_SIZE))
        raise InputError(
            f"{file}: these are not ESM-2's {VOCAB_SIZE} tokens: they differ at token {place}. Use an ESM-2 "
            "checkpoint, or remove a vocab.txt that does not belong to it.",
            code="checkpoint.vocabulary",
            path=file,
            found=place,
        )
