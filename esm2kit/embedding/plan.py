"""What an embedding run has to do, in which batches, and what is done: a table on disk, so that memory stays bounded.

The FASTA is read once to fill the table (one row a protein, 56 bytes) and find every fault before any work, then once
more in windows: the sequences of a window are sorted by residues and packed into batches. Which batch holds which
protein is a function of the table alone, so a run that was killed, or is spread over processes, does the very same
batches.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json
from esm2kit.sequences.batching import split_by_tokens
from esm2kit.sequences.fasta import Record, read_fasta

logger = logging.getLogger(__name__)

Key = Literal["index", "hash", "id"]
# Sequences sorted together: enough that batches hold neighbours in residues, few enough to hold in memory.
PROTEINS_PER_WINDOW = 8192
RESIDUES_PER_WINDOW = 4_000_000
ROWS_PER_BLOCK = 1 << 16
# Ids compared with one another at once.
PROTEINS_PER_BUCKET = 1_000_000
# What nucleic acids are written in; that many residues of a protein are hardly ever these alone.
NUCLEIC, MIN_NUCLEIC_LETTERS = "ACGTUN", 10
TABLE_ROW = np.dtype([("num_residues", "<i4"), ("id", "V16"), ("sequence", "V32")])


class Table:
    """One row a protein, memory-mapped: residues in the FASTA, digest of its id, sha256 key of its sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.rows = np.memmap(self.folder / "proteins.bin", dtype=TABLE_ROW, mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> Iterator[str]:
        with open(self.folder / "ids.txt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]

    def keys(self, key: Key) -> Iterator[str]:
        """What each protein's dataset is called."""
        if key == "id":
            yield from self.ids()
        elif key == "hash":
            yield from (row["sequence"].tobytes().hex() for row in self.rows)
        else:
            yield from map(str, range(len(self)))

    @classmethod
    def build(cls, files: Iterable[Path], folder: Path) -> "Table":
        """Read the FASTA files once and write the table.

        Raises: InputError for whatever `read_fasta` refuses, and for equal ids with different sequences.
        """
        files, nucleic = list(files), 0
        with (
            open(folder / "ids.txt", "w", encoding="utf-8", newline="\n") as ids,
            open(folder / "proteins.bin", "wb") as rows,
        ):
            block: list[tuple[int, bytes, bytes]] = []
            for record in read_records(files):
                ids.write(f"{record.id}\n")
                nucleic += len(record.sequence) >= MIN_NUCLEIC_LETTERS and not record.sequence.strip(NUCLEIC)
                block.append((len(record.sequence), _hash_id(record.id), bytes.fromhex(hash_sequence(record.sequence))))
                if len(block) == ROWS_PER_BLOCK:
                    rows.write(np.array(block, dtype=TABLE_ROW).tobytes())
                    block.clear()
            rows.write(np.array(block, dtype=TABLE_ROW).tobytes())
        table, named = cls(folder), " and ".join(map(str, files))
        table._check_ids(named)
        if nucleic:
            told = "%s: every letter of %d of %d sequences is A, C, G, T, U or N: is this DNA? ESM-2 reads proteins"
            logger.warning(told, named, nucleic, len(table))
        return table

    def _check_ids(self, named: str) -> None:
        """Some rows at a time: those whose id digest falls into one bucket, sorted by id."""
        buckets = len(self) // PROTEINS_PER_BUCKET + 1
        for bucket in range(buckets):
            found = []
            for start in range(0, len(self), ROWS_PER_BLOCK):
                block = np.asarray(self.rows[start : start + ROWS_PER_BLOCK])
                number = np.ascontiguousarray(block["id"]).view("<u8")[::2]
                found.append(start + np.flatnonzero(number % np.uint64(buckets) == bucket))
            indices = np.concatenate(found)
            # as fixed-size byte strings V16 and V32 do not sort; two 64-bit numbers of the id do
            ids = np.ascontiguousarray(self.rows["id"][indices]).view("<u8").reshape(-1, 2)
            order = np.lexsort((indices, ids[:, 1], ids[:, 0]))
            same_id = (ids[order][1:] == ids[order][:-1]).all(1)
            sequences = np.ascontiguousarray(self.rows["sequence"][indices[order]]).view("<u8").reshape(-1, 4)
            wrong = np.flatnonzero(same_id & (sequences[1:] != sequences[:-1]).any(1))
            if wrong.size:
                first, second = sorted(int(index) for index in indices[order][wrong[0] : wrong[0] + 2])
                protein = next(protein for index, protein in enumerate(self.ids()) if index == first)
                raise InputError(
                    f"{named}: records {first + 1} and {second + 1} share the id {protein!r} but not the sequence: "
                    "give each its own id",
                    code="embed.ambiguous-id",
                    id=protein,
                    records=(first + 1, second + 1),
                )

    def check_lengths(self, max_residues: int) -> None:
        """Raise InputError naming the proteins over the limit."""
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
            f"{', '.join(map(str, shown.values()))}{more}; choose --long_proteins window "
            "(overlapping windows, averaged) or --long_proteins truncate (their start)",
            code="embed.too-long",
            found=int(long.size),
            allowed=max_residues,
        )


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """The records of all files in order."""
    for file in files:
        yield from read_fasta(file)


def hash_sequence(sequence: str) -> str:
    """sha256 of `sequence_residues`, which biotrainer looks embeddings up by."""
    return hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()


def _hash_id(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ProteinBatch(NamedTuple):
    """One unit of work: some proteins of one window, longest first.

    Args:
        number: counted through the whole run.
        rows: the proteins' places in the table.
    """

    number: int
    rows: np.ndarray


def split_into_windows(num_residues_P: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs of proteins that are sorted together."""
    start = 0
    while start < len(num_residues_P):
        upcoming = np.asarray(num_residues_P[start : start + PROTEINS_PER_WINDOW], dtype=np.int64)
        stop = start + max(1, int(np.searchsorted(upcoming.cumsum(), RESIDUES_PER_WINDOW, side="right")))
        yield start, stop
        start = stop


def plan_window(num_tokens: np.ndarray, start: int, number: int, batch_tokens: int) -> list[ProteinBatch]:
    """The batches of one window.

    Args:
        num_tokens: tokens of each of its proteins.
        start: the first one's place in the table.
        number: of the first batch.
        batch_tokens: a batch holds at most this many, or one protein.
    """
    batches = split_by_tokens(num_tokens, batch_tokens)
    return [ProteinBatch(number + index, start + positions) for index, positions in enumerate(batches)]


class Journal:
    """Which batches are on disk: one append-only file of int64 numbers a process, read by all."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"done.{rank}.bin"

    def read_done(self) -> set[int]:
        """Numbers of the batches any process has finished; a torn last entry does not count."""
        numbers: set[int] = set()
        for path in self.folder.glob("done.*.bin"):
            data = path.read_bytes()
            numbers.update(np.frombuffer(data[: len(data) // 8 * 8], dtype="<i8").tolist())
        return numbers

    def open(self) -> int:
        """A file descriptor to append to, the torn entry cut off."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        whole = os.lseek(handle, 0, os.SEEK_END) // 8 * 8
        os.ftruncate(handle, whole)
        os.lseek(handle, whole, os.SEEK_SET)
        return handle


def read_plan(folder: Path) -> dict | None:
    """The unfinished run in a folder, None if there is none or its files were not yet all made."""
    path = folder / "plan.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_plan(folder: Path, plan: dict) -> None:
    """Written last: from now on the run can be taken up again."""
    write_json(folder / "plan.json", plan)
