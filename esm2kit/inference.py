"""ESM-2 for reading only, as fast as the machine allows: packed rows, fused weights, buffers used again.

The same numbers as `ESM2.encode` within 1e-5 in fp32, and no gradient. What makes the difference on a CPU, where the
matrix products run at the machine's own limit and the rest is what there is to win:

- no padding: the rows of all sequences go through the linear layers together, attention looks inside each;
- q, k and v are one product; the rotary turn is one complex product straight into the layout attention wants, because
  the weights' rows are put in an order in which the pairs it turns are neighbours;
- the residual is the accumulator of the output product (`addmm` onto itself), the value's bias is folded into the
  output's, since attention weights sum to one;
- softmax without its maximum pass, checked afterwards (see `_attend_block`), a few heads at a time so that scores stay
  in the core's own cache: about 1.4 times `scaled_dot_product_attention` below 900 tokens;
- no buffer is allocated twice, so no page is faulted in twice.
"""

import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.alphabet import MASK_IDX
from esm2kit.errors import InputError
from esm2kit.model import ESM2, Packed, rotary_tables

Precision = Literal["float32", "bfloat16", "int8"]
# Scores held at once, in floats: 1 MB, half of a recent core's L2. Measured best of 0.25 to 4 MB.
SCORES_PER_BLOCK = 1 << 18
# From here on SDPA's own blocking is as fast.
LONG_TOKENS = 900
# A sum of exponentials outside these has lost digits or is about to; the block is then done again by SDPA.
SAFE_SUM = (1e-30, 1e30)


