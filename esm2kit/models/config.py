"""The shape of an ESM-2, the six published ones, and what `esm2kit export` is asked for; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices
from esm2kit.sequences.alphabet import VOCAB_SIZE


@dataclass(frozen=True)
class ESM2Config:
    """The shape of an ESM-2.

    Args:
        num_layers: transformer layers.
        embed_dim: width of a token's vector; a multiple of attention_heads.
        attention_heads: heads a layer; each has embed_dim / attention_heads channels, an even number.
        token_dropout: zero the embedding of <mask> and rescale the others by the observed mask ratio, as ESM-2 does.
    """

    num_layers: int = 33
    embed_dim: int = 1280
    attention_heads: int = 20
    token_dropout: bool = True

    def __post_init__(self) -> None:
        if min(self.num_layers, self.embed_dim, self.attention_heads) < 1:
            raise InputError(
                f"num_layers, embed_dim and attention_heads must be 1 or more, found {self}",
                code="model.shape",
                found=self,
            )
        if self.embed_dim % (2 * self.attention_heads):
            raise InputError(
                f"embed_dim {self.embed_dim} does not divide into {self.attention_heads} heads of an even width "
                "(rotary positions turn channels in pairs)",
                code="model.heads",
                embed_dim=self.embed_dim,
                attention_heads=self.attention_heads,
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.attention_heads

    @property
    def ffn_dim(self) -> int:
        return 4 * self.embed_dim

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the tied embedding counted once and the contact head left out."""
        width, layer = self.embed_dim, 12 * self.embed_dim**2 + 13 * self.embed_dim
        return VOCAB_SIZE * width + self.num_layers * layer + 2 * width + width**2 + 3 * width + VOCAB_SIZE

    def resolve_layers(self, repr_layers: Sequence[int]) -> list[int]:
        """Layer numbers with negative ones counted from the last, as in a list; 0 is the embedding.

        Raises:
            InputError: the model lacks a layer.
        """
        last = self.num_layers
        for layer in repr_layers:
            if not -last - 1 <= layer <= last:
                raise InputError(
                    f"layer {layer} does not exist: this model has layers 0 to {last} (or -{last + 1} to -1)",
                    code="model.layer",
                    found=layer,
                    allowed=last,
                )
        return [layer % (last + 1) for layer in repr_layers]

    def forward_flops(self, num_tokens: Sequence[int], num_logits: int) -> float:
        """Useful floating-point operations of one forward pass: matrix products and attention, no padding.

        Args:
            num_tokens: tokens of each sequence, BOS and EOS included.
            num_logits: rows that go through the LM head. A training step costs three times as much.
        """
        tokens, squares = sum(num_tokens), sum(count**2 for count in num_tokens)
        layers = self.num_layers * (24 * self.embed_dim**2 * tokens + 4 * self.embed_dim * squares)
        return layers + num_logits * (2 * self.embed_dim**2 + 2 * self.embed_dim * VOCAB_SIZE)


SIZES = {
    "esm2_t6_8M_UR50D": ESM2Config(6, 320, 20),
    "esm2_t12_35M_UR50D": ESM2Config(12, 480, 20),
    "esm2_t30_150M_UR50D": ESM2Config(30, 640, 20),
    "esm2_t33_650M_UR50D": ESM2Config(33, 1280, 20),
    "esm2_t36_3B_UR50D": ESM2Config(36, 2560, 40),
    "esm2_t48_15B_UR50D": ESM2Config(48, 5120, 40),
}

# The matrices of a layer that can be adapted, by their last name.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model for Hugging Face or fair-esm; every tensor arrives as it is.

    Args:
        model: official name, hub repository, fair-esm .pt, Hugging Face folder, or our checkpoint.
        out: the folder (huggingface) or the .pt file (fair-esm) to write; must not be there yet.
        format: huggingface (AutoModel.from_pretrained reads it) or fair-esm (esm.pretrained reads it).
    """

    model: str
    out: Path
    format: Literal["huggingface", "fair-esm"] = "huggingface"

    def __post_init__(self) -> None:
        check_choices(self)
