"""The ESM-2 model in one file, with packed or padded input and fair-esm's parameter names.

The layers operate on rows of width D. A layout defines how the rows form sequences: `Padded` (B, T) as in fair-esm, or
`Packed` (N rows without padding). Tests compare both with fair-esm 2.0.0 and allow a difference of 1e-5.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esm2kit.core.errors import InputError, check_type
from esm2kit.models.config import ESM2Config, check_lm_head
from esm2kit.models.packing import Packed, Padded
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, PAD_IDX, VOCAB_SIZE, encode

# Share of <mask> tokens in fair-esm's training: 15% selected, 80% of them masked. Token dropout scales by it.
TRAINED_MASK_RATIO = 0.15 * 0.8
# Base of the rotary frequencies.
ROPE_THETA = 10000


def rotary_tables(inv_freq: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotary angles.

    Args:
        inv_freq: (head_dim / 2,) frequencies.
        num_positions: number of positions.

    Returns:
        Cosines and sines, (positions, 1, head_dim / 2) each, in float32.
    """
    positions = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None, None] * inv_freq
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Rotates all channel pairs into one new tensor; its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = torch.empty_like(x)
        (first, second), (out_first, out_second) = x.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(gradient, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings: rotate the channel pairs (i, i + K/2) by their position's angle.

    Args:
        x: (..., H, K) queries or keys.
        cos: (..., 1, K / 2) cosines of the angles.
        sin: (..., 1, K / 2) sines of the angles.

    Returns:
        (..., H, K) in the dtype of x, computed in at least float32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():  # the compiler fuses this form; writing into a chunk would break its graph
        first, second = wide.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return _Rotate.apply(wide, cos, sin).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Stores the rotary frequencies of a checkpoint; Meta trained with values rounded to float16."""

    def __init__(self, head_dim: int, base: float = ROPE_THETA) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # The device may change but not the dtype: rounding errors of the angles grow with the position.
        original = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != original.dtype:
            self.inv_freq = original.to(self.inv_freq.device)
        return self


class MultiheadAttention(nn.Module):
    """Multi-head self-attention with rotary position embeddings."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.v_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.rot_emb = RotaryEmbedding(config.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Padded) -> Tensor:
        """Map rows (..., D) to rows (..., D)."""
        # -1: under tensor parallelism a rank has only some of the heads
        heads = (-1, self.head_dim)
        query = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin)
        key = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin)
        value = self.v_proj(x).unflatten(-1, heads)
        return self.out_proj(layout.attend(query, key, value).flatten(-2))


class TransformerLayer(nn.Module):
    """A transformer layer with LayerNorm before attention and before the feed-forward network."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Padded) -> Tensor:
        """Map rows (..., D) to rows (..., D)."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), cos, sin, layout)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class RobertaLMHead(nn.Module):
    """Maps rows of width D to logits over the vocabulary; the output matrix is tied to the token embedding."""

    def __init__(self, config: ESM2Config, weight: nn.Parameter) -> None:
        super().__init__()
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map rows (..., D) to logits (..., V)."""
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden))), self.weight, self.bias)


def symmetrise_with_apc(maps: Tensor) -> Tensor:
    """Symmetrise maps and subtract the average product of their row and column sums (APC).

    Args:
        maps: (..., T, T) attention maps.

    Returns:
        (..., T, T) corrected maps.
    """
    maps = maps + maps.transpose(-1, -2)
    background = maps.sum(-1, keepdim=True) * maps.sum(-2, keepdim=True) / maps.sum((-1, -2), keepdim=True)
    return maps - background


class ContactPredictionHead(nn.Module):
    """Logistic regression from symmetrised, APC-corrected attention maps to residue contacts."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.regression = nn.Linear(config.num_layers * config.attention_heads, 1)

    def forward(self, tokens_BT: Tensor, attentions_BLHTT: Tensor) -> Tensor:
        """Compute contact probabilities.

        Args:
            tokens_BT: token ids with BOS, EOS and padding.
            attentions_BLHTT: attention weights, zero at padding.

        Returns:
            (B, T - 2, T - 2) probabilities; rows of EOS and padding carry no meaning.
        """
        residue_BT = tokens_BT.ne(EOS_IDX).to(attentions_BLHTT)
        maps = attentions_BLHTT * (residue_BT[:, None, :] * residue_BT[:, :, None])[:, None, None]
        maps = symmetrise_with_apc(maps[..., 1:-1, 1:-1].flatten(1, 2))
        return self.regression(maps.permute(0, 2, 3, 1)).squeeze(-1).sigmoid()


