"""Heads for fine-tuning: those of the probes with reproducible dropout, and the two heads of Hugging Face.

The dropout of a head is a hash of (seed, epoch, protein, position), so it does not depend on the device of a sample or
on a restart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esm2kit.benchmarking.probes.heads import Cnn, FeatureBatch, Fnn, LightAttention, SeededHead
from esm2kit.core.errors import InputError
from esm2kit.core.rng import GOLDEN
from esm2kit.finetuning.config import HeadName
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.pooling import Pooling, pool_rows
from esm2kit.tasks.task import Level, Task

# constants of core.rng as signed integers, because torch multiplies int64 tensors
_WORDS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB, GOLDEN], dtype=np.uint64)
_MIX_1, _MIX_2, _STEP = _WORDS.astype(np.int64).tolist()


def _mix(value: Tensor) -> Tensor:
    """Apply the hash of core.rng to int64 tensors: products wrap as in uint64, shifts are made logical by a mask."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def hash_to_uniforms(keys_N: Tensor, width: int) -> Tensor:
    """Hash keys to uniform numbers (N, width), float32 in [0, 1); row i depends only on key i, on every device."""
    columns = torch.arange(1, width + 1, device=keys_N.device) * _STEP
    bits = _mix(_mix(keys_N)[:, None] + columns)
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


class KeyedDropout(SeededHead):
    """Base class for dropout from the keys of a batch: one key per protein, combined with row and layer."""

    def set_keys(self, keys_B: Tensor, spans_B: Sequence[tuple[int, int]]) -> None:
        """Set the dropout keys of a batch.

        Args:
            keys_B: One int64 key per protein.
            spans_B: First row and number of rows of each protein.
        """
        self.keys_B, self.spans_B, self.uses = keys_B, spans_B, 0

    def apply_dropout(self, hidden_SNH: Tensor) -> Tensor:
        """Apply inverted dropout with the keys of the batch."""
        if not (self.training and self.dropout):
            return hidden_SNH
        rows, width = hidden_SNH.shape[-2:]
        self.uses += 1
        keys_B = _mix(self.keys_B + self.uses)
        if rows == len(keys_B):
            keys_N = keys_B
        else:
            keys_N = torch.zeros(rows, dtype=torch.int64, device=keys_B.device)
            for key, (start, count) in zip(keys_B, self.spans_B, strict=True):
                keys_N[start : start + count] = key + torch.arange(count, device=keys_B.device) * _MIX_2
        kept = hash_to_uniforms(keys_N, width) >= self.dropout
        return hidden_SNH * kept / (1 - self.dropout)


class KeyedFnn(KeyedDropout, Fnn):
    """`heads.Fnn` with keyed dropout, on the mean over residues or on each residue."""


class KeyedCnn(KeyedDropout, Cnn):
    """`heads.Cnn` with keyed dropout."""


class KeyedLightAttention(KeyedDropout, LightAttention):
    """`heads.LightAttention` with keyed dropout."""


