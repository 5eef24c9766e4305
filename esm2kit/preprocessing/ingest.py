"""Read FASTA files into a store and its keys, in one pass over the text."""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.core.progress import Progress
from esm2kit.sequences.fasta import FastaReader
from esm2kit.sequences.letters import LetterCounts
from esm2kit.sequences.store import SCHEMA, StoreWriter, regroup_batches
from esm2kit.sequences.text import prefetch

logger = logging.getLogger(__name__)

# Data of a record for joins and comparisons, in file order. Two sequences count as equal if their lengths and this
# 64-bit hash are equal. Two different sequences have equal hashes with a probability of 1 in 1.8e19.
KEYS = pa.schema([("id", pa.string()), ("residues", pa.int32()), ("hash", pa.uint64())])
_HASH = "SELECT id, strlen(sequence)::INTEGER AS residues, hash(sequence) AS hash FROM batch"
_ROWS_PER_GROUP = 1 << 17


class StagedFasta(NamedTuple):
    """FASTA files as one store and its keys.

    Args:
        name: Role of the files, such as `train_fasta`.
        store: Path of the store.
        keys: Path of the Parquet file with ids, lengths and hashes.
        num_records: Number of records.
        num_residues: Number of residues.
        files: Per input file, path, bytes, mtime_ns, sha256 and first_row.
    """

    name: str
    store: Path
    keys: Path
    num_records: int
    num_residues: int
    files: list[dict[str, Any]]

    def locate(self, row: int) -> str:
        """Format a row as `file: record number`, for error messages."""
        file = [file for file in self.files if file["first_row"] <= row][-1]
        return f"{file['path']}: record {row - file['first_row'] + 1:,}"


def write_with_keys(batches: Iterable[pa.RecordBatch], store: Path | None, keys: Path) -> tuple[int, int]:
    """Write records as a store and their keys as Parquet.

    Args:
        batches: Records with ids and sequences.
        store: Path of the store; None writes the keys only.
        keys: Path of the Parquet file.

    Returns:
        The number of records and of residues.
    """
    num_records = num_residues = 0
    waiting: list[pa.Table] = []

    def flush() -> None:
        keys_writer.write_table(pa.concat_tables(waiting), row_group_size=_ROWS_PER_GROUP)
        waiting.clear()

    with (
        duckdb.connect(config={"threads": 1}) as hasher,
        pq.ParquetWriter(keys, KEYS, use_dictionary=False, write_statistics=False, compression="lz4") as keys_writer,
        StoreWriter(store) if store else nullcontext() as writer,
    ):
        for batch in regroup_batches(batches):
            hasher.register("batch", batch)
            hashed = hasher.sql(_HASH).to_arrow_table().cast(KEYS)
            waiting.append(hashed)
            num_records += batch.num_rows
            num_residues += pc.sum(hashed["residues"]).as_py()
            if writer:
                writer.write(batch)
            if num_records % _ROWS_PER_GROUP == 0:
                flush()
        if waiting:
            flush()
    return num_records, num_residues


def ingest(
    name: str, files: Sequence[Path], work: Path, keep_sequences: bool = True, stop: threading.Event | None = None
) -> StagedFasta:
    """Read, check and hash FASTA files, unless an earlier call has finished them.

    Args:
        name: Role of the files, such as `train_fasta`; the output files have this name.
        files: FASTA files, read one after the other.
        work: Output folder for `<name>.arrow`, `<name>.parquet` and, when both are complete, `<name>.json`.
        keep_sequences: False writes the keys only.
        stop: If another thread sets this event, reading stops at the next block with CancelledError.

    Returns:
        The staged files.

    Raises:
        InputError: A record is invalid.
        CancelledError: `stop` was set.
    """
    store, keys, marker = (work / f"{name}.{kind}" for kind in ("arrow", "parquet", "json"))
    if marker.exists():
        return read_staged(marker)
    progress = Progress(logger, f"{name}:", "MB", sum(path.stat().st_size for path in files) / 1e6)
    stamps: list[dict[str, Any]] = []
    letters = LetterCounts()

    def batches() -> Iterator[pa.RecordBatch]:
        num_records = num_bytes = 0
        for path in files:
            status, first_row = path.stat(), num_records
            reader = FastaReader(path)
            for block in reader:
                if stop is not None and stop.is_set():
                    raise CancelledError
                yield pa.record_batch([block.ids, block.sequences], schema=SCHEMA)
                letters.add_all(block.sequences)
                num_records += len(block.ids)
                progress.update((num_bytes + reader.bytes_read) / 1e6, f"{num_records:,} records")
            num_bytes += reader.bytes_read
            stamp = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            stamps.append(stamp | {"sha256": reader.sha256, "first_row": first_row})

    # one thread parses, another hashes and writes
    with progress:
        num_records, num_residues = write_with_keys(prefetch(batches()), store if keep_sequences else None, keys)
    letters.report(files)
    staged = StagedFasta(name, store, keys, num_records, num_residues, stamps)
    fields = {field: value for field, value in staged._asdict().items() if field not in ("store", "keys")}
    write_sealed_json(marker, fields)
    return staged


def read_staged(marker: Path) -> StagedFasta:
    """Read the marker that `ingest` wrote."""
    fields = read_sealed_json(marker, f"delete {marker.parent} and run the command again")
    return StagedFasta(store=marker.with_suffix(".arrow"), keys=marker.with_suffix(".parquet"), **fields)
