"""Fast ESM-2 inference: packed sequences, fused weights and reused buffers.

Returns the same numbers as `ESM2.encode` within 1e-5 in float32, without gradients. On a CPU the matrix products
already run at the machine's limit. These changes reduce the remaining time:

- Sequences are packed without padding. The linear layers process all rows together; attention stays within a sequence.
- One matrix product computes q, k and v. The weights' rows are reordered so that the channel pairs of the rotary
  embedding are neighbours, and one complex product in place rotates them.
- The output product accumulates into the residual (`addmm`). The bias of v is folded into the output bias, because
  attention weights sum to one.
- The softmax omits the pass for the maximum and checks the sums afterwards (see `_attend_sequence`). It processes a few
  heads at a time, so that the scores stay in the core's cache.
- Buffers are allocated once per thread, which avoids page faults.
"""

import copy
import logging
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.core.errors import InputError, check_type
from esm2kit.models.config import check_lm_head
from esm2kit.models.esm2 import ESM2, TRAINED_MASK_RATIO, Packed
from esm2kit.models.packing import activate_flash_attention_4, to_device
from esm2kit.sequences.alphabet import MASK_IDX

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "int8"]
# Default size of a batch: as many tokens as the caches of a CPU hold, or as a GPU needs to be busy.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 32_768, "mps": 8192}
# Attention scores in memory at a time: 1 MB of floats, half of a recent core's L2 cache. Tuned by one noisy sweep.
SCORES_PER_BLOCK = 1 << 18
# At this length and above, SDPA's own blocking is as fast.
LONG_TOKENS = 900
# Below this length, one SDPA call for all sequences of equal length is faster than a few calls per sequence.
SHORT_TOKENS = 32
# Range of the sums of exponentials without loss of precision; SDPA recomputes sequences outside it.
SAFE_SUM = (1e-30, 1e30)


def resolve_precision(requested: Precision, device: torch.device | str) -> Precision:
    """Resolve the precision of an encoder on a device.

    Args:
        requested: `float32`, `bfloat16`, `int8`, or `auto` for bfloat16 on a CUDA GPU that computes in it, and float32
            elsewhere.
        device: `cpu`, `mps` or a CUDA device.

    Returns:
        `float32`, `bfloat16` or `int8`.

    Raises:
        InputError: the device or this build of torch does not support the precision.
    """
    device = torch.device(device)
    if requested == "auto":
        return "bfloat16" if device.type == "cuda" and _computes_bfloat16(device) else "float32"
    if requested == "int8" and device.type == "cpu" and not torch.backends.mkldnn.is_available():
        raise InputError(
            "precision 'int8' requires a build of torch with oneDNN; choose bfloat16 or float32.",
            code="precision.missing",
            name="int8",
        )
    supported = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float32", "bfloat16")}.get(device.type, ("float32",))
    if device.type == "cuda" and requested == "bfloat16" and not _computes_bfloat16(device):
        supported = ("float32",)
    if requested not in supported:
        raise InputError(
            f"precision '{requested}' does not run on device {device.type} of this machine; choose "
            f"{' or '.join(supported)}, or auto.",
            code="precision.device",
            name=requested,
            device=device.type,
        )
    return requested


def _computes_bfloat16(device: torch.device) -> bool:
    # since NVIDIA's Ampere; AMD's GPUs under torch compute in it
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def log_precision(requested: Precision, resolved: Precision, device: torch.device | str) -> None:
    """Log which precision `auto` chose on a GPU, and how to ask for the other one; on a CPU as a detail."""
    if requested != "auto":
        return
    kind = torch.device(device).type
    other = "--precision float32 is exact" if resolved == "bfloat16" else "--precision bfloat16 is approximate"
    if kind == "mps" or (kind == "cuda" and not _computes_bfloat16(torch.device(device))):
        other = "this device computes in no other"
    logger.log(logging.DEBUG if kind == "cpu" else logging.INFO, "precision %s on %s; %s", resolved, kind, other)


