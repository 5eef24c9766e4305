"""Find similar proteins without a model: by composition, by local alignments with BLOSUM62, and with MMseqs2."""

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

from esm2kit.core.processes import count_cores
from esm2kit.sequences.alignment import CHANCE as CHANCE_OF_ONE
from esm2kit.sequences.alignment import build_aligner, can_align, replace_rare
from esm2kit.sequences.alphabet import STANDARD_RESIDUES

logger = logging.getLogger(__name__)

WORD = 3  # residues per word, by which the candidates for alignments are chosen
CHANCE = CHANCE_OF_ONE**WORD  # probability that two random words are equal
MAX_REFERENCE = 100_000  # proteins whose words are in memory
# As blastp: a gap of n residues costs 11 + n.
OPEN_GAP, EXTEND_GAP = -12.0, -1.0
_BLOCK = 64


class Hits(NamedTuple):
    """The most similar reference proteins of each query, the best first.

    Args:
        rows_QK: (Q, K) rows of the reference; -1 where there are fewer.
        scores_QK: (Q, K) their similarities.
    """

    rows_QK: np.ndarray
    scores_QK: np.ndarray

    @classmethod
    def from_lists(cls, found: Sequence[Sequence[tuple[float, int]]], count: int) -> "Hits":
        """Sort the (score, row) pairs of each query, keep the best `count`, and break ties by the order of the rows."""
        rows_QK = np.full((len(found), count), -1, dtype=np.int64)
        scores_QK = np.zeros((len(found), count))
        for query, pairs in enumerate(found):
            for place, (score, row) in enumerate(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:count]):
                rows_QK[query, place], scores_QK[query, place] = row, score
        return cls(rows_QK, scores_QK)


