"""Read and check FASTA files.

`FastaReader` reads complete records in blocks of about a megabyte without a Python loop over records: numpy finds the
lines and checks the letters, Arrow copies the pieces of text. `read_fasta` yields the same records one by one.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.sequences.alphabet import IS_RESIDUE_BYTE, RESIDUE_LETTERS
from esm2kit.sequences.formats import advise_on_letter, check_first_line, check_first_record, check_sequence_format
from esm2kit.sequences.headers import BLANKS, find_control_character
from esm2kit.sequences.letters import FileLetters
from esm2kit.sequences.pipes import is_pipe, name_pipe
from esm2kit.sequences.text import Ragged, TextReader, copy_pieces

logger = logging.getLogger(__name__)

MAX_RESIDUES = 100_000
BLOCK_BYTES = 1 << 20
SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
# entries of a folder that are searched for FASTA files in subfolders
MAX_SEARCHED = 10_000
COMPRESSED = ("", ".gz", ".zst")

_NEWLINE, _HEADER, _STOP, _CHAIN_BREAK = b"\n>*:"
_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[np.frombuffer(b" \t\r\v\f", dtype=np.uint8)] = True
# the bytes that end an id, and the bytes of an ordinary header
_ENDS_ID = np.zeros(256, dtype=bool)
_ENDS_ID[np.frombuffer(BLANKS.encode(), dtype=np.uint8)] = True
_IS_ORDINARY = _ENDS_ID.copy()
_IS_ORDINARY[32:127] = True
_UPPER = np.arange(256, dtype=np.uint8)
_UPPER[ord("a") : ord("z") + 1] -= 32
# a header without a sequence that is as long as this and of residue letters is probably the sequence
_MIN_SEQUENCE_IN_HEADER = 10
# a record with more text than this has more than MAX_RESIDUES, or the file is not a FASTA file
_MAX_RECORD_BYTES = 1 << 24


class Record(NamedTuple):
    """One protein."""

    id: str
    description: str  # the complete header line after '>', including the id
    sequence: str  # upper case, no trailing '*'


class RecordBlock(NamedTuple):
    """Consecutive records of one file, as Arrow string arrays of equal size."""

    ids: pa.StringArray
    descriptions: pa.StringArray
    sequences: pa.StringArray


def find_fasta_files(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """Find FASTA files.

    Args:
        paths: One or more files or folders.

    Returns:
        The files; those of a folder are sorted by name. Pipes are among them; `pipes.copy_pipes` makes files of them.

    Raises:
        InputError: A path does not exist, a folder has no FASTA file, or a file is given twice.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files = []
    for path in map(expand_path, paths):
        if path.is_dir():
            files += _find_in_folder(path)
        elif path.is_file() or is_pipe(path):
            files.append(path)
        else:
            hint = "Check the path."
            if len(path.name) >= _MIN_SEQUENCE_IN_HEADER and set(path.name.upper()) <= set(RESIDUE_LETTERS):
                hint = "It looks like a sequence: save it in a file, below a line with '>' and a name."
            raise InputError(f"{path}: no such file or folder. {hint}", code="fasta.absent", path=path)
    if not files:
        raise InputError("no FASTA file given. Pass at least one.", code="fasta.none")
    twice = [
        file for file, count in Counter(file.resolve() for file in files if not is_pipe(file)).items() if count > 1
    ]
    if twice:
        raise InputError(f"{twice[0]} is given twice. Pass each file once.", code="fasta.twice", path=twice[0])
    return files


