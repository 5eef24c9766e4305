"""Plan the batches of an embedding run, and record the finished ones, in bounded memory.

The FASTA is read twice. The first time, it is checked and a table is written to disk, with 56 bytes per protein. The
second time, it is read in windows: the sequences of a window are sorted by length and grouped into batches. The batches
depend only on the table, so an interrupted or a distributed run has the same batches.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.files import BINARY
from esm2kit.sequences.batching import split_by_tokens
from esm2kit.sequences.fasta import Record, read_fasta
from esm2kit.sequences.ids import DIGEST_BYTES, hash_sequence
from esm2kit.sequences.letters import LetterCounts

REMEDY = "run `esm2kit embed` again with --restart true"
Key = Literal["index", "hash", "id"]
# Sequences that are sorted together: enough for batches of similar lengths, few enough for the memory.
PROTEINS_PER_WINDOW = 8192
RESIDUES_PER_WINDOW = 4_000_000
ROWS_PER_BLOCK = 1 << 16
# Ids that are compared at a time.
PROTEINS_PER_BUCKET = 1_000_000
TABLE_ROW = np.dtype([("num_residues", "<i4"), ("id", "V16"), ("sequence", "V32")])


class Table:
    """Memory-mapped table with one row per protein: number of residues, digest of the id, hash of the sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.rows = np.memmap(self.folder / "proteins.bin", dtype=TABLE_ROW, mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> Iterator[str]:
        """Iterate over the protein ids."""
        with open(self.folder / "ids.txt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]

    def keys(self, key: Key) -> Iterator[str]:
        """Iterate over the names of the proteins' datasets."""
        if key == "id":
            yield from self.ids()
        elif key == "hash":
            yield from (row["sequence"].tobytes().hex() for row in self.rows)
        else:
            yield from map(str, range(len(self)))

    def digests(self) -> Iterator[bytes]:
        """Iterate over the digests of the sequences, see `digest_sequence`."""
        return (row["sequence"].tobytes()[:DIGEST_BYTES] for row in self.rows)

    @classmethod
    def build(cls, files: Iterable[Path], folder: Path) -> "Table":
        """Read and check the FASTA files, and write the table.

        Args:
            files: FASTA files.
            folder: for the table.

        Returns:
            The table.

        Raises:
            InputError: a file is not valid FASTA, or different sequences have equal ids.
        """
        files, letters = list(files), LetterCounts()
        with (
            open(folder / "ids.txt", "w", encoding="utf-8", newline="\n") as ids,
            open(folder / "proteins.bin", "wb") as rows,
        ):
            block: list[tuple[int, bytes, bytes]] = []
            for record in read_records(files):
                ids.write(f"{record.id}\n")
                letters.add(record.sequence)
                block.append((len(record.sequence), _hash_id(record.id), bytes.fromhex(hash_sequence(record.sequence))))
                if len(block) == ROWS_PER_BLOCK:
                    rows.write(np.array(block, dtype=TABLE_ROW).tobytes())
                    block.clear()
            rows.write(np.array(block, dtype=TABLE_ROW).tobytes())
        table = cls(folder)
        table._check_ids(" and ".join(map(str, files)))
        letters.report(files)
        return table

    def _check_ids(self, named: str) -> None:
        """Check that equal ids have equal sequences; bucket by bucket of the id digests, to bound the memory."""
        buckets = len(self) // PROTEINS_PER_BUCKET + 1
        for bucket in range(buckets):
            found = []
            for start in range(0, len(self), ROWS_PER_BLOCK):
                block = np.asarray(self.rows[start : start + ROWS_PER_BLOCK])
                number = np.ascontiguousarray(block["id"]).view("<u8")[::2]
                found.append(start + np.flatnonzero(number % np.uint64(buckets) == bucket))
            indices = np.concatenate(found)
            # NumPy cannot sort V16 and V32, so the digests are compared as 64-bit integers
            ids = np.ascontiguousarray(self.rows["id"][indices]).view("<u8").reshape(-1, 2)
            order = np.lexsort((indices, ids[:, 1], ids[:, 0]))
            same_id = (ids[order][1:] == ids[order][:-1]).all(1)
            sequences = np.ascontiguousarray(self.rows["sequence"][indices[order]]).view("<u8").reshape(-1, 4)
            wrong = np.flatnonzero(same_id & (sequences[1:] != sequences[:-1]).any(1))
            if wrong.size:
                first, second = sorted(int(index) for index in indices[order][wrong[0] : wrong[0] + 2])
                protein = next(protein for index, protein in enumerate(self.ids()) if index == first)
                raise InputError(
                    f"{named}: records {first + 1} and {second + 1} have the same id {protein!r} but different "
                    "sequences. Use a different id for each sequence.",
                    code="embed.ambiguous-id",
                    id=protein,
                    records=(first + 1, second + 1),
                )

    def check_lengths(self, max_residues: int) -> None:
        """Raise InputError if proteins exceed max_residues; the message lists them."""
        long = np.flatnonzero(self.rows["num_residues"] > max_residues)
        if not long.size:
            return
        shown = dict.fromkeys(int(index) for index in long[:5])
        for index, protein in enumerate(self.ids()):
            if index in shown:
                shown[index] = f"{protein} ({self.rows['num_residues'][index]})"
            if index >= max(shown):
                break
        more = "" if long.size <= 5 else f" and {long.size - 5} more"
        raise InputError(
            f"{long.size} of {len(self)} proteins exceed max_residues {max_residues}: "
            f"{', '.join(map(str, shown.values()))}{more}. Use --long_proteins window "
            "(overlapping windows, averaged) or --long_proteins truncate (first residues only).",
            code="embed.too-long",
            found=int(long.size),
            allowed=max_residues,
        )


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """Iterate over the records of all files in order."""
    for file in files:
        yield from read_fasta(file)


def _hash_id(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ProteinBatch(NamedTuple):
    """Proteins that are embedded together, longest first.

    Args:
        number: index of the batch in the run.
        rows: indices of the proteins in the table.
    """

    number: int
    rows: np.ndarray


def split_into_windows(num_residues_P: np.ndarray) -> Iterator[tuple[int, int]]:
    """Iterate over the windows (start, stop) of proteins that are sorted together."""
    start = 0
    while start < len(num_residues_P):
        upcoming = np.asarray(num_residues_P[start : start + PROTEINS_PER_WINDOW], dtype=np.int64)
        stop = start + max(1, int(np.searchsorted(upcoming.cumsum(), RESIDUES_PER_WINDOW, side="right")))
        yield start, stop
        start = stop


def plan_window(num_tokens: np.ndarray, start: int, number: int, batch_tokens: int) -> list[ProteinBatch]:
    """Plan the batches of one window.

    Args:
        num_tokens: number of tokens per protein of the window.
        start: index of the first protein in the table.
        number: index of the first batch.
        batch_tokens: maximum number of tokens per batch of more than one protein.

    Returns:
        The batches in order.
    """
    batches = split_by_tokens(num_tokens, batch_tokens)
    return [ProteinBatch(number + index, start + positions) for index, positions in enumerate(batches)]


# One finished batch: its number, the CRC-32 of the values written for it, and the CRC-32 of these two.
JOURNAL_ENTRY = np.dtype([("number", "<i8"), ("values", "<u4"), ("entry", "<u4")])


class Journal:
    """Record of the batches that are on disk: one append-only file per process, read by all processes."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"done.{rank}.bin"

    def read_done(self) -> dict[int, int]:
        """Read number -> checksum of the batches that any process has finished; incomplete entries are ignored."""
        done: dict[int, int] = {}
        for path in self.folder.glob("done.*.bin"):
            data = path.read_bytes()
            entries = np.frombuffer(data[: len(data) // JOURNAL_ENTRY.itemsize * JOURNAL_ENTRY.itemsize], JOURNAL_ENTRY)
            for entry in entries:
                if zlib.crc32(entry.tobytes()[:12]) == entry["entry"]:
                    done[int(entry["number"])] = int(entry["values"])
        return done

    @staticmethod
    def encode(finished: Iterable[tuple[int, int]]) -> bytes:
        """Encode entries from pairs of batch number and checksum."""
        entries = np.array([(number, values, 0) for number, values in finished], dtype=JOURNAL_ENTRY)
        entries["entry"] = [zlib.crc32(entry.tobytes()[:12]) for entry in entries]
        return entries.tobytes()

    def open(self) -> int:
        """Remove an incomplete last entry, and return a file descriptor for appending."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | BINARY, 0o644)
        size = os.lseek(handle, 0, os.SEEK_END) // JOURNAL_ENTRY.itemsize * JOURNAL_ENTRY.itemsize
        os.ftruncate(handle, size)
        os.lseek(handle, size, os.SEEK_SET)
        return handle


def read_plan(folder: Path) -> dict | None:
    """Read the plan of the unfinished run in a folder.

    Args:
        folder: the run's folder.

    Returns:
        The plan; None if there is no run, or if its files were not yet all created.

    Raises:
        InputError: the plan is damaged.
    """
    path = folder / "plan.json"
    return read_sealed_json(path, REMEDY) if path.is_file() else None


def write_plan(folder: Path, plan: dict) -> None:
    """Write the plan of a run. It is written last, because a run with a plan can be resumed."""
    write_sealed_json(folder / "plan.json", plan)
