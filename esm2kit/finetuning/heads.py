"""The heads of fine-tuning: the probes' own, with dropout that depends on the sample alone, and Hugging Face's two.

A head's dropout is a hash of (seed, epoch, protein, place), so neither the device that held a sample nor a restart
changes it.
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

# core.rng's constants, as the signed words that int64 tensors multiply by
_WORDS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB, GOLDEN], dtype=np.uint64)
_MIX_1, _MIX_2, _STEP = _WORDS.astype(np.int64).tolist()


def _mix(value: Tensor) -> Tensor:
    """`masking.mix` on int64 tensors, whose products wrap as uint64's do and whose shifts have to be made logical."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def hash_to_uniforms(keys_N: Tensor, width: int) -> Tensor:
    """(N, width) float32 in [0, 1): row i is the stream of key i, the same on every device."""
    columns = torch.arange(1, width + 1, device=keys_N.device) * _STEP
    bits = _mix(_mix(keys_N)[:, None] + columns)
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


class KeyedDropout(SeededHead):
    """Dropout from keys that were set for the batch: one a protein, told apart by row and by use."""

    def set_keys(self, keys_B: Tensor, stretches_B: Sequence[tuple[int, int]]) -> None:
        """Args: keys_B: int64, one a protein; stretches_B: first row and number of rows of each in the batch."""
        self.keys_B, self.stretches_B, self.uses = keys_B, stretches_B, 0

    def apply_dropout(self, hidden_SNH: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return hidden_SNH
        rows, width = hidden_SNH.shape[-2:]
        self.uses += 1
        keys_B = _mix(self.keys_B + self.uses)
        if rows == len(keys_B):
            keys_N = keys_B
        else:
            keys_N = torch.zeros(rows, dtype=torch.int64, device=keys_B.device)
            for key, (start, count) in zip(keys_B, self.stretches_B, strict=True):
                keys_N[start : start + count] = key + torch.arange(count, device=keys_B.device) * _MIX_2
        kept = hash_to_uniforms(keys_N, width) >= self.dropout
        return hidden_SNH * kept / (1 - self.dropout)


class KeyedFnn(KeyedDropout, Fnn):
    """`heads.Fnn`, on the mean over residues or on each residue."""


class KeyedCnn(KeyedDropout, Cnn):
    """`heads.Cnn`."""


class KeyedLightAttention(KeyedDropout, LightAttention):
    """`heads.LightAttention`."""


class BosHead(KeyedDropout):
    """Dropout, dense D-D, tanh, dropout, linear D-C on the BOS row: transformers' EsmClassificationHead.

    Matrices begin as N(0, 0.02), biases as 0, as transformers has them.
    """

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_in, self.bias_in = self._normal(width, width), _zeros(len(seeds), width, device)
        self.weight_out, self.bias_out = self._normal(width, outputs), _zeros(len(seeds), outputs, device)

    def _normal(self, *shape: int) -> nn.Parameter:
        drawn = [torch.randn(shape, generator=generator, device=self.device) for generator in self.generators]
        return nn.Parameter(torch.stack(drawn) * 0.02)

    def forward(self, batch: FeatureBatch) -> Tensor:
        x_SND = self.apply_dropout(batch.x_ND[None])
        hidden_SND = self.apply_dropout(torch.tanh(x_SND @ self.weight_in + self.bias_in))
        return hidden_SND @ self.weight_out + self.bias_out


class TokenHead(BosHead):
    """Dropout, linear D-C on every residue: the head of transformers' EsmForTokenClassification."""

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super(BosHead, self).__init__(seeds, dropout, device)
        self.weight_out, self.bias_out = self._normal(width, outputs), _zeros(len(seeds), outputs, device)

    def forward(self, batch: FeatureBatch) -> Tensor:
        return self.apply_dropout(batch.x_ND[None]) @ self.weight_out + self.bias_out


def _zeros(num_seeds: int, width: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(num_seeds, 1, width, device=device))


class HeadSpec(NamedTuple):
    """What a head is made of; a fine-tuned model's file holds it.

    Args:
        name: fnn, cnn, light_attention or hf.
        level: labels proteins or residues.
        embed_dim: width of the rows it reads.
        num_outputs: numbers it puts out per protein or residue.
        hidden: its hidden units, where it has any.
        dropout: share of hidden units set to zero while training.
        standardize: z-score the rows first, by moments that the head carries.
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
        if self.level == "residue" or self.name == "light_attention":
            return "residues"
        return "bos" if self.name == "hf" else "mean"


def check_head(name: HeadName, task: Task) -> None:
    """Raises: InputError if a head does not label what the task labels."""
    if name == "cnn" and task.level == "protein":
        raise InputError(
            "head cnn labels residues; a protein task takes fnn, light_attention or hf", code="head.level", head=name
        )
    if name == "light_attention" and task.level == "residue":
        raise InputError(
            "head light_attention labels proteins; a residue task takes fnn, cnn or hf", code="head.level", head=name
        )


class LabelModel(nn.Module):
    """An ESM-2 and a head: packed sequences in, the head's outputs for proteins or residues out.

    Args:
        esm2: the encoder; None where its rows come from elsewhere.
        spec: the head.
        seed: of the head's initial weights.
    """

    def __init__(self, esm2: ESM2 | None, spec: HeadSpec, seed: int = 0) -> None:
        super().__init__()
        self.esm2, self.spec = esm2, spec
        kinds = {"fnn": KeyedFnn, "cnn": KeyedCnn, "light_attention": KeyedLightAttention}
        kind = kinds.get(spec.name) or (TokenHead if spec.level == "residue" else BosHead)
        width, cpu = spec.embed_dim, torch.device("cpu")
        self.head: KeyedDropout = kind((seed,), width, spec.num_outputs, spec.hidden or width, spec.dropout, cpu)
        for parameter in self.head.parameters():
            # DDP wants a gradient's strides in their usual order, that of the axis of one seed included
            parameter.register_hook(lambda gradient: gradient.reshape(-1).view(gradient.shape))
        if spec.standardize:
            self.head.register_buffer("mean_D", torch.zeros(width))
            self.head.register_buffer("scale_D", torch.ones(width))

    def forward(self, tokens_N: Tensor, num_tokens: Sequence[int], keys_B: Tensor | None = None) -> Tensor:
        """Outputs of a packed batch.

        Args:
            tokens_N: token ids, every sequence with its BOS and EOS.
            num_tokens: tokens of each.
            keys_B: dropout keys, wanted while training.
        Returns: (B, C) for proteins, or (R, C) for the residues of all sequences in order.
        """
        hidden_ND = self.esm2.encode(tokens_N, Packed(num_tokens, tokens_N.device, bucketed=True))
        return self.label(hidden_ND, num_tokens, keys_B)

    def label(self, hidden_ND: Tensor, num_tokens: Sequence[int], keys_B: Tensor | None = None) -> Tensor:
        """The head's outputs for the encoder's final rows; in float32 whatever the encoder computes in."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rows_ND, sizes = pool_rows(hidden_ND.float(), num_tokens, self.spec.reads)
            if self.spec.standardize:
                rows_ND = (rows_ND - self.head.mean_D) / self.head.scale_D
            batch, stretches = _spread(rows_ND, sizes, self.head.radius)
            if keys_B is not None:
                self.head.set_keys(keys_B, stretches)
            outputs_NC = self.head(batch)[0]
            real = batch.is_real_N is not None and not self.head.per_protein
            return outputs_NC[batch.is_real_N] if real else outputs_NC


def _spread(rows_ND: Tensor, sizes: list[int], gap: int) -> tuple[FeatureBatch, list[tuple[int, int]]]:
    """Rows with gaps of zeros between proteins, as convolutions want them, and where each protein's rows went."""
    starts = np.cumsum([0, *sizes[:-1]])
    if not gap:
        return FeatureBatch(rows_ND, None, []), list(zip(starts.tolist(), sizes, strict=True))
    zeros = rows_ND.new_zeros(gap, rows_ND.shape[1])
    parts, stretches = [zeros], [gap] * (2 * len(sizes) + 1)
    stretches[1::2] = sizes
    for rows in rows_ND.split(sizes):
        parts += [rows, zeros]
    is_real_N = torch.cat([torch.full((size,), place % 2 == 1) for place, size in enumerate(stretches)])
    first = starts + gap * np.arange(1, len(sizes) + 1)
    batch = FeatureBatch(torch.cat(parts), is_real_N.to(rows_ND.device), stretches)
    return batch, list(zip(first.tolist(), sizes, strict=True))
