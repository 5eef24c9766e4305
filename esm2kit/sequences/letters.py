"""Recognise text that has the letters of proteins, but is something else: DNA, RNA, secondary structure, only X."""

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
# hardly any cysteine, and one of many C has other residues. A single peptide may consist of these letters: files with
# fewer letters are only reported.
MIN_NUCLEIC_SHARE, MIN_BASE_SHARE, MIN_LETTERS = 0.95, 0.05, 60
# DSSP's states without those that are no residues; the three that every file of secondary structure has
STRUCTURE, COMMON_STATES = "BCEGHIPST", "CEH"
# Letters of a file that are counted
MAX_LETTERS = 100_000
_IS_NUCLEIC = np.zeros(256, dtype=bool)
_IS_NUCLEIC[np.frombuffer(NUCLEIC.encode(), dtype=np.uint8)] = True


def is_nucleic(sequence: str) -> bool:
    """Return whether a sequence consists of the letters of DNA or RNA and is long enough to tell."""
    return len(sequence) >= MIN_NUCLEIC_LETTERS and not sequence.strip(NUCLEIC)


class FileLetters:
    """Counts the letters of a file, in order to check that it has proteins.

    Args:
        path: The file, for the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._counts, self._num_letters = np.zeros(256, dtype=np.int64), 0

    def add(self, residues_N: np.ndarray) -> None:
        """Count letters, and check the file as soon as there are enough.

        Args:
            residues_N: (N,) upper-case letters of the next sequences as uint8.

        Raises:
            InputError: As `check`.
        """
        residues_N = residues_N[: MAX_LETTERS - self._num_letters]
        if not residues_N.size:
            return
        self._counts += np.bincount(residues_N, minlength=256)
        self._num_letters += residues_N.size
        if self._num_letters == MAX_LETTERS:
            self.check()

    def check(self) -> None:
        """Check that the letters are not those of nucleic acids or of secondary structure.

        Raises:
            InputError: They are, and there are enough letters to tell.
        """
        if self._num_letters < MIN_LETTERS:
            return
        share = {chr(byte): self._counts[byte] / self._num_letters for byte in np.flatnonzero(self._counts).tolist()}
        nucleic = sum(share.get(letter, 0) for letter in NUCLEIC)
        bases = [sum(share.get(letter, 0) for letter in base) for base in ("A", "C", "G", "TU")]
        if nucleic >= MIN_NUCLEIC_SHARE and min(bases) >= MIN_BASE_SHARE:
            kind = "RNA" if share.get("U", 0) > share.get("T", 0) else "DNA"
            raise InputError(
                f"{self.path}: the sequences are {kind}, not proteins ({nucleic:.0%} of the letters are A, C, G, T, U "
                "or N). Translate them first, for example with `seqkit translate`.",
                code="sequence.nucleic",
                path=self.path,
                found=kind,
            )
        if share.keys() <= set(STRUCTURE) and min(share.get(state, 0) for state in COMMON_STATES) >= MIN_BASE_SHARE:
            raise InputError(
                f"{self.path}: the records are secondary structure, not proteins: all their letters are "
                f"{', '.join(sorted(share))}. Pass the FASTA file of the sequences.",
                code="sequence.structure",
                path=self.path,
                found="".join(sorted(share)),
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
