"""Read text files as bytes, with decompression, hashing and prefetching; copy pieces of text between arrays."""

import gzip
import hashlib
import queue
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import zstandard

from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs
from esm2kit.core.paths import expand_path

Item = TypeVar("Item")


class TextReader:
    """Reads a text file; decompresses gzip and Zstandard, detected from the content, and hashes the file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Args:
            path: Path of the file.

        Raises:
            InputError: The file cannot be opened, or is compressed with an unsupported program.
        """
        self.path = expand_path(path)
        try:
            check_git_lfs(self.path)
            self._hashing_file = _HashingFile(self.path)
            magic = self._hashing_file.peek()
        except OSError as error:
            raise InputError(
                f"{path}: cannot open the file ({error.strerror}). Check the path and its permissions.",
                code="file.unreadable",
                path=path,
            ) from error
        self._check_magic(magic)
        self._compression = ""
        self._file: _HashingFile | gzip.GzipFile | _ZstdFile = self._hashing_file
        if magic.startswith(b"\x1f\x8b"):
            self._compression, self._file = "gzip", gzip.GzipFile(fileobj=self._hashing_file, mode="rb")
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            self._compression, self._file = "Zstandard", _ZstdFile(self._hashing_file)

    def _check_magic(self, magic: bytes) -> None:
        """Refuse unsupported compression by the first bytes of the file."""
        for name, start in (("bzip2", b"BZh"), ("xz", b"\xfd7zXZ\0"), ("zip", b"PK\x03\x04")):
            if magic.startswith(start):
                self._hashing_file.close()
                found = f"compressed with {name}, which is not supported"
                raise InputError(
                    f"{self.path}: {found}. Compress it with gzip or zstd.", code="file.packed", path=self.path
                )

    def read(self, num_bytes: int) -> bytes:
        """Read text.

        Args:
            num_bytes: Maximum number of bytes; for Zstandard a block of a frame is returned instead.

        Returns:
            The text, b"" at the end of the file only.

        Raises:
            InputError: The compressed data are incomplete or damaged.
        """
        try:
            return self._file.read(num_bytes)
        except EOFError as error:
            raise InputError(
                f"{self.path}: incomplete {self._compression} data. Copy or download the file again.",
                code="file.cut-short",
                path=self.path,
            ) from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise InputError(
                f"{self.path}: damaged {self._compression} data. Copy or download the file again.",
                code="file.damaged",
                path=self.path,
            ) from error

    def chunks(self, num_bytes: int) -> Iterator[bytes]:
        """Yield the complete text in chunks, prefetched by a thread; close the file at the end."""
        try:
            yield from prefetch(iter(lambda: self.read(num_bytes), b""))
        finally:
            self._hashing_file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of the compressed file if it is compressed."""
        return self._hashing_file.num_bytes

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file, valid once `read` has returned b""."""
        return self._hashing_file.hash.hexdigest()


class _HashingFile:
    """A file that hashes and counts the bytes that are read from it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._peeked = b""
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def peek(self) -> bytes:
        """Return the first six bytes without consuming them; a pipe cannot be opened twice."""
        while len(self._peeked) < 6 and (data := self._file.read(6 - len(self._peeked))):
            self._peeked += data
        return self._peeked

    def read(self, num_bytes: int) -> bytes:
        data, self._peeked = self._peeked[:num_bytes], self._peeked[num_bytes:]
        if len(data) < num_bytes:
            data += self._file.read(num_bytes - len(data))
        self.hash.update(data)
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        self._file.close()


class _ZstdFile:
    """Reads concatenated Zstandard frames; unlike zstandard's reader, it raises EOFError for an incomplete frame."""

    def __init__(self, file: _HashingFile) -> None:
        self._file, self._frame, self._rest = file, None, b""

    def read(self, num_bytes: int) -> bytes:
        while True:
            packed, self._rest = self._rest or self._file.read(1 << 17), b""
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return b""
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            text = self._frame.decompress(packed)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
            if text:
                return text


class Ragged(NamedTuple):
    """Concatenated pieces of different size: piece i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # (N,) uint8
    offsets: np.ndarray  # (pieces + 1,) integers

    def strings(self, kind: pa.DataType | None = None) -> pa.Array:
        """Return the pieces as an Arrow string array; the bytes are shared, the offsets converted to int32."""
        buffers = [None, pa.py_buffer(self.offsets.astype(np.int32, copy=False)), pa.py_buffer(self.values)]
        return pa.Array.from_buffers(kind or pa.string(), self.offsets.size - 1, buffers)


def copy_pieces(values_N: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
    """Copy the pieces values_N[starts[i] : stops[i]] into one array, in this order.

    Args:
        values_N: (N,) contiguous uint8.
        starts: (pieces,) integers.
        stops: (pieces,) integers, at least `starts`.

    Returns:
        The pieces, with int64 offsets from 0.
    """
    num_pieces = starts.size
    if not num_pieces:
        return Ragged(np.empty(0, np.uint8), np.zeros(1, np.int64))
    # Arrow gets piece, gap, piece, gap ... as elements, and taking the even ones copies the pieces. It never reads the
    # gaps, so the pieces may overlap and have any order. The last offset determines how much memory it reserves.
    edges = np.empty(2 * num_pieces + 1, dtype=np.int64)
    edges[0:-1:2], edges[1::2] = starts, stops
    edges[-1] = min(int(edges[0] + 2 * (stops - starts).sum()), values_N.size)
    pieces = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 2 * num_pieces, [None, pa.py_buffer(edges), pa.py_buffer(values_N)]
    )
    taken = pieces.take(pa.array(np.arange(0, 2 * num_pieces, 2)))
    _, offsets, values = taken.buffers()
    return Ragged(np.frombuffer(values, np.uint8), np.frombuffer(offsets, np.int64)[: num_pieces + 1])


def prefetch(items: Iterator[Item], depth: int = 4) -> Iterator[Item]:
    """Yield items that a thread computes in advance; the thread ends when the iteration ends or is abandoned.

    Args:
        items: The iterator to run in the thread.
        depth: How many items are computed in advance.

    Yields:
        The same items. An exception of `items` is raised in its place.
    """
    results: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            try:
                return results.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None, False))
                if stopped.is_set():
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = results.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
