"""ESM-2 in one file: packed or padded input, fair-esm's parameter names, SDPA or variable-length attention.

The layers are written once, over rows of width D. How the rows divide into sequences is the business of the layout:
`Padded` (B, T) as fair-esm has it, or `Packed` (N rows, no padding). Tests hold both to fair-esm 2.0.0 within 1e-5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esm2kit.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, PAD_IDX, VOCAB_SIZE, encode
from esm2kit.errors import InputError

# Share of tokens that read <mask> in fair-esm's training: 15% selected, 80% of them masked. Token dropout scales by it.
TRAINED_MASK_RATIO = 0.15 * 0.8


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
            raise InputError(f"num_layers, embed_dim and attention_heads must be 1 or more, found {self}")
        if self.embed_dim % (2 * self.attention_heads):
            raise InputError(
                f"embed_dim {self.embed_dim} does not divide into {self.attention_heads} heads of an even width "
                "(rotary positions turn channels in pairs)"
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


SIZES = {
    "esm2_t6_8M_UR50D": ESM2Config(6, 320, 20),
    "esm2_t12_35M_UR50D": ESM2Config(12, 480, 20),
    "esm2_t30_150M_UR50D": ESM2Config(30, 640, 20),
    "esm2_t33_650M_UR50D": ESM2Config(33, 1280, 20),
    "esm2_t36_3B_UR50D": ESM2Config(36, 2560, 40),
    "esm2_t48_15B_UR50D": ESM2Config(48, 5120, 40),
}


class Packed:
    """B sequences laid end to end as N rows, without padding.

    Args:
        num_tokens: tokens of each sequence, BOS and EOS included, in the order of the rows.
        device: where the rows live.
    """

    def __init__(self, num_tokens: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.num_tokens = [int(count) for count in num_tokens]
        assert min(self.num_tokens) > 0
        self.max_tokens = max(self.num_tokens)
        self.num_tokens_B = torch.tensor(self.num_tokens, device=device)
        ends_B = self.num_tokens_B.cumsum(0)
        self.num_rows = sum(self.num_tokens)
        self.sequence_N = torch.repeat_interleave(self.num_tokens_B, output_size=self.num_rows)
        starts_B = ends_B - self.num_tokens_B
        self.position_N = torch.arange(self.num_rows, device=device) - starts_B[self.sequence_N]
        self.cu_seqlens = F.pad(ends_B, (1, 0)).to(torch.int32)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(sequences, tokens of each) for every run of neighbours with equally many tokens: one SDPA call a run."""
        runs: list[tuple[int, int]] = []
        for tokens in self.num_tokens:
            if runs and runs[-1][1] == tokens:
                runs[-1] = (runs[-1][0] + 1, tokens)
            else:
                runs.append((1, tokens))
        return runs

    def mask_ratio(self, is_mask_N: Tensor) -> Tensor:
        """(N, 1) share of <mask> among the tokens of each row's sequence."""
        counts_B = torch.zeros(len(self.num_tokens), device=is_mask_N.device)
        counts_B = counts_B.index_add(0, self.sequence_N, is_mask_N.float())
        return (counts_B / self.num_tokens_B)[self.sequence_N, None]

    def attend(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        """(N, H, K) softmax attention inside each sequence."""
        if query_NHK.is_cuda and query_NHK.dtype in (torch.float16, torch.bfloat16):
            # CUDA only, half precision only; imported here because CPU builds of torch 2.11 lack its kernels.
            from torch.nn.attention.varlen import varlen_attn

            offsets, longest = self.cu_seqlens, self.max_tokens
            return varlen_attn(query_NHK, key_NHK, value_NHK, offsets, offsets, longest, longest)
        rows = [count * tokens for count, tokens in self.runs]
        pieces = []
        qkv_runs = zip(query_NHK.split(rows), key_NHK.split(rows), value_NHK.split(rows), strict=True)
        for run, qkv in zip(self.runs, qkv_runs, strict=True):
            query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
            pieces.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Padded:
    """B sequences as the rows of a (B, T) block, shorter ones filled up with <pad>.

    Args:
        tokens_BT: token ids; <pad> marks what keys no query may see.
        need_head_weights: keep each layer's attention weights in `head_weights`, a list of (B, H, T, T).
    """

    def __init__(self, tokens_BT: Tensor, need_head_weights: bool = False) -> None:
        padding_BT = tokens_BT.eq(PAD_IDX)
        self.padding_BT = padding_BT if padding_BT.any() else None
        self.num_tokens_B = (~padding_BT).sum(-1)
        self.position_N = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self.max_tokens = tokens_BT.shape[1]
        self.head_weights: list[Tensor] | None = [] if need_head_weights else None

    def mask_ratio(self, is_mask_BT: Tensor) -> Tensor:
        """(B, 1, 1) share of <mask> among the tokens of each sequence, padding aside."""
        return (is_mask_BT.sum(-1).float() / self.num_tokens_B)[:, None, None]

    def attend(self, query_BTHK: Tensor, key_BTHK: Tensor, value_BTHK: Tensor) -> Tensor:
        """(B, T, H, K) softmax attention over the keys that are not padding."""
        query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTHK, value_BTHK))
        visible = None if self.padding_BT is None else ~self.padding_BT[:, None, None, :]
        if self.head_weights is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2)
        scores_BHTT = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if visible is not None:
            scores_BHTT = scores_BHTT.masked_fill(~visible, float("-inf"))
        weights_BHTT = scores_BHTT.softmax(-1, dtype=torch.float32).to(value.dtype)
        self.head_weights.append(weights_BHTT)
        return (weights_BHTT @ value).transpose(1, 2)


