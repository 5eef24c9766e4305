"""Cluster sampling: the members of each cluster, and the training sample of a cluster in an epoch.

An epoch visits each cluster once. Each visit samples one member, one window of it and one mask. All three are pure
functions of (seed, epoch, cluster), so every rank and worker can compute any sample without communication.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.core.rng import GOLDEN, mix, random_below, stream_key
from esm2kit.sequences.dataset import read_manifest

OFFSETS, MEMBERS, REPRESENTATIVES = "cluster_offsets.npy", "cluster_members.npy", "cluster_representatives.npy"
MAX_RESIDUES = 1022  # 1,024 tokens with BOS and EOS

_DRAW_STREAM = 1


class ClusterIndex:
    """The clusters of a preprocessed dataset, memory-mapped; opening takes the same time at any size."""

    def __init__(
        self,
        offsets: np.ndarray,
        member_rows: np.ndarray,
        representative_rows: np.ndarray,
        folder: Path | None = None,
    ) -> None:
        """Create an index from arrays; `open` maps one from a folder.

        Args:
            offsets: (C + 1,) int64; cluster c has the members `member_rows[offsets[c] : offsets[c + 1]]`, at least one.
            member_rows: int64 rows of train.arrow, cluster by cluster.
            representative_rows: (C,) int64 rows of train.arrow.
            folder: The folder that the arrays are mapped from, if any.
        """
        self.offsets = offsets
        self.member_rows = member_rows
        self.representative_rows = representative_rows
        self.folder = folder

    def __reduce__(self) -> tuple:
        # a data worker maps the files itself; pickling UniRef's arrays would copy gigabytes to each worker
        arrays = (self.offsets, self.member_rows, self.representative_rows)
        return (type(self), arrays) if self.folder is None else (type(self).open, (self.folder,))

    @classmethod
    def open(cls, folder: Path) -> "ClusterIndex":
        """Open the index that `esm2kit preprocess` wrote.

        Args:
            folder: Folder of the dataset.

        Returns:
            The memory-mapped index.

        Raises:
            InputError: The dataset is unfinished or damaged.
        """
        folder = expand_path(folder)
        read_manifest(folder)
        try:
            arrays = [np.load(folder / name, mmap_mode="r") for name in (OFFSETS, MEMBERS, REPRESENTATIVES)]
        except Exception as error:  # a damaged header makes numpy raise SyntaxError, TokenError and others
            raise InputError(
                f"{folder}: cannot read the cluster index ({error}). Run `esm2kit preprocess` again with --overwrite.",
                code="dataset.damaged",
                path=folder,
            ) from error
        offsets, member_rows, representative_rows = arrays
        if offsets.size != representative_rows.size + 1 or offsets[-1] != member_rows.size:
            raise InputError(
                f"{folder}: the files of the cluster index disagree. Run `esm2kit preprocess` again with --overwrite.",
                code="dataset.damaged",
                path=folder,
            )
        return cls(*arrays, folder)

    @property
    def num_clusters(self) -> int:
        """Number of clusters, C."""
        return self.representative_rows.size

    def members(self, cluster: int) -> np.ndarray:
        """Return the rows of a cluster's members in train.arrow, ascending; a view, not a copy."""
        return self.member_rows[self.offsets[cluster] : self.offsets[cluster + 1]]

    def num_members(self) -> np.ndarray:
        """Return the number of members per cluster, (C,) int64."""
        return np.diff(self.offsets)


class TrainingSample(NamedTuple):
    """A training sample: a window of one row of train.arrow, and the key of its mask."""

    cluster: int
    row: int  # row of train.arrow
    start: int  # the window holds the residues start <= residue < stop
    stop: int
    mask_key: int  # key for masking.mask_tokens


def draw_sample(
    seed: int,
    epoch: int,
    cluster: int,
    index: ClusterIndex,
    num_residues: np.ndarray,
    max_residues: int = MAX_RESIDUES,
) -> TrainingSample:
    """Draw the training sample of a cluster in an epoch.

    Args:
        seed: The seed of the run.
        epoch: Pass over the clusters, from 0.
        cluster: Index of the cluster.
        index: The clusters.
        num_residues: Residues per row of train.arrow, an array or any object that is indexed by row.
        max_residues: Maximum window in residues, without BOS and EOS.

    Returns:
        A member, a window of it and the key of its mask. All members have equal probability, as have all
        T - max_residues + 1 windows of a member with T residues.
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
