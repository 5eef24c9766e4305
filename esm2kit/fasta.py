"""FASTA in: the one place a FASTA is read, checked and turned into arrays.

Reading goes block by block, a few megabytes of whole records at a time, with no Python per record: line ends are found,
checked and dropped by numpy, and ragged pieces of text are copied together by Arrow. `read_fasta` gives the same records
one by one.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import zstandard

from esm2kit.alphabet import IS_RESIDUE_BYTE, RESIDUE_LETTERS
from esm2kit.errors import InputError

MAX_RESIDUES = 100_000
BLOCK_BYTES = 1 << 21
SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
COMPRESSED = ("", ".gz", ".zst")

_NEWLINE, _HEADER, _STOP = b"\n"[0], b">"[0], b"*"[0]
_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[np.frombuffer(b" \t\r\v\f", dtype=np.uint8)] = True
_UPPER = np.arange(256, dtype=np.uint8)
_UPPER[ord("a") : ord("z") + 1] -= 32
# text of one record that is neither an end nor a letter: past this, a record is over MAX_RESIDUES or no FASTA at all
_MAX_RECORD_BYTES = 1 << 24


class Record(NamedTuple):
    """One protein."""

    id: str
    description: str  # the whole header line after '>', id included
    sequence: str  # upper case, no trailing '*'


class RecordBlock(NamedTuple):
    """Some consecutive records of one file, as Arrow string arrays of equal size."""

    ids: pa.StringArray
    descriptions: pa.StringArray
    sequences: pa.StringArray


def fasta_files(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """The FASTA files a setting names: one file, several, or a folder of them (sorted by name).

    Raises: InputError for a path that is not there, or a folder without FASTA files.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            names = tuple(suffix + packed for suffix in SUFFIXES for packed in COMPRESSED)
            found = sorted(file for file in path.iterdir() if file.name.lower().endswith(names) and file.is_file())
            if not found:
                raise InputError(f"{path}: no FASTA file in this folder; names must end in {', '.join(SUFFIXES)}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder; correct the path")
    if not files:
        raise InputError("no FASTA file given; name at least one")
    return files


def read_fasta(path: Path) -> Iterator[Record]:
    """The records of a FASTA file, in order.

    Args:
        path: plain, gzip or Zstandard, told apart by content.
    Returns: an iterator of Record; ids are the header up to its first blank.
    Raises: InputError, in one line with file, record and remedy, for whatever is not a protein FASTA.
    """
    for block in FastaReader(path):
        rows = (block.ids.to_pylist(), block.descriptions.to_pylist(), block.sequences.to_pylist())
        yield from map(Record._make, zip(*rows, strict=True))


class TextReader:
    """A file's text, decompressed by content and hashed on the way.

    Attributes:
        bytes_read: bytes of the file itself (compressed if it is) taken so far.
        sha256: hex SHA-256 of the file, whole once `read` has returned b"".
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._tap = _Tap(self.path)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror}); correct the path or its rights") from error
        with open(self.path, "rb") as file:
            magic = file.read(6)
        self._packed = None
        self._file: io.RawIOBase | gzip.GzipFile | _ZstdFile = self._tap
        if magic.startswith(b"\x1f\x8b"):
            self._packed, self._file = "gzip", gzip.GzipFile(fileobj=io.BufferedReader(self._tap, 1 << 20))
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            self._packed, self._file = "Zstandard", _ZstdFile(self._tap)
        for name, start in (("bzip2", b"BZh"), ("xz", b"\xfd7zXZ\0"), ("zip", b"PK\x03\x04")):
            if magic.startswith(start):
                raise InputError(f"{path}: compressed with {name}, which is not read; recompress it with gzip or zstd")

    def read(self, num_bytes: int) -> bytes:
        """Up to num_bytes of text; b"" at the end of the file only."""
        try:
            return self._file.read(num_bytes)
        except EOFError as error:
            raise InputError(
                f"{self.path}: the {self._packed} data end too early; copy or download it again"
            ) from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise InputError(f"{self.path}: damaged {self._packed} data; copy or download it again") from error

    @property
    def bytes_read(self) -> int:
        return self._tap.num_bytes

    @property
    def sha256(self) -> str:
        return self._tap.hash.hexdigest()

    def close(self) -> None:
        self._tap.close()


class _Tap(io.RawIOBase):
    """A file that hashes and counts what is read from it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115: closed by close()
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        num_bytes = self._file.readinto(buffer)
        self.hash.update(memoryview(buffer)[:num_bytes])
        self.num_bytes += num_bytes
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFile:
    """Zstandard frames one after another; unlike zstandard's own reader, a frame cut short is an error."""

    def __init__(self, file: io.RawIOBase) -> None:
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


