"""Split staged records by cluster and write one store per split."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.rng import permutation
from esm2kit.preprocessing.ingest import StagedFasta, write_with_keys
from esm2kit.preprocessing.join import Engine, JoinedClusters, NpyWriter, create_unique_view
from esm2kit.sequences import clusters
from esm2kit.sequences.store import read_batches

Counts = dict[str, int]

INDEX_FILES = (clusters.OFFSETS, clusters.MEMBERS, clusters.REPRESENTATIVES)
_CLUSTERS_AT_ONCE = 1 << 20


class Splitter:
    """Writes `<split>.arrow` and the cluster index to `<work>/final`, and `<split>.keys.parquet` to `<work>`."""

    def __init__(self, work: Path) -> None:
        self.work, self.final = work, work / "final"

    def keys(self, split: str) -> Path:
        """Return the path of a split's keys."""
        return self.work / f"{split}.keys.parquet"

    def store(self, split: str) -> Path:
        """Return the path of a split's store."""
        return self.final / f"{split}.arrow"

    def add_held_out(self, engine: Engine, staged: StagedFasta, split: str) -> tuple[Counts, int]:
        """Write a held-out set that was passed as FASTA; returns its counts and the number of repeated records."""
        if marker := self._read_marker(split):
            return marker["counts"], marker["repeats"]
        repeats = create_unique_view(engine, split, staged)
        kept = np.zeros(staged.num_records, dtype=bool)
        for (rows,) in engine.fetch_arrays(f"SELECT row FROM {split}"):
            kept[rows] = True
        return self._write_split(staged, kept, split, {}, repeats, may_move=True), repeats

    def split_clusters(
        self, records: StagedFasta, joined: JoinedClusters, val_size: int | float, test_size: int | float, seed: int
    ) -> dict[str, Counts]:
        """Hold out clusters, write all splits, and renumber the rows of the train set.

        Args:
            records: The staged records.
            joined: Their clusters.
            val_size: Validation clusters, as a number (int) or a share (float).
            test_size: Test clusters, as a number (int) or a share (float).
            seed: Seed of the permutation of clusters; its first clusters are validation, the next ones test.

        Returns:
            Split -> counts of clusters, records and residues.

        Raises:
            InputError: The sizes leave no train cluster, or a share is less than half a cluster.
        """
        offsets, members, representatives = (np.load(path, mmap_mode="r") for path in joined)
        num_clusters = representatives.size
        num_val, num_test = (
            _num_held_out(name, size, num_clusters) for name, size in (("val_size", val_size), ("test_size", test_size))
        )
        if num_val + num_test >= num_clusters:
            found = f"val_size {val_size} and test_size {test_size} hold out {num_val + num_test:,}"
            source = records.files[0]["path"]
            raise InputError(
                f"{source}: {found} of {num_clusters:,} clusters, so none is left to train on. Lower them.",
                code="split.no-train",
            )
        held_out = permutation(seed, 0, np.arange(num_val + num_test), num_clusters)
        counts: dict[str, Counts] = {}
        for split, chosen in (("valid", held_out[:num_val]), ("test", held_out[num_val:])):
            if chosen.size:
                kept = np.zeros(records.num_records, dtype=bool)
                kept[representatives[np.sort(chosen)]] = True
                counts[split] = self._write_split(records, kept, split, {"clusters": chosen.size}, may_move=False)
        held_out.sort()
        kept = self._write_index(held_out, offsets, members, representatives, records.num_records)
        train_clusters = {"clusters": num_clusters - held_out.size}
        return {"train": self._write_split(records, kept, "train", train_clusters, may_move=not held_out.size)} | counts

    def _write_index(
        self,
        held_out: np.ndarray,
        offsets: np.ndarray,
        members: np.ndarray,
        representatives: np.ndarray,
        num_records: int,
    ) -> np.ndarray:
        """Write the index of the train clusters; returns which of the P rows are in the train set, (P,) bool."""

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            for first in range(0, representatives.size, _CLUSTERS_AT_ONCE):
                stop = min(first + _CLUSTERS_AT_ONCE, representatives.size)
                is_train = np.ones(stop - first, dtype=bool)
                is_train[held_out[np.searchsorted(held_out, first) : np.searchsorted(held_out, stop)] - first] = False
                num_members = np.diff(offsets[first : stop + 1])
                rows = members[offsets[first] : offsets[stop]][np.repeat(is_train, num_members)]
                yield num_members[is_train], rows, representatives[first:stop][is_train]

        kept = np.zeros(num_records, dtype=bool)
        for _, rows, heads in blocks():
            kept[rows] = kept[heads] = True
        rank = _RowRanks(kept)
        paths = [self.final / name for name in INDEX_FILES]
        with NpyWriter(paths[0]) as of_offsets, NpyWriter(paths[1]) as of_members, NpyWriter(paths[2]) as of_heads:
            of_offsets.append(np.zeros(1, np.int64))
            for num_members, rows, heads in blocks():
                of_offsets.append(of_members.size + np.cumsum(num_members))
                of_members.append(rank(rows))
                of_heads.append(rank(heads))
        return kept

    def _write_split(
        self, staged: StagedFasta, kept: np.ndarray, split: str, counts: Counts, repeats: int = 0, *, may_move: bool
    ) -> Counts:
        """Write the kept rows in order; if all rows are kept, move the staged files instead."""
        if marker := self._read_marker(split):
            return marker["counts"]
        if may_move and kept.all():
            for source, target in ((staged.store, self.store(split)), (staged.keys, self.keys(split))):
                if source.exists():  # a killed call may have moved it already
                    os.replace(source, target)
            return self._write_marker(
                split, counts | {"records": staged.num_records, "residues": staged.num_residues}, repeats
            )

        def batches() -> Iterator[pa.RecordBatch]:
            first = 0
            for batch in read_batches(staged.store):
                in_batch = kept[first : first + batch.num_rows]
                first += batch.num_rows
                if in_batch.any():
                    yield batch.filter(pa.array(in_batch))

        num_records, num_residues = write_with_keys(batches(), self.store(split), self.keys(split))
        return self._write_marker(split, counts | {"records": num_records, "residues": num_residues}, repeats)

    def _write_marker(self, split: str, counts: Counts, repeats: int) -> Counts:
        write_sealed_json(self.work / f"{split}.made.json", {"counts": counts, "repeats": repeats})
        return counts

    def _read_marker(self, split: str) -> dict[str, Any] | None:
        """Read the counts of a split that an earlier call has finished, or None."""
        marker = self.work / f"{split}.made.json"
        return read_sealed_json(marker, f"delete {self.work} and run the command again") if marker.exists() else None


def _num_held_out(name: str, size: int | float, num_clusters: int) -> int:
    number = round(size * num_clusters) if isinstance(size, float) else size
    if size and not number:
        raise InputError(
            f"{name} {size} of {num_clusters:,} clusters is less than one cluster. Raise it, or pass an integer.",
            code="split.too-small",
            name=name,
            found=size,
        )
    return number


class _RowRanks:
    """Counts the kept rows before a row, with two bits per row."""

    def __init__(self, kept: np.ndarray) -> None:
        bits = np.packbits(kept, bitorder="little")
        self._words = np.append(bits, np.zeros(-bits.size % 8, np.uint8)).view(np.uint64)
        counts = np.bitwise_count(self._words)
        self._before = np.cumsum(counts, dtype=np.int64) - counts

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        words, bit = rows >> 6, (rows & 63).astype(np.uint64)
        below = self._words[words] & ((np.uint64(1) << bit) - np.uint64(1))
        return self._before[words] + np.bitwise_count(below)