class ESM2(nn.Module):
    """The ESM-2 protein language model, with the parameter names of fair-esm.

    Args:
        config: the architecture; `SIZES[name]` has the six published ones.

    Source:
        Lin et al. 2023, 10.1126/science.ade2574; fair-esm 2.0.0 `esm.ESM2`.
    """

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        check_type(config, ESM2Config, "config")
        self.config = config
        # recompute each layer in the backward pass instead of storing its activations
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, config.embed_dim, padding_idx=PAD_IDX)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.contact_head = ContactPredictionHead(config)
        self.emb_layer_norm_after = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.lm_head = RobertaLMHead(config, self.embed_tokens.weight) if config.lm_head else None

    @classmethod
    def initialised(cls, config: ESM2Config, seed: int) -> "ESM2":
        """Build a model with random weights that depend only on the seed.

        Embeddings are sampled with standard deviation 0.02 as in BERT, and matrices with 1 / sqrt(inputs), which
        preserves the scale of activations at any width. With 0.02 for all weights, small models need many steps to
        learn more than residue frequencies.

        Args:
            config: the architecture.
            seed: of the random generator.

        Returns:
            The model in training mode, on the CPU.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            model.embed_tokens.weight[PAD_IDX].zero_()
        return model

    def forward(
        self,
        tokens_BT: Tensor,
        repr_layers: Sequence[int] = (),
        need_head_weights: bool = False,
        return_contacts: bool = False,
    ) -> dict[str, Any]:
        """Run a padded batch, with the arguments and results of fair-esm's `ESM2.forward`.

        Args:
            tokens_BT: token ids: BOS, residues, EOS, padding.
            repr_layers: layers whose representations to return; 0 is the embedding, num_layers the final layer.
            need_head_weights: also return the attention weights.
            return_contacts: also return the attention weights and contact probabilities.

        Returns:
            {"logits": (B, T, V), "representations": {layer: (B, T, D)}} and, if requested,
            "attentions": (B, L, H, T, T) and "contacts": (B, T - 2, T - 2). A model without LM head returns no logits.

        Raises:
            InputError: the model has no such layer.
        """
        layout = Padded(tokens_BT, need_head_weights or return_contacts)
        representations = self._run(tokens_BT, layout, repr_layers)
        final_BTD = representations.pop("final")
        result = {"representations": representations}
        if self.lm_head is not None:
            result = {"logits": self.lm_head(final_BTD)} | result
        if layout.head_weights is not None:
            attentions = torch.stack(layout.head_weights, 1)
            if layout.padding_BT is not None:
                real_BT = (~layout.padding_BT).to(attentions)
                attentions = attentions * (real_BT[:, None, :] * real_BT[:, :, None])[:, None, None]
            result["attentions"] = attentions
            if return_contacts:
                result["contacts"] = self.contact_head(tokens_BT, attentions)
        return result

    def encode(self, tokens_N: Tensor, packed: Packed, repr_layers: Sequence[int] = ()) -> Tensor | dict[int, Tensor]:
        """Run a packed batch: the same numbers as `forward`, without the cost of padding.

        Args:
            tokens_N: concatenated token ids of all sequences, each with BOS and EOS.
            packed: the lengths of the sequences.
            repr_layers: layers to return; empty for the final layer.

        Returns:
            (N, D) of the final layer with the final LayerNorm applied, or {layer: (N, D)} for `repr_layers`.

        Raises:
            InputError: the model has no such layer.
        """
        num_rows = tokens_N.shape[0]
        if packed.num_filler:
            tokens_N = F.pad(tokens_N, (0, packed.num_filler), value=PAD_IDX)
        representations = {layer: x_ND[:num_rows] for layer, x_ND in self._run(tokens_N, packed, repr_layers).items()}
        final_ND = representations.pop("final")
        return representations if repr_layers else final_ND

    def masked_logits(self, tokens_N: Tensor, packed: Packed, rows_M: Tensor) -> Tensor:
        """Compute logits for selected rows of a packed batch, such as the masked positions.

        Args:
            tokens_N: as for `encode`.
            packed: as for `encode`.
            rows_M: indices of the rows.

        Returns:
            (M, V) logits.

        Raises:
            InputError: the model has no LM head.
        """
        check_lm_head(self.config)
        return self.lm_head(self.encode(tokens_N, packed)[rows_M])

    def embed(self, tokens: Tensor, layout: Packed | Padded) -> Tensor:
        """Embed tokens, with token dropout if the configuration has it.

        Args:
            tokens: token ids of any shape.
            layout: the layout of the tokens.

        Returns:
            (..., D) input of the first layer.
        """
        x = self.embed_tokens(tokens)
        if self.config.token_dropout:
            is_mask = tokens.eq(MASK_IDX)
            scale = (1 - TRAINED_MASK_RATIO) / (1 - layout.mask_ratio(is_mask))
            x = x.masked_fill(is_mask[..., None], 0.0) * scale.to(x.dtype)
        return x

    def _run(self, tokens: Tensor, layout: Packed | Padded, repr_layers: Sequence[int]) -> dict[Any, Tensor]:
        keep = set(repr_layers)
        if keep - set(range(self.config.num_layers + 1)):
            raise InputError(
                f"repr_layers {sorted(keep)} do not all exist; this model has layers 0 to {self.config.num_layers}.",
                code="model.layer",
                found=sorted(keep),
                allowed=self.config.num_layers,
            )
        x = self.embed(tokens, layout)
        if isinstance(layout, Padded) and layout.padding_BT is not None:
            x = x * (~layout.padding_BT)[..., None].to(x.dtype)
        cos, sin = rotary_tables(self.layers[0].self_attn.rot_emb.inv_freq, layout.max_tokens)
        cos, sin = cos[layout.position_N], sin[layout.position_N]
        representations = {0: x} if 0 in keep else {}
        for number, layer in enumerate(self.layers, start=1):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, layout, use_reentrant=False)
            else:
                x = layer(x, cos, sin, layout)
            if number in keep:
                representations[number] = x
        x = self.emb_layer_norm_after(x)
        if self.config.num_layers in keep:
            representations[self.config.num_layers] = x
        return representations | {"final": x}


def tokenize(sequences: Sequence[str]) -> Tensor:
    """Convert sequences to a padded batch of token ids.

    Args:
        sequences: residues, one string per protein.

    Returns:
        (B, T) int64 token ids: BOS, residues, EOS, then <pad>.
    """
    block_BT = torch.full((len(sequences), 2 + max(map(len, sequences))), PAD_IDX)
    block_BT[:, 0] = BOS_IDX
    for tokens_T, sequence in zip(block_BT, sequences, strict=True):
        tokens_T[1 : len(sequence) + 1] = torch.from_numpy(encode(sequence))
        tokens_T[len(sequence) + 1] = EOS_IDX
    return block_BT