class FastaReader:
    """Iterates over a FASTA file as RecordBlocks; every record is checked.

    Attributes:
        bytes_read, sha256: of the file, as in TextReader.
        num_records: records yielded so far.
    """

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self.path = Path(path)
        self.num_records = 0
        self._text = TextReader(self.path)
        self._block_bytes = block_bytes

    @property
    def bytes_read(self) -> int:
        return self._text.bytes_read

    @property
    def sha256(self) -> str:
        return self._text.sha256

    def __iter__(self) -> Iterator[RecordBlock]:
        try:
            for text in self._whole_records():
                block = self._parse(np.frombuffer(text, dtype=np.uint8))
                self.num_records += len(block.ids)
                yield block
            if not self.num_records:
                raise InputError(
                    f"{self.path}: no record in it; a FASTA file needs at least one '>' line and a sequence"
                )
        finally:
            self._text.close()

    def _whole_records(self) -> Iterator[bytes | memoryview]:
        """The text cut before a '>' at the start of a line."""
        text, started = b"", False
        while chunk := self._text.read(self._block_bytes):
            searched = max(len(text) - 1, 0)
            text += chunk
            if not started:
                text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
                started = len(text) >= 4  # enough to tell a byte order mark from a header
                if not started:
                    continue
                self._check_start(text)
                searched = 0
            cut = text.rfind(b"\n>", searched)
            if cut >= 0:
                yield memoryview(text)[: cut + 1]
                text = text[cut + 1 :]
            elif len(text) > _MAX_RECORD_BYTES:
                raise InputError(
                    f"{self.path}: record {self.num_records + 1} goes on for over {_MAX_RECORD_BYTES >> 20} MiB; the limit "
                    f"is {MAX_RESIDUES:,} residues: this is no protein FASTA, or a '>' line is missing"
                )
        if text and not started:
            text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                self._check_start(text)
        if text:
            yield text

    def _check_start(self, text: bytes) -> None:
        if text[0] == _HEADER:
            return
        line = text[:80].split(b"\n")[0].decode("utf-8", errors="replace").rstrip()
        if "\0" in line or "�" in line:
            raise InputError(f"{self.path}: its first bytes are not text ({line[:20]!r}); give a FASTA file")
        raise InputError(f"{self.path}: text before the first '>' ({line[:40]!r}); remove it or give a FASTA file")

    def _parse(self, text_N: np.ndarray) -> RecordBlock:
        stops = np.flatnonzero(text_N == _NEWLINE)
        if text_N[-1] != _NEWLINE:
            stops = np.append(stops, text_N.size)
        starts = np.empty_like(stops)
        starts[0], starts[1:] = 0, stops[:-1] + 1
        is_header = text_N[np.minimum(starts, text_N.size - 1)] == _HEADER
        while (blank := (stops > starts) & _IS_BLANK[text_N[stops - 1]]).any():  # CR, and blanks before it
            stops = stops - blank
        header_lines = np.flatnonzero(is_header)
        is_sequence = ~is_header & (stops > starts)

        lines = ragged_copy(text_N, starts[is_sequence], stops[is_sequence])
        lines_before = np.cumsum(is_sequence)
        first_line = np.append(lines_before[header_lines], lines_before[-1])
        residues_N, offsets = lines.values, lines.offsets[first_line]
        headers = ragged_copy(text_N, starts[header_lines] + 1, stops[header_lines])
        ids = self._ids(headers)
        codes_N = residues_N - np.uint8(ord("A"))
        if (codes_N > 25).any() or (residues_N == ord("J")).any():  # the 25 letters are A to Z without J
            residues_N, offsets = self._fold(residues_N, offsets, ids)
        num_residues = np.diff(offsets)
        if not num_residues.all():
            record = int(np.argmin(num_residues))
            raise self._error(ids, record, "has no sequence; add its residues or remove the record")
        if num_residues.max() > MAX_RESIDUES:
            record = int(np.argmax(num_residues > MAX_RESIDUES))
            found = f"has {num_residues[record]:,} residues, over the limit of {MAX_RESIDUES:,}; cut or remove it"
            raise self._error(ids, record, found)
        return RecordBlock(ids, headers.strings(), Ragged(residues_N, offsets).strings())

    def _ids(self, headers: "Ragged") -> pa.StringArray:
        """Headers up to the first blank; blanks between '>' and the id are skipped."""
        text_N, starts, ends = headers.values, headers.offsets[:-1].copy(), headers.offsets[1:]
        if text_N.size and (text_N.max() > 126 or text_N.min() < 32):
            self._check_text(headers)
        is_blank_N = (text_N == ord(" ")) | (text_N == ord("\t"))
        while (blank := np.flatnonzero(starts < ends)[is_blank_N[starts[starts < ends]]]).size:
            starts[blank] += 1
        blanks = np.append(np.flatnonzero(is_blank_N), text_N.size)
        stops = np.minimum(blanks[np.searchsorted(blanks, starts)], ends)
        if (empty := np.flatnonzero(stops <= starts)).size:
            number = self.num_records + int(empty[0]) + 1
            raise InputError(f"{self.path}: record {number} has no id; write one after its '>'")
        return ragged_copy(text_N, starts, stops).strings()

    def _check_text(self, headers: "Ragged") -> None:
        """Raise for the first header that holds control characters or is not UTF-8."""
        for record, header in enumerate(headers.strings(pa.binary()).to_pylist()):
            number = self.num_records + record + 1
            try:
                text = header.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{header[error.start]:02x} at column {error.start + 2} is not text"
                raise InputError(f"{self.path}: header of record {number}: {found}; save the file as UTF-8") from None
            control = next((byte for byte in text if ord(byte) < 32 and byte != "\t" or ord(byte) == 127), None)
            if control == "\r":
                remedy = "lines end in CR alone; convert them with `tr '\\r' '\\n'`"
                raise InputError(f"{self.path}: header of record {number}: {remedy}")
            if control is not None:
                found = f"byte 0x{ord(control):02x} is not text; give a FASTA file or remove the byte"
                raise InputError(f"{self.path}: header of record {number}: {found}")

    def _fold(self, residues_N: np.ndarray, offsets: np.ndarray, ids: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """Upper case, without blanks and a final '*' for each record; raises at a letter that is no residue."""
        residues_N = _UPPER[residues_N]
        residues_N, offsets = _drop(residues_N, offsets, np.flatnonzero(_IS_BLANK[residues_N]))
        last = offsets[1:][np.diff(offsets) > 0] - 1
        residues_N, offsets = _drop(residues_N, offsets, last[residues_N[last] == _STOP])
        unknown = np.flatnonzero(~IS_RESIDUE_BYTE[residues_N])
        if unknown.size:
            position, byte = int(unknown[0]), int(residues_N[unknown[0]])
            record = int(np.searchsorted(offsets, position, side="right")) - 1
            place = f"at residue {position - offsets[record] + 1:,}"
            if 32 < byte < 127:
                found = f"letter {chr(byte)!r} {place} is not one of {RESIDUE_LETTERS}; correct or remove the record"
            else:
                found = f"byte 0x{byte:02x} {place} is not text; correct or remove the record"
            raise self._error(ids, record, found)
        return residues_N, offsets

    def _error(self, ids: pa.StringArray, record: int, found: str) -> InputError:
        return InputError(f"{self.path}: record {ids[record].as_py()} ({self.num_records + record + 1:,}): {found}")


class Ragged(NamedTuple):
    """Pieces of different size one after another: piece i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # (N,) uint8
    offsets: np.ndarray  # (pieces + 1,) integers

    def strings(self, kind: pa.DataType | None = None) -> pa.Array:
        """As an Arrow string array; the bytes are shared, the offsets narrowed to 32 bits."""
        buffers = [None, pa.py_buffer(self.offsets.astype(np.int32, copy=False)), pa.py_buffer(self.values)]
        return pa.Array.from_buffers(kind or pa.string(), self.offsets.size - 1, buffers)


def ragged_copy(values_N: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
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


def _drop(values_N: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the elements at these ascending places."""
    return np.delete(values_N, places), offsets - np.searchsorted(places, offsets)