class Encoder:
    """Packed sequences in, representations out.

    Args:
        model: in evaluation mode; its weights are copied into a faster arrangement on the CPU, moved on CUDA.
        precision: "float32" is exact; "bfloat16" and "int8" (CPU only, linear layers alone) are approximations.
        device: "cpu", or a CUDA device, where attention is torch's variable-length kernel in bfloat16.
    Raises: InputError for a precision the device lacks.
    """

    def __init__(self, model: ESM2, precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        self.config = model.config
        self.precision = precision
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if precision == "int8":
                raise InputError("precision int8 is for the CPU: choose bfloat16 on a GPU")
            self.model = model.to(self.device, dtype=getattr(torch, precision))
            return
        self.model = model
        with torch.inference_mode():
            self.layers = [_arrange(layer, model.config.head_dim, precision) for layer in model.layers]
        self._local = threading.local()

    def resolve(self, repr_layers: Sequence[int]) -> list[int]:
        """Layer numbers with negative ones counted from the last, as in a list; 0 is the embedding.

        Raises: InputError naming a layer the model lacks.
        """
        last = self.config.num_layers
        for layer in repr_layers:
            if not -last - 1 <= layer <= last:
                raise InputError(
                    f"layer {layer} does not exist: this model has layers 0 to {last} (or -{last + 1} to -1)"
                )
        return [layer % (last + 1) for layer in repr_layers]

    @torch.inference_mode()
    def encode(self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int]) -> dict[int, Tensor]:
        """Representations of packed sequences.

        Args:
            tokens_N: token ids of all sequences end to end, each with its BOS and EOS.
            num_tokens: tokens of each; neighbours of equal number share an attention call.
            repr_layers: which layers, 0 to num_layers; the last has the final LayerNorm applied.
        Returns: {layer: (N, D)} in float32 on the CPU, for the caller to keep.
        """
        packed = Packed(num_tokens, self.device)
        if self.device.type == "cuda":
            found = self.model.encode(tokens_N.to(self.device, torch.long), packed, tuple(repr_layers))
            return {layer: hidden_ND.float().cpu() for layer, hidden_ND in found.items()}
        tokens_N = tokens_N.long()
        buffers = self._buffers(packed)
        cos, sin = rotary_tables(self.config.head_dim, packed.max_tokens, self.device)
        turn_N1P = torch.complex(cos, sin)[packed.position_N]
        x_ND = self._embed(tokens_N, packed, buffers.x)
        found = {0: x_ND.clone()} if 0 in repr_layers else {}
        for number, layer in enumerate(self.layers[: max(repr_layers)], start=1):
            layer.run(x_ND, turn_N1P, packed, buffers)
            if number in repr_layers and number < self.config.num_layers:
                found[number] = x_ND.clone()
        if self.config.num_layers in repr_layers:
            found[self.config.num_layers] = self.model.emb_layer_norm_after(x_ND)
        return found

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) masked-LM logits of the final layer's rows, float32 on the CPU."""
        weight = self.model.embed_tokens.weight
        return self.model.lm_head(hidden_ND.to(weight.device, weight.dtype)).float().cpu()

    def _embed(self, tokens_N: Tensor, packed: Packed, out_ND: Tensor) -> Tensor:
        if (tokens_N == MASK_IDX).any():
            return out_ND.copy_(self.model.embed(tokens_N, packed))
        torch.index_select(self.model.embed_tokens.weight, 0, tokens_N, out=out_ND)
        # token dropout with no <mask> in sight still scales, to the size that training showed the first layer
        return out_ND.mul_(1 - 0.15 * 0.8) if self.config.token_dropout else out_ND

    def _buffers(self, packed: Packed) -> "_Buffers":
        """This thread's buffers, cut to `num_rows` rows; made anew when a batch is larger than any before."""
        rows = packed.num_rows
        if rows > getattr(self._local, "rows", 0):
            width, head_dim = self.config.embed_dim, self.config.head_dim
            self._local.rows = rows
            self._local.flat = {
                "x": torch.empty(rows * width),
                "normed": torch.empty(rows * width),
                "qkv": torch.empty(rows * width * 3),
                "turned": torch.empty(rows * width * 2),
                "attended": torch.empty(rows * width),
                "wide": torch.empty(rows * width * 4),
                "scores": torch.empty(max(SCORES_PER_BLOCK, LONG_TOKENS)),
                "sums": torch.empty(rows * width // head_dim),
            }
        return _Buffers(**self._local.flat).first(rows, self.config.embed_dim)


class _Buffers(NamedTuple):
    """Memory of one thread: x, normed, attended (N, D); qkv (N, 3D); turned (2, N, D); wide (N, 4D); scores and sums
    flat."""

    x: Tensor
    normed: Tensor
    qkv: Tensor
    turned: Tensor
    attended: Tensor
    wide: Tensor
    scores: Tensor
    sums: Tensor

    def first(self, rows: int, width: int) -> "_Buffers":
        def block(flat: Tensor, columns: int) -> Tensor:
            return flat[: rows * columns].view(rows, columns)

        narrow = {name: block(getattr(self, name), width) for name in ("x", "normed", "attended")}
        return self._replace(
            qkv=block(self.qkv, 3 * width),
            turned=self.turned[: rows * 2 * width],
            wide=block(self.wide, 4 * width),
            **narrow,
        )


class _Linear:
    """y = x W' + b onto a buffer, exact."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight_IO = weight.t()
        self.bias = bias

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight_IO, out=out)

    def onto(self, x: Tensor, residual: Tensor) -> None:
        """residual += x W' + b, the product accumulating in place."""
        residual.add_(self.bias)
        torch.addmm(residual, x, self.weight_IO, out=residual)


class _LinearBF16:
    """The product in bfloat16, its sum and the residual in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.bfloat16(), bias.bfloat16()

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(F.linear(x.bfloat16(), self.weight, self.bias))

    def onto(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(F.linear(x.bfloat16(), self.weight, self.bias))


class _LinearInt8:
    """Weights as int8 with a scale a row, inputs as int8 with one scale a batch row, products in int32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.scale_O = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.weight_IO = (weight / self.scale_O[:, None]).round().to(torch.int8).t()
        self.bias = bias

    def _product(self, x: Tensor) -> Tensor:
        scale_N1 = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        product = torch._int_mm((x / scale_N1).round_().to(torch.int8), self.weight_IO)
        return torch.addcmul(self.bias, product * scale_N1, self.scale_O)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(self._product(x))

    def onto(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(self._product(x))


LINEARS = {"float32": _Linear, "bfloat16": _LinearBF16, "int8": _LinearInt8}


class _Layer(NamedTuple):
    """One transformer layer's weights, rearranged."""

    attention_norm: nn.LayerNorm
    qkv: _Linear
    output: _Linear
    ffn_norm: nn.LayerNorm
    fc1: _Linear
    fc2: _Linear
    head_dim: int

    def run(self, x_ND: Tensor, turn_N1P: Tensor, packed: Packed, buffers: _Buffers) -> None:
        """x becomes the layer's output, in place."""
        rows, width = x_ND.shape
        heads = width // self.head_dim
        qkv = self.qkv.into(_norm(self.attention_norm, x_ND, buffers.normed), buffers.qkv)
        pairs = torch.view_as_complex(qkv[:, : 2 * width].unflatten(1, (2 * heads, self.head_dim // 2, 2)))
        turned = torch.view_as_complex(buffers.turned.view(2 * heads, rows, self.head_dim // 2, 2))
        torch.mul(pairs.transpose(0, 1), turn_N1P.transpose(0, 1), out=turned)
        query_HNK, key_HNK = buffers.turned.view(2, heads, rows, self.head_dim)
        value_HNK = qkv[:, 2 * width :].unflatten(1, (heads, self.head_dim)).transpose(0, 1)
        attended_HNK = buffers.attended.unflatten(1, (heads, self.head_dim)).transpose(0, 1)
        start = 0
        for count, tokens in packed.runs:
            stop = start + count * tokens
            views = (view[:, start:stop] for view in (query_HNK, key_HNK, value_HNK, attended_HNK))
            _attend(*views, count, tokens, buffers)
            start = stop
        self.output.onto(buffers.attended, x_ND)
        wide = self.fc1.into(_norm(self.ffn_norm, x_ND, buffers.normed), buffers.wide)
        torch.ops.aten.gelu_(wide)
        self.fc2.onto(wide, x_ND)


def _norm(norm: nn.LayerNorm, x_ND: Tensor, out_ND: Tensor) -> Tensor:
    return out_ND.copy_(F.layer_norm(x_ND, norm.normalized_shape, norm.weight, norm.bias, norm.eps))


def _arrange(layer: nn.Module, head_dim: int, precision: Precision) -> _Layer:
    """Fused and reordered copies of a layer's weights."""
    attention = layer.self_attn
    heads = attention.q_proj.out_features // head_dim
    # rotary turns channels (i, i + K/2): as neighbours they are one complex number; q.k does not see the order
    order_K = torch.arange(head_dim).view(2, -1).t().reshape(-1)

    def reorder(parameter: Tensor) -> Tensor:
        return parameter.unflatten(0, (heads, head_dim))[:, order_K].flatten(0, 1)

    scale = head_dim**-0.5
    query, key, value, output = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    weight = torch.cat([reorder(query.weight) * scale, reorder(key.weight), value.weight])
    bias = torch.cat([reorder(query.bias) * scale, reorder(key.bias), torch.zeros_like(value.bias)])
    linear = LINEARS[precision]
    return _Layer(
        layer.self_attn_layer_norm,
        linear(weight, bias),
        linear(output.weight, output.bias + output.weight @ value.bias),
        layer.final_layer_norm,
        linear(layer.fc1.weight, layer.fc1.bias),
        linear(layer.fc2.weight, layer.fc2.bias),
        head_dim,
    )


def _attend(
    query_HNK: Tensor,
    key_HNK: Tensor,
    value_HNK: Tensor,
    out_HNK: Tensor,
    count: int,
    tokens: int,
    buffers: _Buffers,
) -> None:
    """Attention inside each of `count` sequences of equally many tokens, onto `out`."""
    if tokens < LONG_TOKENS:
        for start in range(0, count * tokens, tokens):
            views = (view[:, start : start + tokens] for view in (query_HNK, key_HNK, value_HNK, out_HNK))
            if not _attend_block(*views, buffers):
                break
        else:
            return
    query, key, value = (x.unflatten(1, (count, tokens)).transpose(0, 1) for x in (query_HNK, key_HNK, value_HNK))
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    out_HNK.unflatten(1, (count, tokens)).transpose(0, 1).copy_(attended)


def _attend_block(query_HTK: Tensor, key_HTK: Tensor, value_HTK: Tensor, out_HTK: Tensor, buffers: _Buffers) -> bool:
    """One sequence, a few heads at a time, by exp(q.k) / sum without a maximum taken off first.

    That is the same softmax as long as no exponential overflows and the sums stay far from the smallest float, which
    the sums themselves tell afterwards.
    Returns: False if they were not; `out` then holds nothing of use.
    """
    heads, tokens, _ = query_HTK.shape
    key_HKT = key_HTK.transpose(1, 2)
    together = max(1, min(heads, SCORES_PER_BLOCK // tokens**2))
    rows = tokens if together > 1 else min(tokens, SCORES_PER_BLOCK // tokens)
    sums_HT1 = buffers.sums[: heads * tokens].view(heads, tokens, 1)
    products_HTK = torch.empty(query_HTK.shape)
    for head in range(0, heads, together):
        some = slice(head, head + together)
        for row in range(0, tokens, rows):
            query = query_HTK[some, row : row + rows]
            scores = buffers.scores[: query.shape[0] * query.shape[1] * tokens].view(*query.shape[:2], tokens)
            torch.bmm(query, key_HKT[some], out=scores).exp_()
            torch.sum(scores, -1, keepdim=True, out=sums_HT1[some, row : row + rows])
            torch.bmm(scores, value_HTK[some], out=products_HTK[some, row : row + rows])
    least, most = sums_HT1.aminmax()
    torch.div(products_HTK, sums_HT1, out=out_HTK)
    return SAFE_SUM[0] < least.item() and most.item() < SAFE_SUM[1]
