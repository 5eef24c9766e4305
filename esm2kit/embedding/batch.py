"""Embed the sequences of one batch, and convert the representations to the arrays that are written to the files."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.embedding.config import POOLINGS
from esm2kit.models.encoder import Encoder
from esm2kit.models.packing import to_device
from esm2kit.models.pooling import Pooling, pool, pool_packed
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.windows import Windowing


class Output(NamedTuple):
    """Content of one file.

    Args:
        file: file name without `<name>_` and the suffix.
        layer: index of the layer.
        pooling: "mean", "max" or "mean+max" over residues or "bos" for one vector per protein, "none" or "logits" for
            one per residue.
        width: number of floats per vector.
    """

    file: str
    layer: int
    pooling: str
    width: int

    @property
    def reads(self) -> Pooling:
        """How the rows of a protein are pooled."""
        return self.pooling if self.pooling in POOLINGS else "residues"

    @property
    def row_width(self) -> int:
        """Number of floats of a row before it is pooled."""
        return self.width // 2 if self.pooling == "mean+max" else self.width

    def num_vectors(self, num_residues: int) -> int:
        """Return the number of vectors of a protein."""
        return num_residues if self.reads == "residues" else 1


def count_columns(pooling: str, embed_dim: int) -> int:
    """Return the number of floats per vector of a model of width embed_dim."""
    return 2 * embed_dim if pooling == "mean+max" else embed_dim


class Tokens(NamedTuple):
    """Concatenated token ids of sequences, each with BOS and EOS, and the number of tokens of each."""

    tokens_N: Tensor
    num_tokens: list[int]


class LongProtein(NamedTuple):
    """Windows of a protein that is too long for one forward pass: groups of them, each with its spans of residues."""

    num_residues: int
    groups: list[tuple[Tokens, list[tuple[int, int]]]]


class PackedBatch(NamedTuple):
    """A batch as the model reads it: the proteins that need no windows, then the long ones.

    Args:
        places: position in the batch of each protein, in this order.
        num_residues: residues of each protein, in this order.
        short: tokens of the proteins that need no windows; None if there is none.
        long: the other proteins.
    """

    places: list[int]
    num_residues: list[int]
    short: Tokens | None
    long: list[LongProtein]


def pack_batch(sequences: Sequence[str], windowing: Windowing) -> PackedBatch:
    """Tokenise the sequences of a batch.

    Args:
        sequences: amino-acid sequences.
        windowing: how long sequences are split.

    Returns:
        The batch.
    """
    limit = windowing.max_residues
    short = [place for place, sequence in enumerate(sequences) if len(sequence) <= limit]
    long = [place for place, sequence in enumerate(sequences) if len(sequence) > limit]
    return PackedBatch(
        [*short, *long],
        [len(sequences[place]) for place in (*short, *long)],
        _pack([sequences[place] for place in short]) if short else None,
        [_pack_long(sequences[place], windowing) for place in long],
    )


def _pack_long(sequence: str, windowing: Windowing) -> LongProtein:
    spans = windowing.split(len(sequence))
    together = max(1, windowing.batch_tokens // (windowing.max_residues + 2))
    groups = [spans[first : first + together] for first in range(0, len(spans), together)]
    return LongProtein(len(sequence), [(_pack([sequence[slice(*span)] for span in group]), group) for group in groups])


def _pack(sequences: Sequence[str]) -> Tokens:
    """Concatenate the token ids of sequences, each with BOS and EOS."""
    num_tokens = [len(sequence) + 2 for sequence in sequences]
    tokens_N = np.empty(sum(num_tokens), dtype=np.int64)
    ends = np.cumsum(num_tokens)
    starts = ends - num_tokens
    tokens_N[starts], tokens_N[ends - 1] = BOS_IDX, EOS_IDX
    for start, end, sequence in zip(starts.tolist(), ends.tolist(), sequences, strict=True):
        tokens_N[start + 1 : end - 1] = encode(sequence)
    return Tokens(torch.from_numpy(tokens_N), num_tokens)


@torch.inference_mode()
def embed_batch(
    encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output], windowing: Windowing, dtype: str
) -> list[list[np.ndarray]]:
    """Embed the sequences of a batch.

    Args:
        encoder: the model.
        sequences: amino-acid sequences, preferably sorted by length.
        outputs: requested outputs.
        windowing: how long sequences are split.
        dtype: "float32" or "float16".

    Returns:
        For each output, one array per sequence, (D,) or (residues, D).

    Raises:
        InputError: a value exceeds the range of float16.
    """
    if encoder.group_tokens:
        return _embed_together(encoder, sequences, outputs, windowing, dtype)
    packed = pack_batch(sequences, windowing)
    if encoder.device.type != "cpu":
        parts = [torch.cat(rows).cpu().numpy() for rows in embed_on_device(encoder, packed, outputs, dtype)]
        return [
            split_by_protein(check_float16(rows, output), packed, output)
            for rows, output in zip(parts, outputs, strict=True)
        ]
    arrays: list[list[np.ndarray]] = [[np.empty(0)] * len(sequences) for _ in outputs]
    for array, output, rows in zip(arrays, outputs, _represent_proteins(encoder, packed, outputs), strict=True):
        for place, rows_TD in zip(packed.places, rows, strict=True):
            array[place] = _to_array(pool(rows_TD, output.reads), output, dtype)
    return arrays


def _embed_together(
    encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output], windowing: Windowing, dtype: str
) -> list[list[np.ndarray]]:
    """Embed sequences and the windows of long ones in a single call of the encoder, which forms its own batches."""
    spans = [windowing.split(len(sequence)) for sequence in sequences]
    tokens = _pack([sequence[slice(*span)] for sequence, parts in zip(sequences, spans, strict=True) for span in parts])
    split = [rows_ND.split(tokens.num_tokens) for rows_ND in _represent(encoder, tokens, outputs, on_device=False)]
    represented = iter(zip(*split, strict=True))
    arrays: list[list[np.ndarray]] = [[] for _ in outputs]
    for sequence, parts in zip(sequences, spans, strict=True):
        found = [[rows_TD[:-1] for rows_TD in next(represented)] for _ in parts]
        if len(found) > 1:
            found = [_average_windows(zip(parts, found, strict=True), len(sequence), outputs, torch.device("cpu"))]
        for array, output, rows_TD in zip(arrays, outputs, found[0], strict=True):
            array.append(_to_array(pool(rows_TD, output.reads), output, dtype))
    return arrays


def _represent_proteins(encoder: Encoder, packed: PackedBatch, outputs: Sequence[Output]) -> list[list[Tensor]]:
    """Compute, per output and protein, the rows (1 + residues, width) of BOS and the residues, without EOS."""
    found: list[list[Tensor]] = [[] for _ in outputs]
    if packed.short:
        for rows, rows_ND in zip(found, _represent(encoder, packed.short, outputs), strict=True):
            rows.extend(rows_TD[:-1] for rows_TD in rows_ND.split(packed.short.num_tokens))
    for protein in packed.long:
        for rows, rows_TD in zip(found, _represent_long(encoder, protein, outputs), strict=True):
            rows.append(rows_TD)
    return found


@torch.inference_mode()
def embed_on_device(encoder: Encoder, packed: PackedBatch, outputs: Sequence[Output], dtype: str) -> list[list[Tensor]]:
    """Embed a batch, pool it and convert it to the stored type, all on the device; nothing waits for the device.

    Args:
        encoder: the model.
        packed: the batch.
        outputs: requested outputs.
        dtype: "float32" or "float16".

    Returns:
        For each output, parts (rows, width) whose concatenation has the proteins in the order of `packed`.
    """
    stored = getattr(torch, dtype)
    found: list[list[Tensor]] = [[] for _ in outputs]
    if packed.short:
        for parts, output, rows_ND in zip(found, outputs, _represent(encoder, packed.short, outputs), strict=True):
            parts.append(pool_packed(rows_ND, packed.short.num_tokens, output.reads).to(stored))
    for protein in packed.long:
        for parts, output, rows_TD in zip(found, outputs, _represent_long(encoder, protein, outputs), strict=True):
            rows = pool(rows_TD, output.reads)
            parts.append((rows if output.reads == "residues" else rows[None]).to(stored))
    return found


def split_by_protein(rows: np.ndarray, packed: PackedBatch, output: Output) -> list[np.ndarray]:
    """Split the rows of an output into one view per protein, (D,) or (residues, D), in the order of the batch."""
    views: list[np.ndarray] = [rows] * len(packed.places)
    if output.reads != "residues":
        for place, vector in zip(packed.places, rows, strict=True):
            views[place] = vector
        return views
    start = 0
    for place, num_residues in zip(packed.places, packed.num_residues, strict=True):
        views[place] = rows[start : start + num_residues]
        start += num_residues
    return views


def _represent(encoder: Encoder, tokens: Tokens, outputs: Sequence[Output], on_device: bool = True) -> list[Tensor]:
    """Compute, per output, the rows (N, width) of all tokens; on the device, or in float32 on the CPU."""
    hidden = encoder.encode(*tokens, sorted({output.layer for output in outputs}), on_device)
    return [
        encoder.logits(hidden[output.layer], on_device) if output.pooling == "logits" else hidden[output.layer]
        for output in outputs
    ]


def _represent_long(encoder: Encoder, protein: LongProtein, outputs: Sequence[Output]) -> list[Tensor]:
    """Compute the rows of one long protein on the device, each row as the mean over the windows that contain it."""
    windows = (
        (span, [rows_TD[:-1] for rows_TD in rows])
        for tokens, spans in protein.groups
        for span, *rows in zip(
            spans,
            *(rows_ND.split(tokens.num_tokens) for rows_ND in _represent(encoder, tokens, outputs)),
            strict=True,
        )
    )
    return _average_windows(windows, protein.num_residues, outputs, encoder.device)


def _average_windows(
    windows: Iterable[tuple[tuple[int, int], list[Tensor]]],
    num_residues: int,
    outputs: Sequence[Output],
    device: torch.device,
) -> list[Tensor]:
    """Average the rows of a protein over its windows, given as (start, stop) with each output's rows; no call waits."""
    sums = [torch.zeros(1 + num_residues, output.row_width, device=device) for output in outputs]
    count_T1 = torch.zeros(1 + num_residues, 1)
    for (start, stop), rows in windows:
        for total_TD, rows_TD in zip(sums, rows, strict=True):
            total_TD[0] += rows_TD[0]
            total_TD[1 + start : 1 + stop] += rows_TD[1:]
        count_T1[0] += 1
        count_T1[1 + start : 1 + stop] += 1
    count_T1 = to_device(count_T1, device)
    return [total_TD.div_(count_T1) for total_TD in sums]


def _to_array(values: Tensor, output: Output, dtype: str) -> np.ndarray:
    return check_float16(values.numpy().astype(dtype, order="C"), output)


def check_float16(array: np.ndarray, output: Output) -> np.ndarray:
    """Return the array; raise InputError if float16 cannot represent a value."""
    if array.dtype == np.float16 and not np.isfinite(array).all():
        raise float16_error(output)
    return array


def float16_error(output: Output) -> InputError:
    """The error for a value beyond the range of float16."""
    return InputError(
        f"layer {output.layer} has values above 65504, the largest float16. Choose dtype float32.",
        code="embed.float16",
        layer=output.layer,
    )