def compute_composition(sequences: Sequence[str]) -> np.ndarray:
    """Compute the shares of the 20 standard amino acids.

    Args:
        sequences: P sequences.

    Returns:
        (P, 20) float32 in the order of STANDARD_RESIDUES; zeros for a protein without any of them.
    """
    letters = np.frombuffer(STANDARD_RESIDUES.encode(), np.uint8)
    shares_PA = np.zeros((len(sequences), len(letters)), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        counts_A = np.bincount(np.frombuffer(sequence.encode(), np.uint8), minlength=256)[letters]
        shares_PA[row] = counts_A / max(1, counts_A.sum())
    return shares_PA


def score_alignment(first: str, second: str) -> float:
    """Score the best local alignment of two sequences, in half bits of BLOSUM62 (Smith and Waterman 1981)."""
    return float(build_aligner(OPEN_GAP, EXTEND_GAP).score(replace_rare(first), replace_rare(second)))


def compute_identity(first: str, second: str) -> float | None:
    """Compute the identity of two sequences.

    Args:
        first: residues.
        second: residues.

    Returns:
        Equal residues of the best local alignment as a share of the shorter sequence, so that a short accidental match
        is not a high identity. None if they are too long to be aligned.
    """
    if first == second:
        return 1.0
    if not can_align(first, second):
        return None
    aligner = build_aligner(OPEN_GAP, EXTEND_GAP)
    best = next(iter(aligner.align(replace_rare(first), replace_rare(second))), None)
    if best is None:  # no pair of residues has a positive score
        return 0.0
    equal = sum(
        first[start + step] == second[other + step]
        for (start, stop), (other, _) in zip(*best.aligned, strict=True)
        for step in range(stop - start)
    )
    return equal / min(len(first), len(second))


class WordIndex:
    """The words of the reference proteins, to choose which of them are aligned with a query.

    Args:
        sequences: R reference sequences, at most MAX_REFERENCE.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self.sequences = sequences
        has_word_RW = _list_words(sequences)
        self._by_word_WR = has_word_RW.T.tocsr()
        self._sizes_R = np.asarray(has_word_RW.sum(1)).ravel()

    def list_candidates(self, queries: Sequence[str], count: int) -> np.ndarray:
        """List the reference proteins that share most words with each query, relative to chance.

        Args:
            queries: Q sequences.
            count: number of candidates.

        Returns:
            (Q, min(count, R)) rows, all in the order of the reference.
        """
        count = min(count, len(self.sequences))
        if count == len(self.sequences):
            return np.tile(np.arange(count), (len(queries), 1))
        rows_QN = np.empty((len(queries), count), dtype=np.int64)
        for start in range(0, len(queries), _BLOCK):
            has_word_BW = _list_words(queries[start : start + _BLOCK])
            shared_BR = (has_word_BW @ self._by_word_WR).toarray().astype(np.float64)
            expected_BR = CHANCE * np.asarray(has_word_BW.sum(1)).reshape(-1, 1) * self._sizes_R[None]
            excess_BR = (shared_BR - expected_BR) / np.sqrt(expected_BR + 1)
            for query, excess_R in enumerate(-excess_BR.round(9), start):
                last = np.partition(excess_R, count - 1)[count - 1]
                better, equal = np.flatnonzero(excess_R < last), np.flatnonzero(excess_R == last)
                rows_QN[query] = np.sort(np.concatenate([better, equal[: count - len(better)]]))
        return rows_QN


def _list_words(sequences: Sequence[str]) -> sparse.csr_matrix:
    """The words of each sequence, without their numbers of occurrences: (S, 26**WORD)."""
    columns = []
    for sequence in sequences:
        codes = np.frombuffer(sequence.encode(), np.uint8).astype(np.int64) - ord("A")
        number = sum(codes[place : len(codes) - WORD + 1 + place] * 26**place for place in range(WORD))
        columns.append(np.unique(number) if len(codes) >= WORD else np.empty(0, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in columns])])
    words = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    return sparse.csr_matrix((np.ones(len(words), np.int32), words, offsets), shape=(len(sequences), 26**WORD))


def find_by_alignment(
    queries: Sequence[str],
    index: WordIndex,
    count: int,
    candidates: int,
    excluded: Sequence[set[int]],
    note_done: Callable[[int], None] = lambda done: None,
) -> Hits:
    """Find the reference proteins with the highest scores of a local alignment.

    Args:
        queries: Q sequences.
        index: the reference.
        count: K, number of hits.
        candidates: number of reference proteins that are aligned with each query.
        excluded: rows of the reference that are no hits of each query.
        note_done: called with the number of finished queries.

    Returns:
        The hits. A pair that is too long for an alignment is none.
    """
    longest = max(map(len, excluded), default=0)
    found = []
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        rows_QN = index.list_candidates(block, candidates + longest)
        for place, (query, rows) in enumerate(zip(block, rows_QN, strict=True)):
            pairs = [(int(row), index.sequences[row]) for row in rows if int(row) not in excluded[start + place]]
            found.append([(score_alignment(query, other), row) for row, other in pairs if can_align(query, other)])
            note_done(start + place + 1)
    return Hits.from_lists(found, count)


def find_by_mmseqs(
    queries: Sequence[str], references: Sequence[str], count: int, excluded: Sequence[set[int]]
) -> Hits | None:
    """Search with MMseqs2's defaults, ranked by bit score.

    Args:
        queries: Q sequences.
        references: R sequences.
        count: K, number of hits.
        excluded: rows of the reference that are no hits of each query.

    Returns:
        The hits; fewer than K where MMseqs2 finds fewer. None if it is not installed or fails.
    """
    if (program := shutil.which("mmseqs")) is None:
        return None
    try:
        lines = _run_mmseqs(program, queries, references)
    except (OSError, subprocess.CalledProcessError) as error:
        outputs = [getattr(error, "stderr", None), getattr(error, "output", None), str(error)]
        output = next(text.strip() for text in outputs if text and text.strip())
        logger.warning("MMseqs2 failed (%s): its neighbours are left out", output.splitlines()[-1])
        return None
    best: list[dict[int, float]] = [{} for _ in queries]
    for query, target, bits in (line.split("\t") for line in lines):
        row, score = int(target), float(bits)
        if row not in excluded[int(query)]:
            best[int(query)][row] = max(score, best[int(query)].get(row, 0.0))
    return Hits.from_lists([[(score, row) for row, score in each.items()] for each in best], count)


def _run_mmseqs(program: str, queries: Sequence[str], references: Sequence[str]) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="esm2kit-") as folder:
        paths = [Path(folder) / name for name in ("query.fasta", "reference.fasta")]
        for path, sequences in zip(paths, (queries, references), strict=True):
            path.write_text("".join(f">{row}\n{each}\n" for row, each in enumerate(sequences)), encoding="ascii")
        result = Path(folder) / "out.tsv"
        command = [program, "easy-search", *paths, result, Path(folder) / "tmp", "--format-output", "query,target,bits"]
        command += ["--threads", count_cores(), "-v", 1]
        subprocess.run(
            list(map(str, command)), capture_output=True, check=True, text=True, encoding="utf-8", errors="replace"
        )
        return result.read_text(encoding="utf-8").splitlines()
