"""Text files as bytes: decompressed by content, hashed on the way, read ahead; and ragged pieces of text as arrays."""

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

Item = TypeVar("Item")


class TextReader:
    """A file's text, decompressed by content and hashed on the way.

    Attributes:
        bytes_read: bytes of the file itself (compressed if it is) taken so far.
        sha256: hex SHA-256 of the file, whole once `read` has returned b"".
    """

    def __init__(self, path: Path) -> None:
        """Raises: InputError if the file cannot be opened, or is packed in a way that is not read."""
        self.path = Path(path)
        try:
            magic = self._magic()
            self._tap = _Tap(self.path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be opened ({error.strerror}); correct the path or its rights",
                code="file.unreadable",
                path=path,
            ) from error
        self._packed: str | None = None
        self._file: _Tap | gzip.GzipFile | _ZstdFile = self._tap
        if magic.startswith(b"\x1f\x8b"):
            self._packed, self._file = "gzip", gzip.GzipFile(fileobj=self._tap, mode="rb")
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            self._packed, self._file = "Zstandard", _ZstdFile(self._tap)

    def _magic(self) -> bytes:
        with open(self.path, "rb") as file:
            magic = file.read(6)
        for name, start in (("bzip2", b"BZh"), ("xz", b"\xfd7zXZ\0"), ("zip", b"PK\x03\x04")):
            if magic.startswith(start):
                found = f"compressed with {name}, which is not read"
                raise InputError(
                    f"{self.path}: {found}; recompress it with gzip or zstd", code="file.packed", path=self.path
                )
        return magic

    def read(self, num_bytes: int) -> bytes:
        """Up to num_bytes of text (Zstandard: a frame's block); b"" at the end of the file only."""
        try:
            return self._file.read(num_bytes)
        except EOFError as error:
            found = f"the {self._packed} data end too early"
            raise InputError(
                f"{self.path}: {found}; copy or download it again", code="file.cut-short", path=self.path
            ) from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise InputError(
                f"{self.path}: damaged {self._packed} data; copy or download it again",
                code="file.damaged",
                path=self.path,
            ) from error

    def chunks(self, num_bytes: int) -> Iterator[bytes]:
        """All the text, read ahead; the file is closed at the end."""
        try:
            yield from prefetch(iter(lambda: self.read(num_bytes), b""))
        finally:
            self._tap.close()

    @property
    def bytes_read(self) -> int:
        return self._tap.num_bytes

    @property
    def sha256(self) -> str:
        return self._tap.hash.hexdigest()


class _Tap:
    """A file that hashes and counts what is read from it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self.hash.update(data)
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        self._file.close()


class _ZstdFile:
    """Zstandard frames one after another; unlike zstandard's own reader, a frame cut short is an error."""

    def __init__(self, file: _Tap) -> None:
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
    """Pieces of different size one after another: piece i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # (N,) uint8
    offsets: np.ndarray  # (pieces + 1,) integers

    def strings(self, kind: pa.DataType | None = None) -> pa.Array:
        """As an Arrow string array; the bytes are shared, the offsets narrowed to 32 bits."""
        buffers = [None, pa.py_buffer(self.offsets.astype(np.int32, copy=False)), pa.py_buffer(self.values)]
        return pa.Array.from_buffers(kind or pa.string(), self.offsets.size - 1, buffers)


def copy_pieces(values_N: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
    """The pieces values_N[starts[i] : stops[i]], copied together in this order.

    Args:
        values_N: contiguous uint8.
        starts, stops: integer arrays, starts <= stops.
    Returns: the pieces, with int64 offsets from 0.
    """
    num_pieces = starts.size
    if not num_pieces:
        return Ragged(np.empty(0, np.uint8), np.zeros(1, np.int64))
    # Arrow sees piece, gap, piece, gap ...: taking the even elements copies the pieces; it never looks into the gaps,
    # so the pieces may overlap and come in any order. The last offset makes it reserve about what it needs.
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
    """The same items, made by a thread of their own up to `depth` before they are asked for.

    An exception of `items` is raised here, in its place. Leaving off early ends the thread.
    """
    waiting: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
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
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