class Encoder:
    """Computes representations of packed sequences; threads can share one encoder.

    Args:
        model: in evaluation mode. Its weights are copied, and on the CPU rearranged; the model itself does not change.
        precision: "float32" is exact. "bfloat16" and "int8" (CPU only, linear layers only) are approximations. "auto"
            as for `resolve_precision`; the attribute `precision` is the resolved one.
        device: "cpu", "mps" or a CUDA device. On CUDA, bfloat16 uses torch's variable-length attention kernel.

    Raises:
        InputError: the device does not support the precision.
    """

    # A call should have this many tokens, of many batches; 0 if it should have one batch.
    group_tokens = 0
    # Processes that share the layers, all of which make the same passes.
    shards = 1

    def __init__(self, model: ESM2, precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        check_type(model, ESM2, "model", "load one with load_model")
        self.config = model.config
        self.device = torch.device(device)
        self.compute_device = self.device
        resolved = resolve_precision(precision, self.device)
        log_precision(precision, resolved, self.device)
        self.precision = precision = resolved
        if self.device.type != "cpu":
            self.model = _share_tensors(model).to(self.device, dtype=getattr(torch, precision))
            if self.device.type == "cuda":
                activate_flash_attention_4()
                torch.cuda.synchronize(self.device)  # other threads read the weights on other streams
            self._local = threading.local()
            return
        self.model = model
        with torch.inference_mode():
            self.layers = [_rearrange_weights(layer, model.config.head_dim, precision) for layer in model.layers]
        # As loaded: Meta trained with frequencies rounded to float16 and saved these.
        self.inv_freq_P = model.layers[0].self_attn.rot_emb.inv_freq.float()
        self._local = threading.local()

    @torch.inference_mode()
    def encode(
        self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int], on_device: bool = False
    ) -> dict[int, Tensor]:
        """Compute representations of packed sequences.

        Args:
            tokens_N: concatenated token ids of all sequences, each with BOS and EOS.
            num_tokens: tokens per sequence. Adjacent sequences of equal length share an attention call.
            repr_layers: layers to return, 0 to num_layers. The last one includes the final LayerNorm.
            on_device: leave the result on the device in the model's precision.

        Returns:
            {layer: (N, D)} in float32 on the CPU, not overwritten by later calls.
        """
        packed = Packed(num_tokens, self.device)
        if self.device.type != "cpu":
            found = self.model.encode(to_device(tokens_N.long(), self.device), packed, tuple(repr_layers))
            return found if on_device else {layer: hidden_ND.float().cpu() for layer, hidden_ND in found.items()}
        tokens_N = tokens_N.long()
        buffers = self._buffers(packed)
        rotation_N1P = self._rotations(packed)
        x_ND = self._embed(tokens_N, packed, buffers.x)
        found = {0: x_ND.clone()} if 0 in repr_layers else {}
        for number, layer in enumerate(self.layers[: max(repr_layers)], start=1):
            layer.run(x_ND, rotation_N1P, packed, buffers)
            if number in repr_layers and number < self.config.num_layers:
                found[number] = x_ND.clone()
        if self.config.num_layers in repr_layers:
            found[self.config.num_layers] = self.model.emb_layer_norm_after(x_ND)
        return found

    @torch.inference_mode()
    def encode_rows(self, tokens_N: Tensor, num_tokens: Sequence[int], rows_M: Tensor) -> Tensor:
        """Compute the representations of the final layer at some rows of packed sequences.

        On the CPU, attention and feed-forward of the last layer are computed for these rows only.

        Args:
            tokens_N: as for `encode`.
            num_tokens: as for `encode`.
            rows_M: indices of rows, ascending.

        Returns:
            (M, D) with the final LayerNorm, on the device, in the model's precision.
        """
        packed, last = Packed(num_tokens, self.device), self.config.num_layers
        if self.device.type != "cpu":
            hidden_ND = self.model.encode(tokens_N.to(self.device, torch.long), packed, (last,))[last]
            return hidden_ND[rows_M.to(self.device)]
        buffers, rotation_N1P = self._buffers(packed), self._rotations(packed)
        x_ND = self._embed(tokens_N.long(), packed, buffers.x)
        for layer in self.layers[:-1]:
            layer.run(x_ND, rotation_N1P, packed, buffers)
        return self.model.emb_layer_norm_after(self.layers[-1].run_rows(x_ND, rotation_N1P, packed, buffers, rows_M))

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor, on_device: bool = False) -> Tensor:
        """Compute the LM head's logits.

        Args:
            hidden_ND: representations of the final layer.
            on_device: leave the result on the device in the model's precision.

        Returns:
            (N, V) logits, in float32 on the CPU unless `on_device`.

        Raises:
            InputError: the model has no LM head.
        """
        check_lm_head(self.config)
        weight = self.model.embed_tokens.weight
        logits_NV = self.model.lm_head(hidden_ND.to(weight.device, weight.dtype))
        return logits_NV if on_device else logits_NV.float().cpu()

    def finish(self) -> None:
        """Make passes that other processes need, until they have no batch either; see `ShardedEncoder`."""

    def close(self) -> None:
        """Stop the call that runs in another thread, if it takes long; the encoder is not used any more."""

    def stream(self) -> torch.cuda.Stream:
        """Return this thread's CUDA stream, so that one thread's copies to the host overlap with another's kernels."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        return self._local.stream

    def _rotations(self, packed: Packed) -> Tensor:
        """Compute the rotation of each row as complex numbers, (N, 1, head_dim / 2)."""
        angles_TP = torch.arange(packed.max_tokens)[:, None] * self.inv_freq_P
        return torch.polar(torch.ones_like(angles_TP), angles_TP)[packed.position_N, None]

    def _embed(self, tokens_N: Tensor, packed: Packed, out_ND: Tensor) -> Tensor:
        torch.index_select(self.model.embed_tokens.weight, 0, tokens_N, out=out_ND)
        if not self.config.token_dropout:
            return out_ND
        is_mask_N = tokens_N == MASK_IDX
        # Token dropout also scales embeddings without any <mask>, to the mean scale in training.
        if not is_mask_N.any():
            return out_ND.mul_(1 - TRAINED_MASK_RATIO)
        scale_N1 = (1 - TRAINED_MASK_RATIO) / (1 - packed.mask_ratio(is_mask_N))
        return out_ND.mul_(scale_N1.masked_fill_(is_mask_N[:, None], 0.0))

    def _buffers(self, packed: Packed) -> "_Buffers":
        """Return this thread's buffers with a batch's number of rows; a larger batch than before allocates new ones."""
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


def _share_tensors(model: ESM2) -> ESM2:
    """Copy the modules of a model but not its tensors, so that the copy can be moved and converted on its own."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(model, shared)


