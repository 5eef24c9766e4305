"""A store of sequences on disk: a memory-mapped Arrow IPC file that is read by row, without a copy.

The file has the columns `id` and `sequence` in record batches of ROWS_PER_BATCH rows; the last may be shorter. A bit
shift therefore gives the batch of a row, and the text of a batch always fits Arrow's 32-bit offsets. Opening takes the
same time at any size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.sequences.fasta import MAX_RESIDUES
from esm2kit.sequences.text import Ragged, copy_pieces

_SHIFT = 14
ROWS_PER_BATCH = 1 << _SHIFT
assert ROWS_PER_BATCH * MAX_RESIDUES < 2**31, "a batch of the longest records must fit 32-bit offsets"
_LOCAL = ROWS_PER_BATCH - 1

SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("sequence", pa.string(), nullable=False)],
    metadata={"esm2kit": "sequences 1"},
)


def regroup_batches(batches: Iterable[pa.RecordBatch], num_rows: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """Regroup rows into batches of equal size.

    Args:
        batches: Record batches of any size.
        num_rows: Rows per batch.

    Yields:
        The same rows in batches of `num_rows`; the last may be shorter.
    """
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
    """Writes a store, as a context manager; combine it with `core.files.atomic_path` for an atomic file."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._is_last = False

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch of ROWS_PER_BATCH rows, as `regroup_batches` yields; only the last batch may have fewer."""
        assert not self._is_last, "only the last batch may be shorter, as row -> batch is a shift"
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
    """Yield the record batches of a store in order; they are read, not mapped, so only one is in memory at a time."""
    with pa.OSFile(str(path), "rb") as file:
        reader = pa.ipc.open_file(file)
        for batch in range(reader.num_record_batches):
            yield reader.get_batch(batch)


class SequenceStore:
    """Random access to the rows of a store. Another process that it is sent to opens the file again."""

    def __init__(self, path: Path) -> None:
        self.path = expand_path(path)
        try:
            self._map = pa.memory_map(str(self.path))
            self._reader = pa.ipc.open_file(self._map)
            if self._reader.schema.metadata != SCHEMA.metadata:
                raise InputError(
                    f"{path}: an Arrow file without sequences. Pass the train.arrow or valid.arrow of a dataset.",
                    code="store.other",
                    path=path,
                )
            self._num_batches = self._reader.num_record_batches
            last = self._reader.get_batch(self._num_batches - 1).num_rows if self._num_batches else 0
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path}: not a readable Arrow file of sequences. Run `esm2kit preprocess` again.",
                code="store.damaged",
                path=path,
            ) from error
        self._num_rows = max(self._num_batches - 1, 0) * ROWS_PER_BATCH + last
        buffer = self._map.read_buffer()
        self._address = buffer.address
        self._bytes = np.frombuffer(buffer, dtype=np.uint8)
        self._words = self._bytes[: self._bytes.size // 4 * 4].view(np.int32)
        # where each batch's offsets (in words) and text (in bytes) start: of the ids, then of the sequences
        self._base = np.full((self._num_batches, 4), -1, dtype=np.int64)

    @classmethod
    def open(cls, path: Path) -> "SequenceStore":
        """Open a store.

        Args:
            path: An Arrow file of a dataset.

        Returns:
            The store.

        Raises:
            InputError: The file does not exist, is damaged, or is not a store.
        """
        return cls(path)

    def __len__(self) -> int:
        return self._num_rows

    def __reduce__(self) -> tuple:
        return SequenceStore.open, (self.path,)

    def id(self, row: int) -> str:
        """Return the id of a row."""
        return self._read_column(row, 0).tobytes().decode()

    def residues(self, row: int) -> np.ndarray:
        """Return the residues of a row: (T,) uint8 ASCII letters, a read-only view of the file."""
        return self._read_column(row, 2)

    def _read_column(self, row: int, column: int) -> np.ndarray:
        """Return the bytes of a row in the column whose offsets are at `column` of `_base`."""
        if not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} outside {self.path} of {self._num_rows} rows")
        base = self._locate_batch(row >> _SHIFT)
        word = base[column] + (row & _LOCAL)
        text = base[column + 1]
        return self._bytes[text + self._words[word] : text + self._words[word + 1]]

    def _locate_batch(self, batch: int) -> np.ndarray:
        """Return where the offsets and the text of a batch start, a row of `_base`."""
        base = self._base[batch]
        if base[0] < 0:
            buffers = (column.buffers() for column in self._reader.get_batch(batch).columns)
            places = [
                ((offsets.address - self._address) // 4, text.address - self._address) for _, offsets, text in buffers
            ]
            base[:] = np.ravel(places)  # one assignment, as another thread may read it
        return base

    def gather(self, rows: np.ndarray) -> Ragged:
        """Copy the residues of several rows into one array, in the given order.

        Args:
            rows: (R,) integers; rows may repeat.

        Returns:
            Values (N,) uint8, and offsets (R + 1,) int64.
        """
        starts, stops = self._bounds(rows)
        return copy_pieces(self._bytes, starts, stops)

    def _bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the residues of rows start and stop in the file, in bytes."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self._num_rows):
            raise IndexError(f"a row outside {self.path} of {self._num_rows} rows")
        batches = rows >> _SHIFT
        for batch in np.unique(batches[self._base[batches, 0] < 0]):
            self._locate_batch(int(batch))
        base = self._base[batches]
        words, text = base[:, 2] + (rows & _LOCAL), base[:, 3]
        return text + self._words[words], text + self._words[words + 1]

    def residue_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of residues per row, (R,) int64, without reading the sequences."""
        starts, stops = self._bounds(rows)
        return stops - starts

    @property
    def num_residues(self) -> np.ndarray:
        """Number of residues of all rows, (P,) int64; computed at each access, 8 bytes per row."""
        counts = [self.residue_counts(np.arange(0, 0))]
        for first in range(0, self._num_rows, ROWS_PER_BATCH):
            counts.append(self.residue_counts(np.arange(first, min(first + ROWS_PER_BATCH, self._num_rows))))
        return np.concatenate(counts)
