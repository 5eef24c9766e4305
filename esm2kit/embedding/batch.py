"""Embed the sequences of one batch, and convert the representations to the arrays that are written to the files."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.models.encoder import Encoder
from esm2kit.models.pooling import Pooling, pool, pool_packed
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.windows import Windowing


class Output(NamedTuple):
    """Content of one file.

    Args:
        file: file name without `<name>_` and the suffix.
        layer: index of the layer.
        pooling: "mean" over residues or "bos" for one vector per protein, "none" or "logits" for one per residue.
        width: number of floats per vector.
    """

    file: str
    layer: int
    pooling: str
    width: int

    @property
    def reads(self) -> Pooling:
        """How the rows of a protein are pooled."""
        return self.pooling if self.pooling in ("mean", "bos") else "residues"


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
    if encoder.device.type == "cuda" and max(map(len, sequences)) <= windowing.max_residues:
        with torch.cuda.stream(encoder.stream()):
            return _embed_on_device(encoder, sequences, outputs, dtype)
    short = [index for index, sequence in enumerate(sequences) if len(sequence) <= windowing.max_residues]
    rows_of = dict(zip(short, _represent(encoder, [sequences[index] for index in short], outputs), strict=True))
    arrays: list[list[np.ndarray]] = [[] for _ in outputs]
    for index, sequence in enumerate(sequences):
        rows = rows_of.pop(index) if index in rows_of else _represent_long(encoder, sequence, outputs, windowing)
        for array, output, rows_TD in zip(arrays, outputs, rows, strict=True):
            array.append(_to_array(pool(rows_TD, output.reads), output, dtype))
    return arrays


def _embed_together(
    encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output], windowing: Windowing, dtype: str
) -> list[list[np.ndarray]]:
    """Embed sequences and the windows of long ones in a single call of the encoder, which forms its own batches."""
    spans = [windowing.split(len(sequence)) for sequence in sequences]
    pieces = [sequence[slice(*span)] for sequence, parts in zip(sequences, spans, strict=True) for span in parts]
    represented = iter(_represent(encoder, pieces, outputs))
    arrays: list[list[np.ndarray]] = [[] for _ in outputs]
    for sequence, parts in zip(sequences, spans, strict=True):
        found = [next(represented) for _ in parts]
        rows = found[0] if len(found) == 1 else _average_windows(zip(parts, found, strict=True), len(sequence), outputs)
        for array, output, rows_TD in zip(arrays, outputs, rows, strict=True):
            array.append(_to_array(pool(rows_TD, output.reads), output, dtype))
    return arrays


def _embed_on_device(
    encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output], dtype: str
) -> list[list[np.ndarray]]:
    """Embed proteins that need no windows: pool and convert on the device, then copy each output once."""
    tokens_N, num_tokens = _pack(sequences)
    hidden = encoder.encode(tokens_N, num_tokens, sorted({output.layer for output in outputs}), on_device=True)
    copies = []
    for output in outputs:
        rows_ND = hidden[output.layer]
        if output.pooling == "logits":
            rows_ND = encoder.logits(rows_ND, on_device=True)
        rows = pool_packed(rows_ND, num_tokens, output.reads).to(getattr(torch, dtype))
        on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        copies.append(on_host.copy_(rows, non_blocking=True))
    if encoder.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    sizes = np.cumsum([tokens - 2 for tokens in num_tokens])[:-1]
    arrays = []
    for output, on_host in zip(outputs, copies, strict=True):
        array = _check_float16(
            on_host.numpy().copy(), output
        )  # a copy: batches wait to be written, and pinned memory is scarce
        arrays.append(np.split(array, sizes) if output.reads == "residues" else list(array))
    return arrays


def _pack(sequences: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Concatenate the token ids of sequences, each with BOS and EOS; also return the number of tokens of each."""
    num_tokens = [len(sequence) + 2 for sequence in sequences]
    tokens_N = np.empty(sum(num_tokens), dtype=np.int64)
    ends = np.cumsum(num_tokens)
    starts = ends - num_tokens
    tokens_N[starts], tokens_N[ends - 1] = BOS_IDX, EOS_IDX
    for start, end, sequence in zip(starts, ends, sequences, strict=True):
        tokens_N[start + 1 : end - 1] = encode(sequence)
    return torch.from_numpy(tokens_N), num_tokens


def _represent(encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output]) -> list[list[Tensor]]:
    """Compute, per sequence and output, the rows (1 + residues, width) of BOS and the residues, without EOS."""
    if not sequences:
        return []
    tokens_N, num_tokens = _pack(sequences)
    layers = sorted({output.layer for output in outputs})
    hidden = encoder.encode(tokens_N, num_tokens, layers)
    rows = [
        encoder.logits(hidden[output.layer]) if output.pooling == "logits" else hidden[output.layer]
        for output in outputs
    ]
    split = [rows_ND.split(num_tokens) for rows_ND in rows]
    return [[rows_TD[:-1] for rows_TD in per_output] for per_output in zip(*split, strict=True)]


def _represent_long(encoder: Encoder, sequence: str, outputs: Sequence[Output], windowing: Windowing) -> list[Tensor]:
    """Compute the rows of one long protein, each row as the mean over the windows that contain it."""
    spans = windowing.split(len(sequence))
    together = max(1, windowing.batch_tokens // (windowing.max_residues + 2))
    groups = (spans[first : first + together] for first in range(0, len(spans), together))
    windows = (
        pair
        for group in groups
        for pair in zip(group, _represent(encoder, [sequence[slice(*span)] for span in group], outputs), strict=True)
    )
    return _average_windows(windows, len(sequence), outputs)


def _average_windows(
    windows: Iterable[tuple[tuple[int, int], list[Tensor]]], num_residues: int, outputs: Sequence[Output]
) -> list[Tensor]:
    """Average the rows of a protein over its windows, given as (start, stop) with the rows of each output."""
    sums = [torch.zeros(1 + num_residues, output.width) for output in outputs]
    count_T1 = torch.zeros(1 + num_residues, 1)
    for (start, stop), rows in windows:
        for total_TD, rows_TD in zip(sums, rows, strict=True):
            total_TD[0] += rows_TD[0]
            total_TD[1 + start : 1 + stop] += rows_TD[1:]
        count_T1[0] += 1
        count_T1[1 + start : 1 + stop] += 1
    return [total_TD.div_(count_T1) for total_TD in sums]


def _to_array(values: Tensor, output: Output, dtype: str) -> np.ndarray:
    return _check_float16(values.numpy().astype(dtype, order="C"), output)


def _check_float16(array: np.ndarray, output: Output) -> np.ndarray:
    if array.dtype == np.float16 and not np.isfinite(array).all():
        raise InputError(
            f"layer {output.layer} has values above 65504, the largest float16. Choose dtype float32.",
            code="embed.float16",
            layer=output.layer,
        )
    return array
