"""Recognise sequences that are letters of a FASTA file, but say nothing as proteins: DNA, RNA, and nothing but X."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm2kit.core.errors import InputError

logger = logging.getLogger(__name__)

# Letters of nucleic acids, and the length from which a protein hardly ever has only these.
NUCLEIC, MIN_NUCLEIC_LETTERS = "ACGTUN", 10
# A file is of nucleic acids if these letters are 95% of its text and each base is 5%: a protein of many A and G has
# hardly any cysteine, and one of many C has other residues.
MIN_NUCLEIC_SHARE, MIN_BASE_SHARE, MIN_LETTERS = 0.95, 0.05, 20
_IS_NUCLEIC = np.zeros(256, dtype=bool)
_IS_NUCLEIC[np.frombuffer(NUCLEIC.encode(), dtype=np.uint8)] = True


def is_nucleic(sequence: str) -> bool:
    """Return whether a sequence consists of the letters of DNA or RNA and is long enough to tell."""
    return len(sequence) >= MIN_NUCLEIC_LETTERS and not sequence.strip(NUCLEIC)


def check_protein(residues_N: np.ndarray, path: Path) -> None:
    """Check that the text of a file, or its first part, is not DNA or RNA.

    Args:
        residues_N: (N,) upper-case letters of the sequences as uint8.
        path: The file.

    Raises:
        InputError: The letters are those of nucleic acids.
    """
    if residues_N.size < MIN_LETTERS or not _IS_NUCLEIC[residues_N[:100_000]].mean() >= MIN_NUCLEIC_SHARE:
        return
    counts = np.bincount(residues_N[:100_000], minlength=256)
    share = {letter: counts[ord(letter)] / counts.sum() for letter in NUCLEIC}
    if min(share["A"], share["C"], share["G"], share["T"] + share["U"]) < MIN_BASE_SHARE:
        return
    kind = "RNA" if share["U"] > share["T"] else "DNA"
    raise InputError(
        f"{path}: the sequences are {kind}, not proteins ({sum(share.values()):.0%} of the letters are A, C, G, T, U "
        "or N). Translate them first, for example with `seqkit translate`.",
        code="sequence.nucleic",
        path=path,
        found=kind,
    )


class LetterCounts:
    """Counts sequences that are probably not proteins, in order to report them once.

    Attributes:
        num_sequences: Sequences that were added.
        num_nucleic: Sequences with the letters of DNA or RNA only.
        num_unknown: Sequences of X only.
    """

    def __init__(self) -> None:
        self.num_sequences = self.num_nucleic = self.num_unknown = 0

    def add(self, sequence: str) -> None:
        """Count a sequence."""
        self.num_sequences += 1
        self.num_nucleic += is_nucleic(sequence)
        self.num_unknown += not sequence.strip("X")

    def add_all(self, sequences: pa.StringArray) -> None:
        """Count the sequences of an Arrow array; only those that start with such letters are converted to text."""
        offsets = np.frombuffer(sequences.buffers()[1], dtype=np.int32)[sequences.offset :][: len(sequences) + 1]
        letters_N = np.frombuffer(sequences.buffers()[2], dtype=np.uint8)
        num_residues = np.diff(offsets)
        may_be_nucleic, may_be_unknown = num_residues >= MIN_NUCLEIC_LETTERS, num_residues > 0
        for place in range(MIN_NUCLEIC_LETTERS):
            letters = letters_N[offsets[:-1] + np.minimum(place, num_residues - 1)]
            may_be_nucleic, may_be_unknown = (
                may_be_nucleic & _IS_NUCLEIC[letters],
                may_be_unknown & (letters == ord("X")),
            )
        rows = np.flatnonzero(may_be_nucleic | may_be_unknown)
        for row in rows:
            self.add(sequences[int(row)].as_py())
        self.num_sequences += len(sequences) - rows.size

    def describe(self) -> list[str]:
        """Describe what was found, in sentences."""
        found = []
        if self.num_nucleic:
            found.append(
                f"{self.num_nucleic:,} of {self.num_sequences:,} sequences contain only A, C, G, T, U and N. Is this "
                "DNA? ESM-2 expects proteins."
            )
        if self.num_unknown:
            found.append(
                f"{self.num_unknown:,} of {self.num_sequences:,} sequences contain only X, the unknown residue: their "
                "vectors and predictions depend on their length alone."
            )
        return found

    def report(self, files: Sequence[Path]) -> None:
        """Log what was found as warnings that name the files."""
        for sentence in self.describe():
            logger.warning("%s: %s", " and ".join(map(str, files)), sentence)
