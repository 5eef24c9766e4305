"""Read cluster tables, esm2nv's mapping.tsv and MMseqs2's cluster TSV, block by block into Parquet files."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.sequences.text import Ragged, TextReader, copy_pieces

_BLOCK_BYTES = 1 << 22
_NEWLINE, _TAB, _COMMA = b"\n\t,"
_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[np.frombuffer(b" \r", dtype=np.uint8)] = True

CLUSTERS = pa.schema([("line", pa.int64()), ("cluster", pa.string())])
MEMBERS = pa.schema([("line", pa.int64()), ("member", pa.string())])
PAIRS = pa.schema([("line", pa.int64()), ("cluster", pa.string()), ("member", pa.string())])
# the tables are read completely and only once, so statistics and dictionaries would not help
_PARQUET = {"use_dictionary": False, "write_statistics": False, "compression": "lz4"}


def mapping_table_paths(work: Path) -> tuple[Path, Path]:
    """Return the paths of the cluster and member tables that `read_mapping` writes."""
    return work / "clusters.parquet", work / "members.parquet"


def cluster_table_path(work: Path, level: int) -> Path:
    """Return the path of the table that `read_cluster_tsv` writes; level 0 is the finer clustering."""
    return work / f"level_{level}.parquet"


def read_mapping(path: Path, clusters: Path, members: Path, stop: threading.Event | None = None) -> str:
    """Read lines of `cluster id <TAB> member,member,...`; further columns are ignored.

    Args:
        path: mapping.tsv: plain text, gzip or Zstandard. Line 1 is kept even if it is a header; `join_mapping` decides
            by its id.
        clusters: Parquet file to write, with columns line (from 1) and cluster.
        members: Parquet file to write, with columns line and member.
        stop: If another thread sets this event, reading stops at the next block with CancelledError.

    Returns:
        Hex SHA-256 of the file.

    Raises:
        InputError: A line has no cluster id or no members, or is not text.
        CancelledError: `stop` was set.
    """
    reader = TextReader(path)
    with (
        atomic_path(clusters) as clusters_part,
        atomic_path(members) as members_part,
        pq.ParquetWriter(clusters_part, CLUSTERS, **_PARQUET) as cluster_writer,
        pq.ParquetWriter(members_part, MEMBERS, **_PARQUET) as member_writer,
    ):
        for lines, text_N, names, (starts, stops) in _read_columns(reader, stop):
            commas = np.flatnonzero(text_N == _COMMA)
            first, last = np.searchsorted(commas, starts), np.searchsorted(commas, stops)
            num_pieces = last - first + 1
            line_of, nth = np.repeat(np.arange(lines.size), num_pieces), _count_up(num_pieces)
            edges = np.append(commas, text_N.size)
            edge_of = first[line_of] + nth
            piece_starts = np.where(nth == 0, starts[line_of], edges[edge_of - 1] + 1)
            piece_stops = np.where(nth == num_pieces[line_of] - 1, stops[line_of], edges[edge_of])
            piece_starts, piece_stops = _strip(text_N, piece_starts, piece_stops)
            filled = piece_stops > piece_starts
            line_of = line_of[filled]
            _check_members(path, lines, names, np.bincount(line_of, minlength=lines.size) == 0)
            member_ids = copy_pieces(text_N, piece_starts[filled], piece_stops[filled])
            cluster_writer.write_batch(pa.record_batch([lines, names.strings()], schema=CLUSTERS))
            member_writer.write_batch(pa.record_batch([lines[line_of], member_ids.strings()], schema=MEMBERS))
    return reader.sha256


def read_cluster_tsv(path: Path, pairs: Path, stop: threading.Event | None = None) -> str:
    """Read MMseqs2's lines of `representative <TAB> member`.

    Args:
        path: The TSV without header: plain text, gzip or Zstandard.
        pairs: Parquet file to write, with columns line (from 1), cluster and member.
        stop: If another thread sets this event, reading stops at the next block with CancelledError.

    Returns:
        Hex SHA-256 of the file.

    Raises:
        InputError: A line lacks a column or is not text.
        CancelledError: `stop` was set.
    """
    reader = TextReader(path)
    with atomic_path(pairs) as part, pq.ParquetWriter(part, PAIRS, **_PARQUET) as writer:
        for lines, text_N, names, (starts, stops) in _read_columns(reader, stop):
            starts, stops = _strip(text_N, starts, stops)
            _check_members(path, lines, names, stops <= starts)
            members = copy_pieces(text_N, starts, stops)
            writer.write_batch(pa.record_batch([lines, names.strings(), members.strings()], schema=PAIRS))
    return reader.sha256


Columns = tuple[np.ndarray, np.ndarray, Ragged, tuple[np.ndarray, np.ndarray]]


def _read_columns(reader: TextReader, stop: threading.Event | None) -> Iterator[Columns]:
    """Yield blocks of lines: line numbers, text, first column, and start and stop of the second column in the text."""
    lines_before, is_empty = 0, True
    for text in _read_lines(reader):
        if stop is not None and stop.is_set():
            raise CancelledError
        text_N = np.frombuffer(text, dtype=np.uint8)
        stops = np.flatnonzero(text_N == _NEWLINE)
        if text_N[-1] != _NEWLINE:
            stops = np.append(stops, text_N.size)
        starts = np.append(0, stops[:-1] + 1)
        lines = np.arange(lines_before + 1, lines_before + stops.size + 1)
        lines_before += stops.size
        if text_N.max() > 126 or text_N.min() < _TAB:
            _check_text(reader.path, bytes(text), lines[0])
        starts, stops = _strip(text_N, starts, stops)
        filled = stops > starts
        lines, starts, stops = lines[filled], starts[filled], stops[filled]
        if not lines.size:
            continue
        is_empty = False
        tabs = np.append(np.flatnonzero(text_N == _TAB), [text_N.size] * 2)
        nth = np.searchsorted(tabs, starts)
        first_tab, second_tab = np.minimum(tabs[nth], stops), np.minimum(tabs[nth + 1], stops)
        name_starts, name_stops = _strip(text_N, starts, first_tab)
        if (empty := np.flatnonzero(name_stops <= name_starts)).size:
            raise InputError(
                f"{reader.path}: line {lines[empty[0]]:,} has no cluster id. Add it, or remove the line.",
                code="clusters.line",
                path=reader.path,
                line=lines[empty[0]],
            )
        names = copy_pieces(text_N, name_starts, name_stops)
        yield lines, text_N, names, (np.minimum(first_tab + 1, stops), second_tab)
    if is_empty:
        raise InputError(
            f"{reader.path}: the file has no lines with text. It must list the clusters.",
            code="clusters.empty",
            path=reader.path,
        )


def _read_lines(reader: TextReader) -> Iterator[bytes]:
    """Yield blocks of text that end at a line break."""
    pieces: list[bytes] = []
    for chunk in reader.chunks(_BLOCK_BYTES):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield b"".join([*pieces, chunk[:cut]])
            pieces = []
        pieces.append(chunk[cut:])
    if text := b"".join(pieces):
        yield text


def _strip(text_N: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move starts and stops so that pieces of text do not start or end with a space or CR."""
    last_byte = text_N.size - 1
    while (blank := (stops > starts) & _IS_BLANK[text_N[stops - 1]]).any():
        stops = stops - blank
    while (blank := (stops > starts) & _IS_BLANK[text_N[np.minimum(starts, last_byte)]]).any():
        starts = starts + blank
    return starts, stops


def _count_up(counts: np.ndarray) -> np.ndarray:
    """Concatenate range(count) for all counts."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)


def _check_members(path: Path, lines: np.ndarray, names: Ragged, is_empty: np.ndarray) -> None:
    if is_empty.any():
        first = int(np.argmax(is_empty))
        name = names.strings()[first].as_py()
        raise InputError(
            f"{path}: line {lines[first]:,}: cluster '{name}' has no members. Add their ids after a tab, or remove the "
            "line.",
            code="clusters.line",
            path=path,
        )


def _check_text(path: Path, text: bytes, first_line: int) -> None:
    for number, line in enumerate(text.split(b"\n"), first_line):
        try:
            bad = next((byte for byte in line.decode() if ord(byte) < 32 and byte not in "\t\r"), None)
            found = None if bad is None else ord(bad)
        except UnicodeDecodeError as error:
            found = line[error.start]
        if found is not None:
            raise InputError(
                f"{path}: line {number:,}: byte 0x{found:02x} is not text. Save the file as UTF-8.",
                code="clusters.encoding",
                path=path,
                line=number,
            )
