"""Sequences on disk: one memory-mapped Arrow IPC file, row -> residues without a copy.

Columns `id` and `sequence`, in record batches of ROWS_PER_BATCH rows (the last one may be shorter): a row's batch is a
shift away, and a batch's text always fits Arrow's 32-bit offsets. Opening costs the same at any size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm2kit.core.errors import InputError
from esm2kit.sequences.fasta import MAX_RESIDUES
from esm2kit.sequences.text import Ragged, copy_pieces

_SHIFT = 14
ROWS_PER_BATCH = 1 << _SHIFT
assert ROWS_PER_BATCH * MAX_RESIDUES < 2**31, "a batch of longest records must fit 32-bit offsets"
_LOCAL = ROWS_PER_BATCH - 1

SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("sequence", pa.string(), nullable=False)],
    metadata={"esm2kit": "sequences 1"},
)


def regroup_batches(batches: Iterable[pa.RecordBatch], num_rows: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `num_rows`; the last may be shorter."""
    waiting: list[pa.RecordBatch] = []
    have = 0
    for batch in batches:
        waiting.append(batch)
        have += batch.num_rows
        while have >= num_rows:
            joined = pa.concat_batches(waiting)
            yield joined.slice(0, num_rows)
            waiting, have = [joined.slice(num_rows)], have - num_rows
    if have:
        yield pa.concat_batches(waiting)


class StoreWriter:
    """Writes a store; use as a context manager, and write the file beside its name (`provenance.atomic_path`)."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._is_last = False

    def write(self, batch: pa.RecordBatch) -> None:
        """Add a batch of ROWS_PER_BATCH rows, such as `regroup_batches` makes; only the last may have fewer."""
        assert not self._is_last, "only the last batch may be short, as row -> batch is a shift"
        assert 0 < batch.num_rows <= ROWS_PER_BATCH
        self._is_last = batch.num_rows < ROWS_PER_BATCH
        self._writer.write_batch(batch)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._writer.close()
        self._file.close()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A store's record batches in order, read rather than mapped, so that resident memory stays that of one batch."""
    with pa.OSFile(str(path), "rb") as file:
        reader = pa.ipc.open_file(file)
        for batch in range(reader.num_record_batches):
            yield reader.get_batch(batch)


class SequenceStore:
    """Random access to a store; opened again, not copied, when sent to another process."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._map = pa.memory_map(str(path))
            self._reader = pa.ipc.open_file(self._map)
            if self._reader.schema.metadata != SCHEMA.metadata:
                raise InputError(
                    f"{path}: an Arrow file, but not one of sequences; give train.arrow or valid.arrow",
                    code="store.other",
                    path=path,
                )
            self._num_batches = self._reader.num_record_batches
            last = self._reader.get_batch(self._num_batches - 1).num_rows if self._num_batches else 0
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path}: no readable Arrow file of sequences; run `esm2kit preprocess` again",
                code="store.damaged",
                path=path,
            ) from error
        self._num_rows = max(self._num_batches - 1, 0) * ROWS_PER_BATCH + last
        whole = self._map.read_buffer()
        self._address = whole.address
        self._bytes = np.frombuffer(whole, dtype=np.uint8)
        self._words = self._bytes[: self._bytes.size // 4 * 4].view(np.int32)
        # where a batch's offsets begin, in words, and its text, in bytes: of the ids, then of the residues
        self._base = np.full((self._num_batches, 4), -1, dtype=np.int64)

    @classmethod
    def open(cls, path: Path) -> "SequenceStore":
        """Raises: InputError if the file is missing, damaged or something else."""
        return cls(path)

    def __len__(self) -> int:
        return self._num_rows

    def __reduce__(self) -> tuple:
        return SequenceStore.open, (self.path,)

    def id(self, row: int) -> str:
        """The record's id."""
        return self._piece(row, 0).tobytes().decode()

    def residues(self, row: int) -> np.ndarray:
        """The record's letters: (T,) uint8 ASCII, a read-only view of the file."""
        return self._piece(row, 2)

    def _piece(self, row: int, column: int) -> np.ndarray:
        if not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} outside {self.path} of {self._num_rows} rows")
        base = self._batch(row >> _SHIFT)
        place = base[column] + (row & _LOCAL)
        text = base[column + 1]
        return self._bytes[text + self._words[place] : text + self._words[place + 1]]

    def _batch(self, batch: int) -> np.ndarray:
        base = self._base[batch]
        if base[0] < 0:
            buffers = (column.buffers() for column in self._reader.get_batch(batch).columns)
            places = [
                ((offsets.address - self._address) // 4, text.address - self._address) for _, offsets, text in buffers
            ]
            base[:] = np.ravel(places)  # at once: another thread may look
        return base

    def gather(self, rows: np.ndarray) -> Ragged:
        """The residues of many rows, copied together in the order given.

        Args:
            rows: (R,) integer rows; repeats are fine.
        Returns: values (N,) uint8 and offsets (R + 1,) int64.
        """
        starts, stops = self._bounds(rows)
        return copy_pieces(self._bytes, starts, stops)

    def _bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self._num_rows):
            raise IndexError(f"a row outside {self.path} of {self._num_rows} rows")
        batches = rows >> _SHIFT
        for batch in np.unique(batches[self._base[batches, 0] < 0]):
            self._batch(int(batch))
        base = self._base[batches]
        places, text = base[:, 2] + (rows & _LOCAL), base[:, 3]
        return text + self._words[places], text + self._words[places + 1]

    def residue_counts(self, rows: np.ndarray) -> np.ndarray:
        """(R,) int64 residues of some rows, without reading their text."""
        starts, stops = self._bounds(rows)
        return stops - starts

    @property
    def num_residues(self) -> np.ndarray:
        """(P,) int64 residues of every row, worked out at each call: 8 bytes a row."""
        counts = [self.residue_counts(np.arange(0, 0))]
        for first in range(0, self._num_rows, ROWS_PER_BATCH):
            counts.append(self.residue_counts(np.arange(first, min(first + ROWS_PER_BATCH, self._num_rows))))
        return np.concatenate(counts)