def _find_in_folder(folder: Path) -> list[Path]:
    """Find the FASTA files of a folder, and report those that are not read: hidden ones and those of subfolders."""
    found = sorted(file for file in folder.iterdir() if is_fasta_name(file.name) and file.is_file())
    below = itertools.islice(folder.rglob("*"), MAX_SEARCHED)
    nested = sorted(
        str(file.relative_to(folder))
        for file in below
        if file.parent != folder and is_fasta_name(file.name) and file.is_file() and not _is_hidden(file, folder)
    )
    shown = f"{', '.join(nested[:3])}{', ...' if nested[3:] else ''}"
    if not found:
        hint = f"Names must end in {', '.join(SUFFIXES)} (.gz, .zst)."
        if nested:
            hint = f"Subfolders have some ({shown}): pass the subfolder {folder / Path(nested[0]).parent}."
        raise InputError(
            f"{folder}: no FASTA file in this folder. {hint}", code="fasta.none", path=folder, nested=tuple(nested)
        )
    if hidden := sorted(file.name for file in folder.glob(".*") if is_fasta_name(file.name.lstrip("._"))):
        names = f"{', '.join(hidden[:3])}{', ...' if hidden[3:] else ''}"
        logger.warning("%s: skipped hidden files (%s), such as macOS's; rename them to read them", folder, names)
    if nested:
        logger.warning("%s: skipped FASTA files in subfolders (%s); pass these folders to read them", folder, shown)
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a file in a folder is hidden, or in a hidden subfolder."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def is_fasta_name(name: str) -> bool:
    """Return whether a file in a folder is a FASTA file by its name; hidden files, which start with '.', are not."""
    names = tuple(suffix + packed for suffix in SUFFIXES for packed in COMPRESSED)
    return name.lower().endswith(names) and not name.startswith(".")


def strip_fasta_suffix(path: Path) -> str:
    """Return a file's name without its FASTA and compression suffixes: `my.liver.fasta.gz` -> `my.liver`."""
    name = name_pipe(path) or Path(path).name
    for suffixes in (COMPRESSED[1:], SUFFIXES):
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
        name = name[: len(name) - len(suffix)] or name
    return name


def read_fasta(path: Path, chains: bool = False) -> Iterator[Record]:
    """Read the records of a FASTA file, in order.

    Args:
        path: A plain, gzip or Zstandard file; the format is detected from the content.
        chains: Whether ':' between the chains of a complex is allowed in a sequence.

    Yields:
        The records, with ids as `headers.parse_header` defines them.

    Raises:
        InputError: The file is not a valid protein FASTA file; the message states the record and the fix.
    """
    for block in FastaReader(path, chains=chains):
        rows = (block.ids.to_pylist(), block.descriptions.to_pylist(), block.sequences.to_pylist())
        yield from map(Record._make, zip(*rows, strict=True))


