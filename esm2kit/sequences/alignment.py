"""Local alignments of two sequences, and when they make two proteins similar.

The identity is that of MMseqs2: equal residues as a share of the columns of the best local alignment (BLOSUM62, a gap
of n residues costs 10 + n). Two proteins are similar if the identity reaches a threshold, the alignment covers enough
of the shorter sequence, and a set of unrelated proteins of this size would hardly contain such an alignment.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtrc

# Probability that two random residues are equal: the sum of squared residue frequencies in UniProt.
CHANCE = 0.0587
COVERAGE = 0.8  # of the shorter sequence
# Similar alignments that are expected by chance per protein; more than that, and the alignment is no evidence.
MAX_EXPECTED = 0.01
MAX_CELLS = 25_000_000  # of an alignment: 5,000 x 5,000 residues need 25 MB and a second
_REPLACED = str.maketrans({"U": "C", "O": "K", "J": "X"})  # not in BLOSUM62
# scores of the first residue of a gap and of each further one, as MMseqs2's
FIRST_GAP, NEXT_GAP = -11.0, -1.0
ROUNDING = 1e-9


class Alignment(NamedTuple):
    """The best local alignment of two sequences.

    Args:
        score: in half bits of BLOSUM62.
        identities: columns with equal residues.
        columns: of the alignment, with those of gaps.
        covered: residues of the shorter sequence from its first aligned residue to its last one.
        gaps: number of gaps, each of one residue or more.
    """

    score: float
    identities: int
    columns: int
    covered: int
    gaps: int

    @property
    def identity(self) -> float:
        """Equal residues as a share of the columns."""
        return self.identities / self.columns if self.columns else 0.0


class Criterion(NamedTuple):
    """When two proteins are similar.

    Args:
        identity: least share of equal residues in the columns of the alignment.
        coverage: least share of the shorter sequence that is aligned.
        num_sequences: different sequences of the set, for what chance explains.
    """

    identity: float
    coverage: float
    num_sequences: int

    def count_required(self, residues: int) -> int:
        """Count the equal residues that a similar pair has at least, if its shorter sequence has so many residues."""
        return int(np.ceil(self.identity * np.ceil(self.coverage * residues - ROUNDING) - ROUNDING))

    def is_met(self, found: Alignment, first: int, second: int) -> bool:
        """Return whether an alignment of sequences of so many residues makes them similar."""
        shorter = min(first, second)
        if found.identities < self.identity * found.columns - ROUNDING or not found.identities:
            return False
        if found.covered < self.coverage * shorter - ROUNDING or found.score < found.identities:
            return False
        return self.count_expected(found, first + second) <= MAX_EXPECTED

    def count_expected(self, found: Alignment, places: int) -> float:
        """Count the alignments with as many equal residues that one protein has by chance with the others of the set.

        Args:
            found: the alignment.
            places: residues of both sequences, the number of ways to place one along the other.

        Returns:
            The number; each gap multiplies it by the number of its places, twice the columns.
        """
        chance = float(bdtrc(found.identities - 1, found.columns, CHANCE))
        return self.num_sequences * places * (2.0 * found.columns) ** found.gaps * chance


@cache
def build_aligner(first_gap: float = FIRST_GAP, next_gap: float = NEXT_GAP) -> Any:
    """Build an aligner with BLOSUM62.

    Args:
        first_gap: score of the first residue of a gap; MMseqs2's by default.
        next_gap: score of each further one.

    Returns:
        The aligner of Biopython.
    """
    from Bio.Align import PairwiseAligner, substitution_matrices  # slow import

    return PairwiseAligner(
        mode="local",
        substitution_matrix=substitution_matrices.load("BLOSUM62"),
        open_gap_score=first_gap,
        extend_gap_score=next_gap,
    )


def replace_rare(sequence: str) -> str:
    """Replace the residues that BLOSUM62 does not have: U by C, O by K, and J by X."""
    return sequence.translate(_REPLACED)


def can_align(first: str, second: str) -> bool:
    """Return whether two sequences are short enough for an alignment."""
    return 0 < len(first) * len(second) <= MAX_CELLS


def align_ungapped(first: str, second: str) -> Alignment:
    """Align two sequences of equal length without gaps and from end to end; the score is not computed."""
    equal = int(np.count_nonzero(_encode(first) == _encode(second)))
    return Alignment(float(len(first)), equal, len(first), len(first), 0)


def align_locally(first: str, second: str, at_least: float = 0.0) -> Alignment | None:
    """Compute the best local alignment of two sequences (Smith and Waterman 1981, with Gotoh's gaps).

    Args:
        first: residues.
        second: residues.
        at_least: lowest score of interest, because a score alone needs a fifth of the time.

    Returns:
        The alignment; of several with the best score that which Biopython lists first. None if the score is lower, or
        0.
    """
    first, second = sorted((first, second), key=lambda sequence: (len(sequence), sequence))  # the order does not matter
    aligner = build_aligner()
    residues = replace_rare(first), replace_rare(second)
    if at_least > 0 and aligner.score(*residues) < at_least:
        return None
    best = next(iter(aligner.align(*residues)), None)
    if best is None:  # no pair of residues has a positive score
        return None
    ranges_2N2 = np.asarray(best.aligned)
    codes = _encode(first), _encode(second)
    blocks = [[code[start:stop] for start, stop in ranges] for code, ranges in zip(codes, ranges_2N2, strict=True)]
    equal = int(np.count_nonzero(np.concatenate(blocks[0]) == np.concatenate(blocks[1])))
    spans = [int(ranges[-1][1] - ranges[0][0]) for ranges in ranges_2N2]
    aligned = int((ranges_2N2[0][:, 1] - ranges_2N2[0][:, 0]).sum())
    covered = max(spans) if len(first) == len(second) else spans[0]
    return Alignment(float(best.score), equal, sum(spans) - aligned, covered, len(ranges_2N2[0]) - 1)


def _encode(sequence: str) -> np.ndarray:
    return np.frombuffer(sequence.encode(), np.uint8)


def are_similar(first: str, second: str, criterion: Criterion, is_likely: bool = False) -> bool:
    """Return whether two different sequences are similar; sequences of equal length are first compared without gaps.

    Args:
        first: residues.
        second: residues.
        criterion: identity and coverage.
        is_likely: whether most such pairs are similar, so that computing their score first takes longer.
    """
    if len(first) == len(second) and criterion.is_met(align_ungapped(first, second), len(first), len(second)):
        return True
    required = 0 if is_likely else criterion.count_required(min(len(first), len(second)))
    found = align_locally(first, second, at_least=required)
    return found is not None and criterion.is_met(found, len(first), len(second))
