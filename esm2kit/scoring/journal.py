"""The results of an unfinished run, batch by batch, so that it can resume where it stopped."""

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm2kit.core.files import BINARY

# Before the values of a batch: their number, their CRC-32, and the CRC-32 of these two.
HEADER = np.dtype([("count", "<i8"), ("values", "<u4"), ("header", "<u4")])
SYNC_SECONDS = 10.0  # work that a power failure can lose; a killed process loses none


class Journal:
    """An append-only file with the values of every finished batch, in order.

    Args:
        path: the file; created if it does not exist. An incomplete or damaged end is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o644)
        self.counts = [len(values) for values in _read_batches(self.path)]  # values of each batch
        os.ftruncate(self.handle, sum(HEADER.itemsize + 4 * count for count in self.counts))
        self.synced = time.monotonic()

    def append(self, values: np.ndarray) -> None:
        """Append the values of the next batch.

        Args:
            values: (values,) float32.
        """
        data = np.ascontiguousarray(values, dtype="<f4").tobytes()
        header = np.array((len(values), zlib.crc32(data), 0), dtype=HEADER)
        header["header"] = zlib.crc32(header.tobytes()[:12])
        record = header.tobytes() + data
        while record:  # a partial write is possible on an almost full disk
            record = record[os.write(self.handle, record) :]
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.handle)
            self.synced = time.monotonic()

    def close(self) -> None:
        """Flush the values to the disk and close the file."""
        try:
            os.fsync(self.handle)
        finally:
            os.close(self.handle)


class JournalValues:
    """Reads the values of all batches in order, regardless of where a batch ends.

    Args:
        path: the journal.
    """

    def __init__(self, path: Path) -> None:
        self.batches = _read_batches(path)
        self.rest = np.empty(0, dtype=np.float32)

    def read(self, count: int) -> np.ndarray:
        """Read the next `count` values.

        Args:
            count: number of values.

        Returns:
            (count,) float32.

        Raises:
            EOFError: the journal ends before.
        """
        parts = [self.rest[:count]]
        self.rest = self.rest[count:]
        missing = count - len(parts[0])
        while missing:
            values = next(self.batches, None)
            if values is None:
                raise EOFError(f"{missing} values are missing")
            parts.append(values[:missing])
            self.rest = values[missing:]
            missing -= len(parts[-1])
        return np.concatenate(parts)


def _read_batches(path: Path) -> Iterator[np.ndarray]:
    """Iterate over the values of the batches, up to the first that is incomplete or damaged."""
    with open(path, "rb") as file:
        while len(data := file.read(HEADER.itemsize)) == HEADER.itemsize:
            header = np.frombuffer(data, HEADER)[0]
            if zlib.crc32(data[:12]) != header["header"]:
                return
            values = file.read(int(header["count"]) * 4)
            if len(values) != header["count"] * 4 or zlib.crc32(values) != header["values"]:
                return
            yield np.frombuffer(values, "<f4")
