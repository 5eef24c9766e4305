"""From the sequences of one batch to what the files hold: representations cut, averaged and stored."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.models.encoder import Encoder
from esm2kit.models.pooling import Reads, pool
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.windows import Segments


class Output(NamedTuple):
    """One file's content.

    Args:
        file: what follows `<name>_`, without the suffix.
        layer: whose representations.
        pooling: "mean" over residues or "bos" (one vector a protein), "none" or "logits" (one a residue).
        width: floats a vector.
    """

    file: str
    layer: int
    pooling: str
    width: int

    @property
    def reads(self) -> Reads:
        return self.pooling if self.pooling in ("mean", "bos") else "residues"


@torch.inference_mode()
def embed_batch(
    encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output], segments: Segments, dtype: str
) -> list[list[np.ndarray]]:
    """Every output's array for every sequence.

    Args:
        encoder: the model.
        sequences: residues, best sorted by their number.
        outputs: what is asked for.
        segments: how long ones are cut.
        dtype: "float32" or "float16".
    Returns: for each output, for each sequence, (D,) or (residues, D).
    Raises: InputError if a value is beyond float16.
    """
    short = [index for index, sequence in enumerate(sequences) if len(sequence) <= segments.max_residues]
    rows_of = dict(zip(short, _represent(encoder, [sequences[index] for index in short], outputs), strict=True))
    arrays: list[list[np.ndarray]] = [[] for _ in outputs]
    for index, sequence in enumerate(sequences):
        rows = rows_of.pop(index) if index in rows_of else _represent_long(encoder, sequence, outputs, segments)
        for array, output, rows_TD in zip(arrays, outputs, rows, strict=True):
            array.append(_store(pool(rows_TD, output.reads), output, dtype))
    return arrays


def _represent(encoder: Encoder, sequences: Sequence[str], outputs: Sequence[Output]) -> list[list[Tensor]]:
    """For each sequence, for each output, the rows (1 + residues, width): BOS, then the residues; EOS is left out."""
    if not sequences:
        return []
    num_tokens = [len(sequence) + 2 for sequence in sequences]
    tokens_N = np.empty(sum(num_tokens), dtype=np.int64)
    ends = np.cumsum(num_tokens)
    starts = ends - num_tokens
    tokens_N[starts], tokens_N[ends - 1] = BOS_IDX, EOS_IDX
    for start, end, sequence in zip(starts, ends, sequences, strict=True):
        tokens_N[start + 1 : end - 1] = encode(sequence)
    layers = sorted({output.layer for output in outputs})
    hidden = encoder.encode(torch.from_numpy(tokens_N), num_tokens, layers)
    logits = [encoder.logits(hidden[output.layer]) if output.pooling == "logits" else None for output in outputs]
    wanted = [hidden[output.layer] if own is None else own for output, own in zip(outputs, logits, strict=True)]
    return [[rows_ND[start : end - 1] for rows_ND in wanted] for start, end in zip(starts, ends, strict=True)]


def _represent_long(encoder: Encoder, sequence: str, outputs: Sequence[Output], segments: Segments) -> list[Tensor]:
    """The same for one protein by windows, each row the mean over the windows it is in."""
    spans = segments.of(len(sequence))
    together = max(1, segments.batch_tokens // (segments.max_residues + 2))
    sums = [torch.zeros(1 + len(sequence), output.width) for output in outputs]
    count_T1 = torch.zeros(1 + len(sequence), 1)
    for first in range(0, len(spans), together):
        group = spans[first : first + together]
        for (start, stop), rows in zip(
            group, _represent(encoder, [sequence[slice(*span)] for span in group], outputs), strict=True
        ):
            for total_TD, rows_TD in zip(sums, rows, strict=True):
                total_TD[0] += rows_TD[0]
                total_TD[1 + start : 1 + stop] += rows_TD[1:]
            count_T1[0] += 1
            count_T1[1 + start : 1 + stop] += 1
    return [total_TD.div_(count_T1) for total_TD in sums]


def _store(values: Tensor, output: Output, dtype: str) -> np.ndarray:
    array = values.numpy().astype(dtype, order="C")
    if dtype == "float16" and not np.isfinite(array).all():
        raise InputError(f"layer {output.layer} has values beyond float16's 65504: choose dtype float32")
    return array
