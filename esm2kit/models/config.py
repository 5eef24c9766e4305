"""Configuration of an ESM-2, the six published sizes and their names, and the options of `esm2kit export`.

Does not import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError, check_choices, check_types, suggest_name
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.sequences.alphabet import VOCAB_SIZE


@dataclass(frozen=True)
class ESM2Config:
    """The architecture of an ESM-2.

    Args:
        num_layers: Number of transformer layers.
        embed_dim: Width of a token's vector; a multiple of 2 x attention_heads.
        attention_heads: Attention heads per layer, each with embed_dim / attention_heads channels.
        token_dropout: Set the embedding of <mask> to zero and rescale the other embeddings by the sequence's mask
            ratio, as ESM-2 does.
        layer_norm_eps: Added to the variance in every LayerNorm. ESM-2 has 1e-5; transformers' default is 1e-12.
        lm_head: Whether the model has an LM head. Encoders of other programs may lack it.
    """

    num_layers: int = 33
    embed_dim: int = 1280
    attention_heads: int = 20
    token_dropout: bool = True
    layer_norm_eps: float = 1e-5
    lm_head: bool = True

    def __str__(self) -> str:
        """Describe the shape in words, for messages."""
        others = [f"{each.name} {getattr(self, each.name)}" for each in fields(self)[3:]
                  if getattr(self, each.name) != each.default]  # fmt: skip
        shape = f"{self.num_layers} layers, embed_dim {self.embed_dim}, {self.attention_heads} attention heads"
        return ", ".join([shape, *others])

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.num_layers, self.embed_dim, self.attention_heads) < 1:
            raise InputError(
                f"num_layers, embed_dim and attention_heads must be at least 1, found "
                f"{self.num_layers}, {self.embed_dim} and {self.attention_heads}.",
                code="model.shape",
                found=self,
            )
        if self.embed_dim % (2 * self.attention_heads):
            raise InputError(
                f"embed_dim {self.embed_dim} is not a multiple of 2 x attention_heads ({2 * self.attention_heads}). "
                "Rotary position embeddings require an even number of channels per head.",
                code="model.heads",
                embed_dim=self.embed_dim,
                attention_heads=self.attention_heads,
            )
        if not (0 < self.layer_norm_eps < math.inf):
            raise InputError(
                f"layer_norm_eps must be a positive number, found {self.layer_norm_eps}. ESM-2 has 1e-5.",
                code="model.layer-norm-eps",
                found=self.layer_norm_eps,
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.embed_dim // self.attention_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward network."""
        return 4 * self.embed_dim

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters; counts the tied embedding once and omits the contact head."""
        width, layer = self.embed_dim, 12 * self.embed_dim**2 + 13 * self.embed_dim
        lm_head = width**2 + 3 * width + VOCAB_SIZE if self.lm_head else 0
        return VOCAB_SIZE * width + self.num_layers * layer + 2 * width + lm_head

    def resolve_layers(self, repr_layers: Sequence[int]) -> list[int]:
        """Convert negative layer numbers to positive ones, as for indices of a list.

        Args:
            repr_layers: layer numbers; 0 is the embedding, num_layers or -1 the final layer.

        Returns:
            Layer numbers from 0 to num_layers.

        Raises:
            InputError: the model has no such layer.
        """
        last = self.num_layers
        for layer in repr_layers:
            if not -last - 1 <= layer <= last:
                raise InputError(
                    f"layer {layer} does not exist; this model has layers 0 to {last} (or -{last + 1} to -1).",
                    code="model.layer",
                    found=layer,
                    allowed=last,
                )
        return [layer % (last + 1) for layer in repr_layers]

    def forward_flops(self, num_tokens: Sequence[int], num_logits: int) -> float:
        """Count the floating-point operations of one forward pass: matrix products and attention, without padding.

        A training step costs three times as much.

        Args:
            num_tokens: tokens per sequence, with BOS and EOS.
            num_logits: rows that go through the LM head.

        Returns:
            Floating-point operations, two per multiply-add.
        """
        tokens, squares = sum(num_tokens), sum(count**2 for count in num_tokens)
        layers = self.num_layers * (24 * self.embed_dim**2 * tokens + 4 * self.embed_dim * squares)
        return layers + num_logits * (2 * self.embed_dim**2 + 2 * self.embed_dim * VOCAB_SIZE)


def check_lm_head(config: ESM2Config, source: object = "this model") -> None:
    """Check that a model has an LM head, before logits or masked-language-model training.

    Args:
        config: the model's configuration.
        source: the model's name, for the message.

    Raises:
        InputError: the model has no LM head, or one whose matrix is not tied to the token embedding.
    """
    if not config.lm_head:
        raise InputError(
            f"{source} has no LM head tied to its token embedding, which logits, masked scores and pretraining "
            "require. Use an EsmForMaskedLM checkpoint.",
            code="model.no-lm-head",
            source=str(source),
        )


SIZES = {
    "esm2_t6_8M_UR50D": ESM2Config(6, 320, 20),
    "esm2_t12_35M_UR50D": ESM2Config(12, 480, 20),
    "esm2_t30_150M_UR50D": ESM2Config(30, 640, 20),
    "esm2_t33_650M_UR50D": ESM2Config(33, 1280, 20),
    "esm2_t36_3B_UR50D": ESM2Config(36, 2560, 40),
    "esm2_t48_15B_UR50D": ESM2Config(48, 5120, 40),
}

# 8M -> esm2_t6_8M_UR50D
SHORT_NAMES = {name.split("_")[2]: name for name in SIZES}
MODEL_NAMES = (*SIZES, *SHORT_NAMES)
OFFICIAL_REPOSITORIES = {name: f"facebook/{name}" for name in SIZES}


def complete_model_name(model: str) -> str:
    """Replace the short name of a published model by its official name: `8M` or `8m` by `esm2_t6_8M_UR50D`.

    Args:
        model: A name or a path.

    Returns:
        The official name; any other text unchanged, and also `8M` if a file or folder has this name.
    """
    official = SHORT_NAMES.get(model.upper())
    return official if official and not Path(model).exists() else model


def complete_model_names(config: Any, *names: str) -> None:
    """Replace short names of models in a configuration, so that `8M` and the official name are the same setting.

    Args:
        config: A dataclass instance, also a frozen one; its fields are replaced.
        names: The fields that name a model.
    """
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, complete_model_name(value))


def check_model_name(name: str) -> None:
    """Check that a model is an existing path, an official name, or may be a repository on the hub.

    Args:
        name: The name or path, without a short form.

    Raises:
        InputError: It is none of them, such as a mistyped name or path.
    """
    if Path(name).exists():
        return
    _check_missing_path(name)
    if name not in SIZES and (
        name.count("/") != 1 or name.startswith((".", "/")) or name.endswith((".pt", ".safetensors"))
    ):
        raise InputError(
            f"model {name!r} is neither a file or folder nor a published model; {suggest_name(name, MODEL_NAMES)}",
            code="model.unknown",
            name=name,
        )


def _check_missing_path(name: str) -> None:
    """Raise for a name that starts with an existing folder: a mistyped path rather than a repository."""
    folder = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if folder is None or "@" in name or name in OFFICIAL_REPOSITORIES.values():
        return
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
    contents = f"contains {shown}" if names else "is empty"
    hub = f", or write {name}@main for the repository on the hub" if name.count("/") == 1 and name[0] != "." else ""
    raise InputError(
        f"model {name!r} does not exist; {folder} {contents}. Check the path{hub}.",
        code="model.absent",
        name=name,
    )


# The matrices of a layer that LoRA can adapt, by the last part of their names.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model for Hugging Face or fair-esm, with every tensor unchanged.

    Args:
        model: Official name or its short form such as 8M, hub repository, fair-esm .pt, Hugging Face folder, or esm2kit
            checkpoint.
        out: Output folder (huggingface) or .pt file (fair-esm). It must not exist yet.
        format: Output format: huggingface for AutoModel.from_pretrained, or fair-esm for esm.pretrained.
    """

    model: str
    out: Path
    format: Literal["huggingface", "fair-esm"] = "huggingface"

    option_groups = OptionGroups(usual="model out format")

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model.

        Raises:
            InputError: It does not exist.
        """
        check_model_name(self.model)


def check_ways(shard: bool | str, layer_by_layer: bool | None) -> None:
    """Raise InputError if a model is to be divided over devices and also to be read layer by layer."""
    if shard is True and layer_by_layer:
        raise InputError(
            "shard and layer_by_layer are two ways to run a model that does not fit. Use one of them.",
            code="shard.layer-by-layer",
        )
