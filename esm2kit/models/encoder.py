"""ESM-2 for reading only, as fast as the machine allows: packed rows, fused weights, buffers used again.

The same numbers as `ESM2.encode` within 1e-5 in fp32, and no gradient. What makes the difference on a CPU, where the
matrix products run at the machine's own limit and the rest is what there is to win:

- no padding: the rows of all sequences go through the linear layers together, attention looks inside each;
- q, k and v are one product; the rotary turn is one complex product in place, because the weights' rows are put
  in an order in which the pairs it turns are neighbours;
- the residual is the accumulator of the output product (`addmm` onto itself), the value's bias is folded into the
  output's, since attention weights sum to one;
- softmax without its maximum pass, checked afterwards (see `_attend_sequence`), a few heads at a time so that scores
  stay in the core's own cache;
- no buffer is allocated twice, so no page is faulted in twice.
"""

import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.core.errors import InputError
from esm2kit.models.esm2 import ESM2, TRAINED_MASK_RATIO, Packed
from esm2kit.sequences.alphabet import MASK_IDX

Precision = Literal["float32", "bfloat16", "int8"]
# Scores held at once, in floats: 1 MB, which a recent core's L2 holds twice. No finer tuning than one noisy sweep.
SCORES_PER_BLOCK = 1 << 18
# From here on SDPA's own blocking is as fast.
LONG_TOKENS = 900
# Below this, one SDPA call for all sequences of equally many tokens costs less than a few calls for each.
SHORT_TOKENS = 32
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
                raise InputError(
                    "precision int8 is for the CPU: choose bfloat16 on a GPU", code="precision.device", name="int8"
                )
            self.model = model.to(self.device, dtype=getattr(torch, precision))
            torch.cuda.synchronize(self.device)  # other threads' streams read the weights
            self._local = threading.local()
            return
        if precision == "int8" and not torch.backends.mkldnn.is_available():
            raise InputError(
                "precision int8 wants a torch with oneDNN, which this one lacks: choose bfloat16 or float32",
                code="precision.missing",
                name="int8",
            )
        self.model = model
        with torch.inference_mode():
            self.layers = [_rearrange_weights(layer, model.config.head_dim, precision) for layer in model.layers]
        # as loaded: Meta's checkpoints hold these rounded to float16, and were trained with them so
        self.inv_freq_P = model.layers[0].self_attn.rot_emb.inv_freq.float()
        self._local = threading.local()

    @torch.inference_mode()
    def encode(
        self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int], on_device: bool = False
    ) -> dict[int, Tensor]:
        """Representations of packed sequences.

        Args:
            tokens_N: token ids of all sequences end to end, each with its BOS and EOS.
            num_tokens: tokens of each; neighbours of equal number share an attention call.
            repr_layers: which layers, 0 to num_layers; the last has the final LayerNorm applied.
            on_device: leave them where they were computed, in the model's precision.
        Returns: {layer: (N, D)} in float32 on the CPU, for the caller to keep.
        """
        packed = Packed(num_tokens, self.device)
        if self.device.type == "cuda":
            found = self.model.encode(tokens_N.to(self.device, torch.long), packed, tuple(repr_layers))
            return found if on_device else {layer: hidden_ND.float().cpu() for layer, hidden_ND in found.items()}
        tokens_N = tokens_N.long()
        buffers = self._buffers(packed)
        angles_TP = torch.arange(packed.max_tokens)[:, None] * self.inv_freq_P
        turn_N1P = torch.polar(torch.ones_like(angles_TP), angles_TP)[packed.position_N, None]
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
    def logits(self, hidden_ND: Tensor, on_device: bool = False) -> Tensor:
        """(N, V) masked-LM logits of the final layer's rows, float32 on the CPU or, with `on_device`, as they are."""
        weight = self.model.embed_tokens.weight
        logits_NV = self.model.lm_head(hidden_ND.to(weight.device, weight.dtype))
        return logits_NV if on_device else logits_NV.float().cpu()

    def stream(self) -> torch.cuda.Stream:
        """This thread's CUDA stream: one thread's copies to the host overlap with another's kernels."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        return self._local.stream

    def _embed(self, tokens_N: Tensor, packed: Packed, out_ND: Tensor) -> Tensor:
        if (tokens_N == MASK_IDX).any():
            return out_ND.copy_(self.model.embed(tokens_N, packed))
        torch.index_select(self.model.embed_tokens.weight, 0, tokens_N, out=out_ND)
        # token dropout with no <mask> in sight still scales, to the size that training showed the first layer
        return out_ND.mul_(1 - TRAINED_MASK_RATIO) if self.config.token_dropout else out_ND

    def _buffers(self, packed: Packed) -> "_Buffers":
        """This thread's buffers, cut to `num_rows` rows; made anew when a batch is larger than any before."""
        rows = packed.num_rows
        if rows > getattr(self._local, "rows", 0):
            width = self.config.embed_dim
            self._local.rows = rows
            self._local.flat = {
                "x": torch.empty(rows * width),
                "qkv": torch.empty(rows * width * 3),
                "attended": torch.empty(rows * width),
                "wide": torch.empty(rows * width * 4),
                "scores": torch.empty(SCORES_PER_BLOCK),
            }
        return _Buffers(**self._local.flat).slice_rows(rows, self.config.embed_dim)


