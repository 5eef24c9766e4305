"""Exclude pairs of sequences that are not similar without aligning them, by the scores of many alignments at once.

Opal (Šošić 2015) computes the scores of one sequence with many others with SIMD instructions, and not the alignments.
The bounds come from scores too. Multiply each score of BLOSUM62 and of gaps by a number M, and add a small weight for
each column: if M is greater than twice the sum of weights of any alignment, the best alignment is one of those with the
best score, and of these one with the largest sum of weights. This is the most equal residues, or columns, that any
alignment with the best score has, and therefore a bound on those of the alignment that `align_locally` returns.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtrc

from esm2kit.sequences.alignment import (
    CHANCE,
    FIRST_GAP,
    MAX_EXPECTED,
    NEXT_GAP,
    ROUNDING,
    Criterion,
    build_aligner,
    replace_rare,
)

LETTERS = "ARNDCQEGHILKMFPSTWYVBZX*"  # of BLOSUM62, and those that `replace_rare` replaces:
RARE = "UOJ"
HIGHEST = 11  # score of two residues: two tryptophans
# Opal stores a column of the alignment on the stack, with 70 bytes per residue of the query.
MAX_QUERY = 5_000
EXACT_FLOAT, EXACT_SCORE = 2**24, 2**30  # below these, scores of residues and of alignments are exact


class Weights(NamedTuple):
    """What the columns of an alignment count.

    Args:
        equal: a column with equal residues.
        different: a column with different residues.
        gap: a column with a residue and a gap.
    """

    equal: int
    different: int
    gap: int


MOST_COLUMNS, FEWEST_COLUMNS, MOST_IDENTITIES = Weights(1, 1, 1), Weights(-1, -1, -1), Weights(1, 0, 0)


class PairScreen:
    """Finds the pairs of some sequences that may be similar by their local alignments.

    Args:
        sequences: S sequences in upper case.
        criterion: when two of them are similar.
    """

    def __init__(self, sequences: Sequence[str], criterion: Criterion) -> None:
        self.sequences, self.criterion = sequences, criterion
        self._length_S = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        longest = int(self._length_S.max(initial=0))
        self._required_L = np.array([criterion.count_required(length) for length in range(longest + 1)])
        # a lower identity than the threshold excludes fewer pairs; of hundredths, the weights are small numbers
        share = Fraction(int(criterion.identity * 100 + ROUNDING), 100)
        self._above = Weights(share.denominator - share.numerator, -share.numerator, -share.numerator)
        self._database: Any = None
        if find_spec("pyopal") is not None:
            from pyopal import Database

            self._database = Database(sequences, alphabet=LETTERS + RARE)

    def find_possible(
        self, first_N: np.ndarray, second_N: np.ndarray, note_done: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """Find the pairs whose best local alignment may make them similar.

        Args:
            first_N: (N,) rows of sequences.
            second_N: (N,) rows of the others.
            note_done: called with the number of finished pairs.

        Returns:
            (N,) False for a pair that is not similar: the score is too low, or each alignment with this score has too
            few equal residues, too few columns, or no more than chance explains. Nothing is known about the others.
        """
        possible_N = np.ones(len(first_N), dtype=bool)
        done = 0
        for query, places, targets in self._list_queries(first_N, second_N):
            possible_N[places] = self._screen(query, targets)
            done += len(places)
            note_done(done)
        return possible_N

    def bound_identity(self, query: int, targets: np.ndarray) -> np.ndarray:
        """Compute the highest identity that a local alignment of a sequence with each of some others can have.

        Args:
            query: row of a sequence.
            targets: (N,) rows of others.

        Returns:
            (N,) the highest number of equal residues as a share of the lowest number of columns, of all alignments with
            the best score; infinity where that is not known.
        """
        highest_N = np.full(len(targets), np.inf)
        if self._database is not None and self._length_S[query] <= MAX_QUERY:
            scores_N = self._score(query, targets)
            equal_N, known_N = self._maximise(query, targets, scores_N, MOST_IDENTITIES)
            columns_N, both_N = self._maximise(query, targets, scores_N, FEWEST_COLUMNS)
            known_N &= both_N & (columns_N < 0)
            highest_N[known_N] = equal_N[known_N] / -columns_N[known_N]
        return highest_N

    def _list_queries(self, first_N: np.ndarray, second_N: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Divide pairs into queries with their targets, so that most queries have several targets.

        Returns:
            For each query its row, the places of its pairs and the rows of its targets.
        """
        if not len(first_N):
            return []
        pairs_S = np.bincount(np.concatenate([first_N, second_N]), minlength=len(self.sequences))
        swapped_N = pairs_S[second_N] > pairs_S[first_N]
        short_N = np.minimum(self._length_S[first_N], self._length_S[second_N]) == self._length_S[second_N]
        long_N = np.maximum(self._length_S[first_N], self._length_S[second_N]) > MAX_QUERY
        swapped_N = np.where(long_N, short_N, swapped_N)
        query_N, target_N = np.where(swapped_N, second_N, first_N), np.where(swapped_N, first_N, second_N)
        order_N = np.argsort(query_N, kind="stable")
        starts = np.flatnonzero(np.diff(query_N[order_N], prepend=-1))
        return [(int(query_N[places[0]]), places, target_N[places]) for places in np.split(order_N, starts[1:])]

    def _screen(self, query: int, targets: np.ndarray) -> np.ndarray:
        """Return which of the targets may be similar to the query."""
        criterion = self.criterion
        shorter_N = np.minimum(self._length_S[query], self._length_S[targets])
        scores_N = self._score(query, targets)
        possible_N = (scores_N >= self._required_L[shorter_N]) & (scores_N > 0)
        if self._database is None:
            return possible_N

        def exclude(weights: Weights, is_possible: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
            places = np.flatnonzero(possible_N)
            if len(places):
                most_N, known_N = self._maximise(query, targets[places], scores_N[places], weights)
                possible_N[places] = ~known_N | is_possible(most_N, places)

        fewest_N = np.ceil(criterion.coverage * shorter_N - ROUNDING).astype(np.int64)  # columns
        if self._above.different < 0:  # an identity above 0
            exclude(self._above, lambda most, places: most >= 0)
        exclude(MOST_COLUMNS, lambda most, places: most >= fewest_N[places])

        def is_beyond_chance(most: np.ndarray, places: np.ndarray) -> np.ndarray:
            columns = np.maximum(fewest_N[places], most)
            alignments = criterion.num_sequences * (self._length_S[query] + self._length_S[targets[places]])
            return alignments * bdtrc(most - 1.0, columns, CHANCE) <= MAX_EXPECTED * (1 + ROUNDING)

        exclude(MOST_IDENTITIES, is_beyond_chance)
        return possible_N

    def _score(self, query: int, targets: np.ndarray) -> np.ndarray:
        """Compute the scores of the best local alignments, (N,)."""
        if self._database is None:
            aligner, text = build_aligner(), replace_rare(self.sequences[query])
            return np.array([aligner.score(text, replace_rare(self.sequences[row])) for row in targets.tolist()])
        return self._run(_build_searcher(Weights(0, 0, 0), 0), query, targets)

    def _maximise(
        self, query: int, targets: np.ndarray, scores_N: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute the largest sum of weights of an alignment with the best score.

        Returns:
            (N,) sums, and (N,) whether they are known; they are not where the numbers would be too large.
        """
        largest = max(map(abs, weights))
        residues_N = self._length_S[query] + self._length_S[targets]
        bits_N = np.ceil(np.log2(2 * largest * residues_N + 1.0)).astype(np.int64)
        fits_N = (HIGHEST + 1 << bits_N) + largest < EXACT_FLOAT
        fits_N &= (scores_N.astype(np.int64) + 2 << bits_N) < EXACT_SCORE
        sums_N = np.zeros(len(targets), dtype=np.int64)
        for bits in np.unique(bits_N[fits_N]).tolist():
            places = np.flatnonzero(fits_N & (bits_N == bits))
            found = self._run(_build_searcher(weights, bits), query, targets[places])
            sums_N[places] = found - (scores_N[places].astype(np.int64) << bits)
        return sums_N, fits_N

    def _run(self, searcher: Any, query: int, targets: np.ndarray) -> np.ndarray:
        """Return the scores of an aligner of Opal, (N,)."""
        database = self._database.extract(targets.tolist())
        # with overflow="buckets", pyopal 0.7.3 does not free its memory if a score exceeds 8 bits
        found = searcher.align(self.sequences[query], database, mode="score", overflow="simple", algorithm="sw")
        return np.array([result.score for result in found], dtype=np.int64)


@cache
def _build_searcher(weights: Weights, bits: int) -> Any:
    """Build an aligner of Opal, whose scores are those of BLOSUM62 times 2**bits, and the weights."""
    from Bio.Align import substitution_matrices  # slow imports
    from pyopal import Aligner
    from scoring_matrices import ScoringMatrix

    letters = LETTERS + RARE
    blosum = substitution_matrices.load("BLOSUM62")
    scale = 1 << bits
    rows = [
        [
            scale * int(blosum[replace_rare(one)][replace_rare(other)])
            + (weights.equal if one == other else weights.different)
            for other in letters
        ]
        for one in letters
    ]
    matrix = ScoringMatrix(rows, alphabet=letters)
    first_gap, next_gap = (round(-scale * score) - weights.gap for score in (FIRST_GAP, NEXT_GAP))
    return Aligner(matrix, gap_open=first_gap, gap_extend=next_gap)