class BosHead(KeyedDropout):
    """Transformers' EsmClassificationHead: dropout, dense D-D, tanh, dropout, linear D-C on the BOS row.

    As in transformers, initial matrices are sampled from N(0, 0.02) and biases are 0.
    """

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_in, self.bias_in = self._init_normal(width, width), _init_zeros(len(seeds), width, device)
        self.weight_out, self.bias_out = self._init_normal(width, outputs), _init_zeros(len(seeds), outputs, device)

    def _init_normal(self, *shape: int) -> nn.Parameter:
        """Sample a parameter (S, *shape) from N(0, 0.02)."""
        sampled = [torch.randn(shape, generator=generator, device="cpu") for generator in self.generators]
        return nn.Parameter((torch.stack(sampled) * 0.02).to(self.device))

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return the outputs (S, B, C)."""
        x_SND = self.apply_dropout(batch.x_ND[None])
        hidden_SND = self.apply_dropout(torch.tanh(x_SND @ self.weight_in + self.bias_in))
        return hidden_SND @ self.weight_out + self.bias_out


class TokenHead(BosHead):
    """Head of transformers' EsmForTokenClassification: dropout, linear D-C on each residue."""

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super(BosHead, self).__init__(seeds, dropout, device)
        self.weight_out, self.bias_out = self._init_normal(width, outputs), _init_zeros(len(seeds), outputs, device)

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return the outputs (S, N, C)."""
        return self.apply_dropout(batch.x_ND[None]) @ self.weight_out + self.bias_out


def _init_zeros(num_seeds: int, width: int, device: torch.device) -> nn.Parameter:
    """Return a bias (S, 1, width) of zeros."""
    return nn.Parameter(torch.zeros(num_seeds, 1, width, device=device))


class HeadSpec(NamedTuple):
    """Specification of a head, saved in the file of a fine-tuned model.

    Args:
        name: fnn, cnn, light_attention or hf.
        level: Whether the head labels proteins or residues.
        embed_dim: Width of its inputs.
        num_outputs: Outputs per protein or residue.
        hidden: Hidden units; 0 uses embed_dim.
        dropout: Dropout rate of the hidden units.
        standardize: Whether to z-score the inputs with moments that are saved in the head.
    """

    name: HeadName
    level: Level
    embed_dim: int
    num_outputs: int
    hidden: int
    dropout: float
    standardize: bool

    @property
    def reads(self) -> Pooling:
        """Rows of the encoder that the head reads."""
        if self.level == "residue" or self.name == "light_attention":
            return "residues"
        return "bos" if self.name == "hf" else "mean"


def check_head(name: HeadName, task: Task) -> None:
    """Check that a head can label the targets of a task.

    Args:
        name: Name of the head.
        task: The task.

    Raises:
        InputError: The head labels residues and the task proteins, or the reverse.
    """
    if name == "cnn" and task.level == "protein":
        raise InputError(
            "head cnn labels residues: for a protein task choose fnn, light_attention or hf",
            code="head.level",
            head=name,
        )
    if name == "light_attention" and task.level == "residue":
        raise InputError(
            "head light_attention labels proteins: for a residue task choose fnn, cnn or hf",
            code="head.level",
            head=name,
        )


class LabelModel(nn.Module):
    """An ESM-2 encoder and a head, from packed sequences to outputs for proteins or residues.

    Args:
        esm2: The encoder; None if its outputs are computed elsewhere.
        spec: Specification of the head.
        seed: Seed of the initial weights of the head.
    """

    def __init__(self, esm2: ESM2 | None, spec: HeadSpec, seed: int = 0) -> None:
        super().__init__()
        self.esm2, self.spec = esm2, spec
        kinds = {"fnn": KeyedFnn, "cnn": KeyedCnn, "light_attention": KeyedLightAttention}
        kind = kinds.get(spec.name) or (TokenHead if spec.level == "residue" else BosHead)
        width, cpu = spec.embed_dim, torch.device("cpu")
        self.head: KeyedDropout = kind((seed,), width, spec.num_outputs, spec.hidden or width, spec.dropout, cpu)
        for parameter in self.head.parameters():
            # DDP requires gradients with the usual strides, including those of the seed axis of size 1
            parameter.register_hook(lambda gradient: gradient.reshape(-1).view(gradient.shape))
        if spec.standardize:
            self.head.register_buffer("mean_D", torch.zeros(width))
            self.head.register_buffer("scale_D", torch.ones(width))

    def forward(self, tokens_N: Tensor, num_tokens: Sequence[int], keys_B: Tensor | None = None) -> Tensor:
        """Compute the outputs of a packed batch.

        Args:
            tokens_N: Token ids of all sequences, each with BOS and EOS.
            num_tokens: Tokens of each sequence.
            keys_B: Dropout keys, required for training.

        Returns:
            (B, C) for proteins, or (R, C) for the residues of all sequences in order.
        """
        hidden_ND = self.esm2.encode(tokens_N, Packed(num_tokens, tokens_N.device, bucketed=True))
        return self.label(hidden_ND, num_tokens, keys_B)

    def label(self, hidden_ND: Tensor, num_tokens: Sequence[int], keys_B: Tensor | None = None) -> Tensor:
        """Compute the outputs of the head from the last layer of the encoder, always in float32."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rows_ND, sizes = pool_rows(hidden_ND.float(), num_tokens, self.spec.reads)
            if self.spec.standardize:
                rows_ND = (rows_ND - self.head.mean_D) / self.head.scale_D
            batch, spans = _insert_gaps(rows_ND, sizes, self.head.radius)
            if keys_B is not None:
                self.head.set_keys(keys_B, spans)
            outputs_NC = self.head(batch)[0]
            real = batch.is_real_N is not None and not self.head.per_protein
            return outputs_NC[batch.is_real_N] if real else outputs_NC


def _insert_gaps(rows_ND: Tensor, sizes: list[int], gap: int) -> tuple[FeatureBatch, list[tuple[int, int]]]:
    """Insert gaps of zero rows between proteins for convolutions; return the batch and the span of each protein."""
    starts = np.cumsum([0, *sizes[:-1]])
    if not gap:
        return FeatureBatch(rows_ND, None, []), list(zip(starts.tolist(), sizes, strict=True))
    zeros = rows_ND.new_zeros(gap, rows_ND.shape[1])
    parts, spans = [zeros], [gap] * (2 * len(sizes) + 1)
    spans[1::2] = sizes
    for rows in rows_ND.split(sizes):
        parts += [rows, zeros]
    is_real_N = torch.cat([torch.full((size,), place % 2 == 1) for place, size in enumerate(spans)])
    first = starts + gap * np.arange(1, len(sizes) + 1)
    batch = FeatureBatch(torch.cat(parts), is_real_N.to(rows_ND.device), spans)
    return batch, list(zip(first.tolist(), sizes, strict=True))
