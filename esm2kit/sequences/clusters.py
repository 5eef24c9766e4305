"""Clusters: which sequences may stand for each, in what order an epoch visits them, and which one is drawn.

An epoch visits every cluster once; each visit draws one member, one window of it and one mask. All three are pure
functions of (seed, epoch, cluster), so every rank and worker can work out any sample without asking another.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.rng import GOLDEN, mix, random_below, stream_key
from esm2kit.sequences.dataset import read_manifest

OFFSETS, MEMBERS, REPRESENTATIVES = "cluster_offsets.npy", "cluster_members.npy", "cluster_representatives.npy"
MAX_RESIDUES = 1022  # 1,024 tokens with BOS and EOS

_DRAW_STREAM = 1


class ClusterIndex:
    """The clusters of a preprocessed folder, memory-mapped; opening it costs the same at any size."""

    def __init__(
        self,
        offsets: np.ndarray,
        member_rows: np.ndarray,
        representative_rows: np.ndarray,
        folder: Path | None = None,
    ) -> None:
        """Args:
        offsets: (C + 1,) int64; cluster c's members are `member_rows[offsets[c] : offsets[c + 1]]`, at least one.
        member_rows: int64 rows of train.arrow, cluster by cluster.
        representative_rows: (C,) int64 rows of train.arrow.
        folder: where they are mapped from.
        """
        self.offsets = offsets
        self.member_rows = member_rows
        self.representative_rows = representative_rows
        self.folder = folder

    def __reduce__(self) -> tuple:
        # a data worker maps the files itself: pickled, UniRef's arrays would go to each as gigabytes
        arrays = (self.offsets, self.member_rows, self.representative_rows)
        return (type(self), arrays) if self.folder is None else (type(self).open, (self.folder,))

    @classmethod
    def open(cls, folder: Path) -> "ClusterIndex":
        """The index that `esm2kit preprocess` wrote.

        Raises: InputError if the folder is not a finished output of preprocess.
        """
        folder = Path(folder)
        read_manifest(folder)
        try:
            arrays = [np.load(folder / name, mmap_mode="r") for name in (OFFSETS, MEMBERS, REPRESENTATIVES)]
        except Exception as error:  # a damaged header makes numpy raise SyntaxError, TokenError and others
            raise InputError(
                f"{folder}: cannot read the cluster index ({error}): preprocess again",
                code="dataset.damaged",
                path=folder,
            ) from error
        offsets, member_rows, representative_rows = arrays
        if offsets.size != representative_rows.size + 1 or offsets[-1] != member_rows.size:
            raise InputError(
                f"{folder}: the cluster index does not fit together: preprocess again with --overwrite",
                code="dataset.damaged",
                path=folder,
            )
        return cls(*arrays, folder)

    @property
    def num_clusters(self) -> int:
        return self.representative_rows.size

    def members(self, cluster: int) -> np.ndarray:
        """Rows of train.arrow a draw of this cluster may give, ascending; a view, not a copy."""
        return self.member_rows[self.offsets[cluster] : self.offsets[cluster + 1]]

    def num_members(self) -> np.ndarray:
        """(C,) int64 members per cluster."""
        return np.diff(self.offsets)


class TrainingSample(NamedTuple):
    """One training sample before its residues are read."""

    cluster: int
    row: int  # of train.arrow
    start: int  # window of residues: start <= residue < stop
    stop: int
    mask_key: int  # for masking.mask_tokens


def draw_sample(
    seed: int,
    epoch: int,
    cluster: int,
    index: ClusterIndex,
    num_residues: np.ndarray,
    max_residues: int = MAX_RESIDUES,
) -> TrainingSample:
    """The sample that cluster `cluster` gives in epoch `epoch`.

    Args:
        seed, epoch, cluster: all that the sample depends on.
        index: the clusters.
        num_residues: residues of each row of train.arrow; anything indexed by row will do.
        max_residues: longest window, BOS and EOS not counted.
    Returns: a member, each with probability 1/k of k members; a window of it, each of the T - max_residues + 1 windows
        equally likely; and the key of its mask.
    """
    cluster = int(cluster)
    key = stream_key(seed, epoch, cluster, _DRAW_STREAM)
    first, stop = int(index.offsets[cluster]), int(index.offsets[cluster + 1])
    row = int(index.member_rows[first + random_below(mix(key + GOLDEN), stop - first)])
    residues = int(num_residues[row])
    if residues <= max_residues:
        return TrainingSample(cluster, row, 0, residues, mix(key + 3 * GOLDEN))
    start = random_below(mix(key + 2 * GOLDEN), residues - max_residues + 1)
    return TrainingSample(cluster, row, start, start + max_residues, mix(key + 3 * GOLDEN))