class _Buffers(NamedTuple):
    """Memory of one thread: x and attended (N, D), qkv (N, 3D), wide (N, 4D), scores flat."""

    x: Tensor
    qkv: Tensor
    attended: Tensor
    wide: Tensor
    scores: Tensor

    def slice_rows(self, rows: int, width: int) -> "_Buffers":
        def block(flat: Tensor, columns: int) -> Tensor:
            return flat[: rows * columns].view(rows, columns)

        return self._replace(
            x=block(self.x, width),
            qkv=block(self.qkv, 3 * width),
            attended=block(self.attended, width),
            wide=block(self.wide, 4 * width),
        )


class _Linear:
    """y = x W' + b onto a buffer, exact."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight_IO = weight.t()
        self.bias = bias

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight_IO, out=out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        """residual += x W' + b, the product accumulating in place."""
        residual.add_(self.bias)
        torch.addmm(residual, x, self.weight_IO, out=residual)


class _LinearBF16:
    """The product in bfloat16, its sum and the residual in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.bfloat16(), bias.bfloat16()

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(F.linear(x.bfloat16(), self.weight, self.bias))

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(F.linear(x.bfloat16(), self.weight, self.bias))


class _LinearInt8:
    """Weights as int8 with a scale an output, inputs as int8 with a scale a row, by oneDNN's integer product.

    A scale a row costs a pass more than one for the whole batch, and leaves a row's numbers its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.scale_O = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.zero_O = torch.zeros(len(weight), dtype=torch.long)
        self.packed = torch.ops.onednn.qlinear_prepack((weight / self.scale_O[:, None]).round().to(torch.int8), None)
        self.bias = bias

    def _product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product but for the rows' scales, (N, O), and these, (N, 1)."""
        scale_N1 = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
        whole_NI = (x / scale_N1).round_().to(torch.int8)
        # scale and zero of the inputs, then the weights', no bias, scale and zero of a result that is float32 anyway
        scales = (1.0, 0, self.packed, self.scale_O, self.zero_O, None, 1.0, 0)
        return torch.ops.onednn.qlinear_pointwise(whole_NI, *scales, torch.float32, "none", [], ""), scale_N1

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(self.bias, *self._product(x), out=out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(self.bias).addcmul_(*self._product(x))


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
        width = x_ND.shape[1]
        heads = width // self.head_dim
        normed_ND = self.attention_norm(x_ND)
        qkv = self.qkv.multiply(normed_ND, buffers.qkv)
        pairs = torch.view_as_complex(qkv[:, : 2 * width].unflatten(1, (2 * heads, self.head_dim // 2, 2)))
        pairs.mul_(turn_N1P)
        query, key, value = qkv.unflatten(1, (3, heads, self.head_dim)).unbind(1)
        attended = buffers.attended.unflatten(1, (heads, self.head_dim))
        start = 0
        for count, tokens in packed.runs:
            stop = start + count * tokens
            _attend(*(x[start:stop] for x in (query, key, value, attended)), count, buffers.scores)
            start = stop
        self.output.multiply_add(buffers.attended, x_ND)
        wide = self.fc1.multiply(self.ffn_norm(x_ND), buffers.wide)
        torch.ops.aten.gelu_(wide)
        self.fc2.multiply_add(wide, x_ND)


def _rearrange_weights(layer: nn.Module, head_dim: int, precision: Precision) -> _Layer:
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


def _attend(query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor, out_NHK: Tensor, count: int, scores: Tensor) -> None:
    """Attention inside each of `count` sequences of equally many tokens, onto `out`."""
    tokens = query_NHK.shape[0] // count
    if SHORT_TOKENS <= tokens < LONG_TOKENS and all(
        _attend_sequence(
            *(x[start : start + tokens].transpose(0, 1) for x in (query_NHK, key_NHK, value_NHK, out_NHK)), scores
        )
        for start in range(0, count * tokens, tokens)
    ):
        return
    query, key, value = (x.unflatten(0, (count, tokens)).transpose(1, 2) for x in (query_NHK, key_NHK, value_NHK))
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    out_NHK.unflatten(0, (count, tokens)).copy_(attended.transpose(1, 2))


def _attend_sequence(query_HTK: Tensor, key_HTK: Tensor, value_HTK: Tensor, out_HTK: Tensor, scores: Tensor) -> bool:
    """One sequence, a few heads at a time, by exp(q.k) / sum without a maximum taken off first.

    That is the same softmax as long as no exponential overflows and the sums stay far from the smallest float, which
    the sums themselves tell afterwards.
    Returns: False if they did not; `out` then holds nothing of use.
    """
    heads, tokens, _ = query_HTK.shape
    key_HKT = key_HTK.transpose(1, 2)
    together = max(1, min(heads, SCORES_PER_BLOCK // tokens**2))
    rows = tokens if together > 1 else min(tokens, SCORES_PER_BLOCK // tokens)
    sums_HT1 = torch.empty(heads, tokens, 1)
    for head in range(0, heads, together):
        some = slice(head, head + together)
        for row in range(0, tokens, rows):
            query = query_HTK[some, row : row + rows]
            block = scores[: query.shape[0] * query.shape[1] * tokens].view(*query.shape[:2], tokens)
            torch.bmm(query, key_HKT[some], out=block).exp_()
            torch.sum(block, -1, keepdim=True, out=sums_HT1[some, row : row + rows])
            torch.bmm(block, value_HTK[some], out=out_HTK[some, row : row + rows])
    least, most = sums_HT1.aminmax()
    out_HTK.div_(sums_HT1)
    return SAFE_SUM[0] < least.item() and most.item() < SAFE_SUM[1]