def rotary_tables(head_dim: int, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (positions, 1, head_dim / 2) each, always in float32."""
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(num_positions, device=device).float()[:, None, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + K/2) of x (..., H, K) by their position's angle."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Carries `inv_freq`, which fair-esm keeps in its state dict; the angles come from `rotary_tables`, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))


class MultiheadAttention(nn.Module):
    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.v_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.rot_emb = RotaryEmbedding(config.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Padded) -> Tensor:
        # -1 heads: under tensor parallelism a rank holds some of them
        heads = (-1, self.head_dim)
        query = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin)
        key = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin)
        value = self.v_proj(x).unflatten(-1, heads)
        return self.out_proj(layout.attend(query, key, value).flatten(-2))


class TransformerLayer(nn.Module):
    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim)
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Padded) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), cos, sin, layout)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class RobertaLMHead(nn.Module):
    """Rows of width D to logits over the vocabulary; the output matrix is the token embedding itself."""

    def __init__(self, config: ESM2Config, weight: nn.Parameter) -> None:
        super().__init__()
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden))), self.weight, self.bias)


class ContactPredictionHead(nn.Module):
    """Logistic regression from symmetrised, average-product-corrected attention maps to residue contacts."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.regression = nn.Linear(config.num_layers * config.attention_heads, 1)

    def forward(self, tokens_BT: Tensor, attentions_BLHTT: Tensor) -> Tensor:
        residue_BT = tokens_BT.ne(EOS_IDX).to(attentions_BLHTT)
        maps = attentions_BLHTT * (residue_BT[:, None, :] * residue_BT[:, :, None])[:, None, None]
        maps = maps[..., 1:-1, 1:-1].flatten(1, 2)
        maps = maps + maps.transpose(-1, -2)
        background = maps.sum(-1, keepdim=True) * maps.sum(-2, keepdim=True) / maps.sum((-1, -2), keepdim=True)
        return self.regression((maps - background).permute(0, 2, 3, 1)).squeeze(-1).sigmoid()


class ESM2(nn.Module):
    """ESM-2 with fair-esm's state dict, to be loaded and saved unchanged.

    Args:
        config: the shape; `SIZES[name]` for the six published ones.
    Source: Lin et al. 2023, 10.1126/science.ade2574; fair-esm 2.0.0 `esm.ESM2`.
    """

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.config = config
        # recompute each layer in the backward pass instead of keeping what it made
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, config.embed_dim, padding_idx=PAD_IDX)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.contact_head = ContactPredictionHead(config)
        self.emb_layer_norm_after = nn.LayerNorm(config.embed_dim)
        self.lm_head = RobertaLMHead(config, self.embed_tokens.weight)

    @classmethod
    def initialised(cls, config: ESM2Config, seed: int) -> "ESM2":
        """Fresh weights, a function of the seed alone: matrices from N(0, 0.02), biases 0, as ESM-2 and BERT start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                    if isinstance(module, nn.Linear):
                        nn.init.zeros_(module.bias)
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
        """Padded batch in, what fair-esm's `ESM2.forward` gives out.

        Args:
            tokens_BT: token ids, BOS first, EOS last, then padding.
            repr_layers: layers whose representations to keep; 0 is the embedding, num_layers the final one.
            need_head_weights: also give the attention weights, (B, L, H, T, T).
            return_contacts: also give contact probabilities, (B, T - 2, T - 2).
        Returns: {"logits": (B, T, V), "representations": {layer: (B, T, D)}}, and "attentions", "contacts" when asked.
        """
        layout = Padded(tokens_BT, need_head_weights or return_contacts)
        representations = self._run(tokens_BT, layout, repr_layers)
        result = {
            "logits": self.lm_head(representations.pop("final")),
            "representations": representations,
        }
        if layout.head_weights is not None:
            attentions = torch.stack(layout.head_weights, 1)
            if layout.padding_BT is not None:
                seen_BT = (~layout.padding_BT).to(attentions)
                attentions = attentions * (seen_BT[:, None, :] * seen_BT[:, :, None])[:, None, None]
            result["attentions"] = attentions
            if return_contacts:
                result["contacts"] = self.contact_head(tokens_BT, attentions)
        return result

    def encode(self, tokens_N: Tensor, packed: Packed, repr_layers: Sequence[int] = ()) -> Tensor | dict[int, Tensor]:
        """Packed batch in, the final layer's rows out: the same numbers as `forward`, without padding's cost.

        Args:
            tokens_N: token ids of all sequences end to end, each with its BOS and EOS.
            packed: where each sequence begins and ends.
            repr_layers: give {layer: (N, D)} for these layers instead of the final one alone.
        Returns: (N, D), the final LayerNorm applied, or the dictionary.
        """
        representations = self._run(tokens_N, packed, repr_layers)
        final_ND = representations.pop("final")
        return representations if repr_layers else final_ND

    def masked_logits(self, tokens_N: Tensor, packed: Packed, rows_M: Tensor) -> Tensor:
        """(M, V) logits of chosen rows of a packed batch: the LM head's cost is paid only where the loss looks."""
        return self.lm_head(self.encode(tokens_N, packed)[rows_M])

    def embed(self, tokens: Tensor, layout: Packed | Padded) -> Tensor:
        """Token embeddings with token dropout: (..., D) before the first layer."""
        x = self.embed_tokens(tokens)
        if self.config.token_dropout:
            is_mask = tokens.eq(MASK_IDX)
            scale = (1 - TRAINED_MASK_RATIO) / (1 - layout.mask_ratio(is_mask))
            x = x.masked_fill(is_mask[..., None], 0.0) * scale.to(x.dtype)
        return x

    def _run(self, tokens: Tensor, layout: Packed | Padded, repr_layers: Sequence[int]) -> dict[Any, Tensor]:
        keep = set(repr_layers)
        if keep - set(range(self.config.num_layers + 1)):
            raise InputError(f"repr_layers {sorted(keep)}: this model has layers 0 to {self.config.num_layers}")
        x = self.embed(tokens, layout)
        if isinstance(layout, Padded) and layout.padding_BT is not None:
            x = x * (~layout.padding_BT)[..., None].to(x.dtype)
        cos, sin = rotary_tables(self.config.head_dim, layout.max_tokens, tokens.device)
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
    """(B, T) int64 token ids of residue sequences, each between BOS and EOS, the shorter ones filled up with <pad>."""
    block_BT = torch.full((len(sequences), 2 + max(map(len, sequences))), PAD_IDX)
    block_BT[:, 0] = BOS_IDX
    for tokens_T, sequence in zip(block_BT, sequences, strict=True):
        tokens_T[1 : len(sequence) + 1] = torch.from_numpy(encode(sequence))
        tokens_T[len(sequence) + 1] = EOS_IDX
    return block_BT