class FastaReader:
    """Iterates over a FASTA file in RecordBlocks and checks each record.

    Args:
        path: A plain, gzip or Zstandard file.
        block_bytes: Bytes of text per block, about.
        chains: Whether ':' between the chains of a complex is allowed in a sequence.

    Attributes:
        num_records: Records yielded so far.
    """

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES, chains: bool = False) -> None:
        self.path = expand_path(path)
        self.num_records = 0
        self._text, self._letters = TextReader(self.path), FileLetters(self.path)
        self._block_bytes = block_bytes
        self._is_allowed = IS_RESIDUE_BYTE.copy()
        self._is_allowed[_CHAIN_BREAK] = chains

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of the compressed file if it is compressed."""
        return self._text.bytes_read

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file, valid after the last block."""
        return self._text.sha256

    def __iter__(self) -> Iterator[RecordBlock]:
        for text in self._read_complete_records():
            block = self._parse(np.frombuffer(text, dtype=np.uint8))
            self.num_records += len(block.ids)
            yield block
        self._letters.check()
        if not self.num_records:
            raise InputError(
                f"{self.path}: no records. A FASTA file has a '>' line and a sequence per record.",
                code="fasta.no-records",
                path=self.path,
            )

    def _read_complete_records(self) -> Iterator[bytes | memoryview]:
        """Yield the text in blocks that end before a '>' at the start of a line."""
        text, started = b"", False
        for chunk in self._text.chunks(self._block_bytes):
            searched = max(len(text) - 1, 0)
            text += chunk
            if not started:
                text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
                started = len(text) >= 4  # enough to distinguish a byte order mark from a header
                if not started:
                    continue
                self._check_start(text)
                searched = 0
            cut = text.rfind(b"\n>", searched)
            if cut >= 0:
                yield memoryview(text)[: cut + 1]
                text = text[cut + 1 :]
            elif len(text) > _MAX_RECORD_BYTES:
                found = f"record {self.num_records + 1:,} is longer than {_MAX_RECORD_BYTES >> 20} MiB"
                fix = f"The limit is {MAX_RESIDUES:,} residues. Check that this is a protein FASTA file."
                raise InputError(f"{self.path}: {found}. {fix}", code="fasta.line", path=self.path)
        if text and not started:
            text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                self._check_start(text)
        if text:
            yield text

    def _check_start(self, text: bytes) -> None:
        """Check that the file is text and starts with a header."""
        if text[:2] in (b"\xff\xfe", b"\xfe\xff", b">\0", b"\0>"):  # a byte order mark, or '>' in two bytes
            raise InputError(
                f"{self.path}: the file is UTF-16. Save it as UTF-8.",
                code="fasta.encoding",
                path=self.path,
                found="UTF-16",
            )
        if text[0] == _HEADER:
            check_first_record(text, self.path)
            return
        line = text[:80].split(b"\n")[0].decode("utf-8", errors="replace").rstrip()
        if "\0" in line or "�" in line:
            raise InputError(
                f"{self.path}: the file does not start with text ({line[:20]!r}). Pass a FASTA file.",
                code="fasta.not-text",
                path=self.path,
            )
        check_first_line(line, self.path)
        raise InputError(
            f"{self.path}: text before the first '>' ({line[:40]!r}). Remove it, or pass a FASTA file.",
            code="fasta.before-header",
            path=self.path,
        )

    def _parse(self, text_N: np.ndarray) -> RecordBlock:
        """Convert the text of complete records to arrays, and check it."""
        stops = np.flatnonzero(text_N == _NEWLINE)
        if text_N[-1] != _NEWLINE:
            stops = np.append(stops, text_N.size)
        starts = np.empty_like(stops)
        starts[0], starts[1:] = 0, stops[:-1] + 1
        is_header = text_N[np.minimum(starts, text_N.size - 1)] == _HEADER
        while (ends_blank := (stops > starts) & _IS_BLANK[text_N[stops - 1]]).any():  # CR, and blanks before it
            stops = stops - ends_blank
        header_lines = np.flatnonzero(is_header)
        is_sequence = ~is_header & (stops > starts)

        lines = copy_pieces(text_N, starts[is_sequence], stops[is_sequence])
        lines_before = np.cumsum(is_sequence)
        first_line = np.append(lines_before[header_lines], lines_before[-1])
        residues_N, offsets = lines.values, lines.offsets[first_line]
        headers = copy_pieces(text_N, starts[header_lines] + 1, stops[header_lines])
        ids = self._parse_ids(headers)
        # the 25 letters are A to Z without J
        if residues_N.size and not (residues_N.min() >= ord("A") and residues_N.max() <= ord("Z")):
            residues_N, offsets = self._normalise(residues_N, offsets, ids)
        elif (residues_N == ord("J")).any():
            self._normalise(residues_N, offsets, ids)
        num_residues = np.diff(offsets)
        if not num_residues.all():
            record = int(np.argmin(num_residues))
            name = ids[record].as_py()
            hint = "Add its residues or remove the record."
            if len(name) >= _MIN_SEQUENCE_IN_HEADER and IS_RESIDUE_BYTE[list(name.upper().encode())].all():
                hint = "Its header looks like the sequence: write a line with '>' and a name above it."
            raise self._error(ids, record, f"has no sequence. {hint}")
        if num_residues.max() > MAX_RESIDUES:
            record = int(np.argmax(num_residues > MAX_RESIDUES))
            found = f"has {num_residues[record]:,} residues; the limit is {MAX_RESIDUES:,}. Shorten or remove it."
            raise self._error(ids, record, found)
        self._letters.add(residues_N)
        return RecordBlock(ids, headers.strings(), Ragged(residues_N, offsets).strings())

    def _parse_ids(self, headers: "Ragged") -> pa.StringArray:
        """Return the ids of headers, as `headers.parse_header` does for one header."""
        text_N, starts, ends = headers.values, headers.offsets[:-1].copy(), headers.offsets[1:]
        if text_N.size and (text_N.max() > 126 or text_N.min() < 32) and not _IS_ORDINARY[text_N].all():
            self._check_text(headers)
        is_blank_N = _ENDS_ID[text_N]
        while (leading := np.flatnonzero(starts < ends)[is_blank_N[starts[starts < ends]]]).size:
            starts[leading] += 1
        blanks = np.append(np.flatnonzero(is_blank_N), text_N.size)
        stops = np.minimum(blanks[np.searchsorted(blanks, starts)], ends)
        if (empty := np.flatnonzero(stops <= starts)).size:
            number = self.num_records + int(empty[0]) + 1
            raise InputError(
                f"{self.path}: record {number} has no id. Add one after its '>'.",
                code="fasta.no-id",
                path=self.path,
                record=number,
            )
        return copy_pieces(text_N, starts, stops).strings()

    def _check_text(self, headers: "Ragged") -> None:
        """Check that the headers are UTF-8 without control characters."""
        for record, header in enumerate(headers.strings(pa.binary()).to_pylist()):
            number = self.num_records + record + 1
            try:
                text = header.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{header[error.start]:02x} at column {error.start + 2} is not UTF-8"
                raise InputError(
                    f"{self.path}: header of record {number}: {found}. Save the file as UTF-8.",
                    code="fasta.encoding",
                    path=self.path,
                    record=number,
                ) from None
            control = find_control_character(text)
            if control == "\r":
                found = "the lines end with CR only. Convert them with `tr '\\r' '\\n'`."
                raise InputError(
                    f"{self.path}: header of record {number}: {found}",
                    code="fasta.header",
                    path=self.path,
                    record=number,
                )
            if control is not None:
                found = f"byte 0x{ord(control):02x} is not text. Pass a FASTA file, or remove the byte."
                raise InputError(
                    f"{self.path}: header of record {number}: {found}",
                    code="fasta.header",
                    path=self.path,
                    record=number,
                )

    def _normalise(
        self, residues_N: np.ndarray, offsets: np.ndarray, ids: pa.StringArray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Convert to upper case, remove blanks and the final '*' of each record, and check the letters."""
        residues_N = _UPPER[residues_N]
        residues_N, offsets = _delete_at(residues_N, offsets, np.flatnonzero(_IS_BLANK[residues_N]))
        last = offsets[1:][np.diff(offsets) > 0] - 1
        residues_N, offsets = _delete_at(residues_N, offsets, last[residues_N[last] == _STOP])
        unknown = np.flatnonzero(~self._is_allowed[residues_N])
        if unknown.size:
            position, byte = int(unknown[0]), int(residues_N[unknown[0]])
            record = int(np.searchsorted(offsets, position, side="right")) - 1
            letters = residues_N[offsets[record] : offsets[record + 1]].tobytes().decode("latin-1")
            number = self.num_records + record + 1
            place = f"{self.path}: record {ids[record].as_py()} ({number:,})"
            check_sequence_format(place, letters, self.path, number)
            place = f"at residue {position - offsets[record] + 1:,}"
            if 32 < byte < 127:
                advice = advise_on_letter(chr(byte), letters) or "Correct or remove the record."
                found = f"letter {chr(byte)!r} {place} is not one of {RESIDUE_LETTERS}. {advice}"
            else:
                found = f"byte 0x{byte:02x} {place} is not text. Correct or remove the record."
            raise self._error(ids, record, found)
        return residues_N, offsets

    def _error(self, ids: pa.StringArray, record: int, found: str) -> InputError:
        """Build the error for a record of the current block."""
        return InputError(
            f"{self.path}: record {ids[record].as_py()} ({self.num_records + record + 1:,}): {found}",
            code="fasta.sequence",
            path=self.path,
            record=self.num_records + record + 1,
        )


def _delete_at(values_N: np.ndarray, offsets: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Delete the elements at ascending positions, and adapt the offsets."""
    return np.delete(values_N, positions), offsets - np.searchsorted(positions, offsets)
