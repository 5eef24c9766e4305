"""Exact search of the nearest vectors by cosine, in tiles, so that neither set of vectors has to fit in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.sequences.homologs import Hits

QUERY_ROWS, REFERENCE_ROWS = 4096, 4096  # of a tile: its cosines are 134 MB
# Vectors of one sequence differ in the seventh digit between batches, so that more digits would decide ties by chance.
STEPS = 1_000_000  # of a cosine of 1
_ROW_BITS = 40
_NONE = np.iinfo(np.int64).min


class Vectors(NamedTuple):
    """Vectors that are read in blocks.

    Args:
        count: number of proteins.
        read: reads the vectors (N, D) of consecutive proteins, from `start` to before `stop`.
    """

    count: int
    read: Callable[[int, int], np.ndarray]

    @classmethod
    def from_array(cls, values_PD: np.ndarray) -> "Vectors":
        """Wrap vectors that are in memory."""
        return cls(len(values_PD), lambda start, stop: values_PD[start:stop])

    def blocks(self, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row of each block and its vectors (N, D)."""
        for start in range(0, self.count, num_rows):
            yield start, self.read(start, min(start + num_rows, self.count))


def compute_centre(vectors: Vectors) -> np.ndarray:
    """Compute the mean of vectors.

    Args:
        vectors: those of the reference.

    Returns:
        (D,) float64.

    Raises:
        InputError: all vectors are equal, so that none has a direction from their mean.
    """
    total = np.float64(0)
    low = high = None
    for _, block_ND in vectors.blocks(REFERENCE_ROWS):
        total = total + block_ND.sum(0, dtype=np.float64)
        ends = block_ND.min(0), block_ND.max(0)
        low, high = ends if low is None else (np.minimum(low, ends[0]), np.maximum(high, ends[1]))
    if low is None or np.array_equal(low, high):
        raise InputError(
            f"the {vectors.count} reference proteins have one vector only, which is their mean. Use --centre false to "
            "compare with the vectors themselves, or pass a larger reference.",
            code="neighbours.one-vector",
            found=vectors.count,
        )
    return total / vectors.count


def find_nearest(
    queries: Vectors,
    references: Vectors,
    count: int,
    centre_D: np.ndarray | None = None,
    group_Q: np.ndarray | None = None,
    group_R: np.ndarray | None = None,
    note_done: Callable[[int], None] = lambda done: None,
) -> Hits:
    """Find the nearest reference vectors of each query by cosine; equal to a comparison of all pairs.

    Cosines are rounded to six decimals. Those that are then equal are in the order of the reference.

    Args:
        queries: Q vectors.
        references: R vectors.
        count: K, number of neighbours.
        centre_D: (D,) vector that is subtracted from all vectors before. None subtracts nothing.
        group_Q: (Q,) a reference of the same group is no neighbour. None allows all.
        group_R: (R,) the groups of the references.
        note_done: called with the number of compared pairs.

    Returns:
        The neighbours.
    """
    keys, done = [], 0
    for query_start, query_ND in queries.blocks(QUERY_ROWS):
        unit_QD = _normalise(query_ND, centre_D)
        best_QK = np.full((len(unit_QD), count), _NONE)
        for start, reference_ND in references.blocks(REFERENCE_ROWS):
            cosine_QR = unit_QD @ _normalise(reference_ND, centre_D).T
            rows_R = np.arange(start, start + len(reference_ND))
            # one integer per pair, which is larger for a larger cosine, and among equal ones for an earlier row
            key_QR = (np.rint(cosine_QR * STEPS).astype(np.int64) << _ROW_BITS) - rows_R
            if group_Q is not None and group_R is not None:
                same_QR = group_Q[query_start : query_start + len(unit_QD), None] == group_R[None, rows_R]
                key_QR[same_QR] = _NONE
            joined = np.concatenate([best_QK, key_QR], axis=1)
            best_QK = np.partition(joined, -count, axis=1)[:, -count:]
            done += key_QR.size
            note_done(done)
        keys.append(np.sort(best_QK, axis=1)[:, ::-1])
    key_QK = np.concatenate(keys) if keys else np.empty((0, count), dtype=np.int64)
    absent_QK = key_QK == _NONE
    rows_QK = np.where(absent_QK, -1, -key_QK & ((1 << _ROW_BITS) - 1))
    steps_QK = np.where(absent_QK, 0, (key_QK + rows_QK) >> _ROW_BITS)
    return Hits(rows_QK, steps_QK / STEPS)


def _normalise(vectors_ND: np.ndarray, centre_D: np.ndarray | None) -> np.ndarray:
    """Subtract the centre and scale to length 1, in float64; a vector of zeros stays one."""
    vectors_ND = vectors_ND.astype(np.float64)
    if centre_D is not None:
        vectors_ND -= centre_D
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(length_N1 == 0, 1, length_N1)


def number_groups(queries: Sequence[bytes], references: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Number the sequences of two sets by their digests, so that equal sequences have equal numbers.

    Args:
        queries: digests of Q sequences.
        references: digests of R sequences.

    Returns:
        (Q,) and (R,) numbers.
    """
    numbers: dict[bytes, int] = {}
    group_R = np.array([numbers.setdefault(digest, len(numbers)) for digest in references], dtype=np.int64)
    group_Q = np.array([numbers.setdefault(digest, len(numbers)) for digest in queries], dtype=np.int64)
    return group_Q, group_R