class _Buffers(NamedTuple):
    """Buffers of one thread: x and attended (N, D), qkv (N, 3D), wide (N, 4D), scores (SCORES_PER_BLOCK,)."""

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
    """A linear layer y = x W' + b in float32 that writes into a buffer."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight_IO = weight.t()
        self.bias = bias

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight_IO, out=out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        """Compute residual += x W' + b in place."""
        residual.add_(self.bias)
        torch.addmm(residual, x, self.weight_IO, out=residual)


class _LinearBF16:
    """A linear layer with its product in bfloat16 and its residual in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.bfloat16(), bias.bfloat16()

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(F.linear(x.bfloat16(), self.weight, self.bias))

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(F.linear(x.bfloat16(), self.weight, self.bias))


class _LinearInt8:
    """A linear layer by oneDNN's int8 product, with one scale per output channel and one per input row.

    A scale per row requires one more pass than a scale per batch, but a row's result does not depend on other rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.scale_O = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.zero_O = torch.zeros(len(weight), dtype=torch.long)
        self.packed = torch.ops.onednn.qlinear_prepack((weight / self.scale_O[:, None]).round().to(torch.int8), None)
        self.bias = bias

    def _product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the product before scaling the rows, (N, O), and the rows' scales, (N, 1)."""
        scale_N1 = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
        quantised_NI = (x / scale_N1).round_().to(torch.int8)
        # scale and zero point of the inputs, the weights, no bias, scale and zero point of the float32 result
        scales = (1.0, 0, self.packed, self.scale_O, self.zero_O, None, 1.0, 0)
        return torch.ops.onednn.qlinear_pointwise(quantised_NI, *scales, torch.float32, "none", [], ""), scale_N1

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(self.bias, *self._product(x), out=out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(self.bias).addcmul_(*self._product(x))


LINEARS = {"float32": _Linear, "bfloat16": _LinearBF16, "int8": _LinearInt8}


class _Layer(NamedTuple):
    """The rearranged weights of one transformer layer."""

    attention_norm: nn.LayerNorm
    qkv: _Linear
    output: _Linear
    ffn_norm: nn.LayerNorm
    fc1: _Linear
    fc2: _Linear
    head_dim: int

    def run(self, x_ND: Tensor, rotation_N1P: Tensor, packed: Packed, buffers: _Buffers) -> None:
        """Apply the layer to x in place."""
        query, key, value = self._project(x_ND, rotation_N1P, buffers)
        attended = buffers.attended.unflatten(1, query.shape[1:])
        start = 0
        for count, tokens in packed.runs:
            stop = start + count * tokens
            _attend(*(x[start:stop] for x in (query, key, value, attended)), count, buffers.scores)
            start = stop
        self._finish(buffers.attended, x_ND, buffers.wide)

    def run_rows(self, x_ND: Tensor, rotation_N1P: Tensor, packed: Packed, buffers: _Buffers, rows_M: Tensor) -> Tensor:
        """Return the layer's output at some rows, (M, D)."""
        query, key, value = self._project(x_ND, rotation_N1P, buffers)
        attended = buffers.attended[: len(rows_M)].unflatten(1, query.shape[1:])
        counts_B = torch.bincount(packed.sequence_N[rows_M], minlength=len(packed.num_tokens)).tolist()
        start = first = 0
        for tokens, count in zip(packed.num_tokens, counts_B, strict=True):
            if count:
                own = slice(first, first + count)
                inputs = (query[rows_M[own]], key[start : start + tokens], value[start : start + tokens])
                inputs = (x.transpose(0, 1)[None] for x in inputs)
                attended[own] = F.scaled_dot_product_attention(*inputs, scale=1.0)[0].transpose(0, 1)
            start, first = start + tokens, first + count
        x_MD = x_ND[rows_M]
        self._finish(buffers.attended[: len(rows_M)], x_MD, buffers.wide[: len(rows_M)])
        return x_MD

    def _project(self, x_ND: Tensor, rotation_N1P: Tensor, buffers: _Buffers) -> tuple[Tensor, ...]:
        """Compute rotated queries and keys, and values, (N, H, K) each."""
        width = x_ND.shape[1]
        heads = width // self.head_dim
        qkv = self.qkv.multiply(self.attention_norm(x_ND), buffers.qkv)
        pairs = torch.view_as_complex(qkv[:, : 2 * width].unflatten(1, (2 * heads, self.head_dim // 2, 2)))
        pairs.mul_(rotation_N1P)
        return qkv.unflatten(1, (3, heads, self.head_dim)).unbind(1)

    def _finish(self, attended: Tensor, x: Tensor, wide: Tensor) -> None:
        """Add the output of the attention and the feed-forward network to x in place."""
        self.output.multiply_add(attended, x)
        wide = self.fc1.multiply(self.ffn_norm(x), wide)
        torch.ops.aten.gelu_(wide)
        self.fc2.multiply_add(wide, x)


def _rearrange_weights(layer: nn.Module, head_dim: int, precision: Precision) -> _Layer:
    """Copy a layer's weights into fused and reordered matrices."""
    attention = layer.self_attn
    heads = attention.q_proj.out_features // head_dim
    # The rotary embedding rotates channels (i, i + K/2). As neighbours they form one complex number. The order of the
    # channels does not change q.k.
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
    """Write the attention within each of `count` sequences of equal length to `out_NHK`."""
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
    """Compute the attention of one sequence as exp(q.k) / sum, without subtracting the maximum first.

    This equals the softmax if no exponential overflows and the sums are not close to the smallest float. The sums show
    both afterwards.

    Returns:
        False if precision was lost; the content of `out_HTK` is then invalid.
    """
    heads, tokens, _ = query_HTK.shape
    key_HKT = key_HTK.transpose(1, 2)
    num_heads = max(1, min(heads, SCORES_PER_BLOCK // tokens**2))
    num_rows = tokens if num_heads > 1 else min(tokens, SCORES_PER_BLOCK // tokens)
    sums_HT1 = torch.empty(heads, tokens, 1)
    for first_head in range(0, heads, num_heads):
        block_heads = slice(first_head, first_head + num_heads)
        for first_row in range(0, tokens, num_rows):
            block_rows = slice(first_row, first_row + num_rows)
            query = query_HTK[block_heads, block_rows]
            block = scores[: query.shape[0] * query.shape[1] * tokens].view(*query.shape[:2], tokens)
            torch.bmm(query, key_HKT[block_heads], out=block).exp_()
            torch.sum(block, -1, keepdim=True, out=sums_HT1[block_heads, block_rows])
            torch.bmm(block, value_HTK[block_heads], out=out_HTK[block_heads, block_rows])
    minimum, maximum = sums_HT1.aminmax()
    out_HTK.div_(sums_HT1)
    return SAFE_SUM[0] < minimum.item() and maximum.item() < SAFE_SUM[1]
