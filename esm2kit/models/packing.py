"""Layouts of a batch, packed without padding or padded, and attention within each sequence."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from esm2kit.sequences.alphabet import PAD_IDX
from esm2kit.sequences.batching import bucket_size

logger = logging.getLogger(__name__)

FLASH_ATTENTION_4 = "flash_attn.cute.interface"  # module of the package flash-attn-4
FLASH_ATTENTION_4_CAPABILITIES = {9, 10}  # Hopper and Blackwell


@cache
def activate_flash_attention_4() -> bool:
    """Make torch's attention use FlashAttention 4 in this process, if its package is installed and fits the GPUs.

    Returns:
        Whether it is used. One line of the log says so, or why it failed; without the package nothing is logged.
    """
    try:
        found = importlib.util.find_spec(FLASH_ATTENTION_4) is not None
    except ModuleNotFoundError:  # a parent of the module
        found = False
    capabilities = {torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())}
    if not (found and capabilities) or not capabilities <= FLASH_ATTENTION_4_CAPABILITIES:
        return False
    try:
        # imported here because torch below 2.11 lacks this switch
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA4")
    except Exception as error:  # the package compiles and imports libraries of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("FlashAttention 4 is installed but does not work here (%s); torch's attention is used", reason)
        return False
    logger.info("attention: FlashAttention 4")
    return True


def attention(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, visible: Tensor | None = None) -> Tensor:
    """Compute softmax attention within each sequence.

    Args:
        query_BHTK: queries.
        key_BHTK: keys.
        value_BHTK: values.
        visible: boolean mask of the keys that queries attend to, broadcast to (B, H, T, T). Default: all keys.

    Returns:
        (B, H, T, K) in the dtype of the queries.
    """
    if query_BHTK.is_cpu and query_BHTK.dtype == torch.bfloat16:
        # The CPU's bfloat16 kernel is less precise, and its backward pass takes three times as long as in float32.
        with torch.autocast("cpu", enabled=False):
            wide = attention(query_BHTK.float(), key_BHTK.float(), value_BHTK.float(), visible)
        return wide.to(query_BHTK.dtype)
    return F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, attn_mask=visible)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; from the CPU to a CUDA GPU through pinned memory, so that the CPU does not wait."""
    device = torch.device(device)
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Packed:
    """The layout of B sequences concatenated to N rows, without padding.

    Args:
        num_tokens: tokens per sequence, with BOS and EOS, in the order of the rows.
        device: the device of the rows.
        bucketed: round the number of rows up with an extra sequence of <pad>, at most 3% of the rows, so that few
            different sizes occur. The CPU's kernels and allocator cache memory for every size: without this, the
            memory of a long run grew by gigabytes.

    Attributes:
        runs: (sequences, tokens per sequence) of adjacent sequences of equal length; each run is one SDPA call.
        position_N: position of each row in its sequence.
        sequence_N: index of each row's sequence.
    """

    def __init__(self, num_tokens: Sequence[int], device: torch.device | str = "cpu", bucketed: bool = False) -> None:
        self.num_tokens = [int(count) for count in num_tokens]
        assert min(self.num_tokens) > 0
        self.num_filler = -sum(self.num_tokens) % bucket_size(sum(self.num_tokens)) if bucketed else 0
        if self.num_filler:
            self.num_tokens.append(self.num_filler)
        self.max_tokens = max(self.num_tokens)
        self.runs = [(len(list(equal)), tokens) for tokens, equal in groupby(self.num_tokens)]
        # the default device is the GPU where Lightning builds a model
        self.num_tokens_B = to_device(torch.tensor(self.num_tokens, device="cpu"), device)
        ends_B = self.num_tokens_B.cumsum(0)
        self.num_rows = sum(self.num_tokens)
        self.sequence_N = torch.repeat_interleave(self.num_tokens_B, output_size=self.num_rows)
        starts_B = ends_B - self.num_tokens_B
        self.position_N = torch.arange(self.num_rows, device=device) - starts_B[self.sequence_N]
        self.cu_seqlens = F.pad(ends_B, (1, 0)).to(torch.int32)

    def mask_ratio(self, is_mask_N: Tensor) -> Tensor:
        """Compute the share of <mask> tokens in each row's sequence.

        Args:
            is_mask_N: whether each token is <mask>.

        Returns:
            (N, 1) shares.
        """
        counts_B = torch.zeros(len(self.num_tokens), device=is_mask_N.device)
        counts_B = counts_B.index_add(0, self.sequence_N, is_mask_N.float())
        return (counts_B / self.num_tokens_B)[self.sequence_N, None]

    def attend(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        """Compute softmax attention within each sequence: (N, H, K) queries, keys and values to (N, H, K)."""
        heads_fit = query_NHK.shape[-1] % 8 == 0 and query_NHK.shape[-1] <= 256  # true for all published sizes
        if query_NHK.is_cuda and query_NHK.dtype in (torch.float16, torch.bfloat16) and heads_fit:
            # imported here because CPU builds of torch 2.11 lack this kernel
            from torch.nn.attention.varlen import varlen_attn

            offsets, longest = self.cu_seqlens, self.max_tokens
            return varlen_attn(query_NHK, key_NHK, value_NHK, offsets, offsets, longest, longest)
        return self._attend_by_length(query_NHK, key_NHK, value_NHK)

    # The number and the lengths of the runs differ in every batch, so the compiler would compile each batch anew.
    # torch.compiler.disable does the same, but imports the compiler at once, which takes two seconds.
    @torch._disable_dynamo
    def _attend_by_length(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        """Compute attention with one SDPA call for each run of sequences of equal length."""
        rows = [count * tokens for count, tokens in self.runs]
        pieces = []
        qkv_runs = zip(query_NHK.split(rows), key_NHK.split(rows), value_NHK.split(rows), strict=True)
        for run, qkv in zip(self.runs, qkv_runs, strict=True):
            query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
            pieces.append(attention(query, key, value).transpose(1, 2).flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Padded:
    """The layout of B sequences in a (B, T) block, with shorter ones padded by <pad>.

    Args:
        tokens_BT: token ids; queries do not attend to <pad>.
        need_head_weights: store each layer's attention weights in `head_weights`, a list of (B, H, T, T).
    """

    def __init__(self, tokens_BT: Tensor, need_head_weights: bool = False) -> None:
        padding_BT = tokens_BT.eq(PAD_IDX)
        self.padding_BT = padding_BT if padding_BT.any() else None
        self.num_tokens_B = (~padding_BT).sum(-1)
        self.position_N = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self.max_tokens = tokens_BT.shape[1]
        self.head_weights: list[Tensor] | None = [] if need_head_weights else None

    def mask_ratio(self, is_mask_BT: Tensor) -> Tensor:
        """Compute the share of <mask> tokens in each sequence, without padding.

        Args:
            is_mask_BT: whether each token is <mask>.

        Returns:
            (B, 1, 1) shares.
        """
        return (is_mask_BT.sum(-1).float() / self.num_tokens_B)[:, None, None]

    def attend(self, query_BTHK: Tensor, key_BTHK: Tensor, value_BTHK: Tensor) -> Tensor:
        """Compute softmax attention without padding keys: (B, T, H, K) queries, keys and values to (B, T, H, K)."""
        query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTHK, value_BTHK))
        visible = None if self.padding_BT is None else ~self.padding_BT[:, None, None, :]
        if self.head_weights is None:
            return attention(query, key, value, visible).transpose(1, 2)
        scores_BHTT = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if visible is not None:
            scores_BHTT = scores_BHTT.masked_fill(~visible, float("-inf"))
        weights_BHTT = scores_BHTT.softmax(-1, dtype=torch.float32).to(value.dtype)
        self.head_weights.append(weights_BHTT)
        return (weights_BHTT @ value).transpose(1, 2)
