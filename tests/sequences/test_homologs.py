"""Similar proteins without a model: composition, local alignments and MMseqs2."""

import shutil

import numpy as np
import pytest
from Bio.Align import PairwiseAligner, substitution_matrices

from esm2kit.sequences import homologs
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.homologs import (
    Hits,
    WordIndex,
    compute_composition,
    compute_identity,
    find_by_alignment,
    find_by_mmseqs,
    score_alignment,
)

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def sample(generator: np.random.Generator, size: int) -> str:
    return "".join(generator.choice(LETTERS, size))


def mutate(generator: np.random.Generator, sequence: str, share: float) -> str:
    return "".join(generator.choice(LETTERS) if generator.random() < share else letter for letter in sequence)


def align_by_hand(first: str, second: str) -> float:
    """Smith and Waterman with affine gaps (Gotoh 1982), cell by cell."""
    matrix = substitution_matrices.load("BLOSUM62")
    size = len(second) + 1
    best, down = np.zeros(size), np.full(size, -np.inf)
    highest = 0.0
    for a in first:
        row, right = np.zeros(size), -np.inf
        for j in range(1, size):
            down[j] = max(best[j] - 12, down[j] - 1)
            right = max(row[j - 1] - 12, right - 1)
            row[j] = max(0.0, best[j - 1] + matrix[a][second[j - 1]], down[j], right)
        best, highest = row, max(highest, row.max())
    return highest


def test_the_score_is_that_of_smith_and_waterman() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        first = sample(generator, 40)
        second = mutate(generator, first[:15], 0.3) + sample(generator, 4) + mutate(generator, first[15:], 0.3)
        assert score_alignment(first, second) == align_by_hand(first, second)
    assert score_alignment("MUOJW", "MCKXW") == align_by_hand("MCKXW", "MCKXW"), "as the letters of BLOSUM62"


def test_identity_is_the_share_of_the_shorter_sequence() -> None:
    assert compute_identity("MKTAYIAKQR", "MKTAYIAKQR") == 1.0
    assert compute_identity("MKTAYIAKQR", "GGGGMKTAYIAKQRGGGG") == 1.0
    assert compute_identity("MKTAYIAKQR", "MKTAWIAKQR") == pytest.approx(0.9)
    assert compute_identity("WWWW", "AAAA") == 0.0, "no pair has a positive score"
    assert compute_identity("A" * 6000, "C" * 6000) is None, "too long to be aligned"


def test_composition_has_the_shares_of_the_standard_residues() -> None:
    shares_PA = compute_composition(["AAC", "XX", "WBA"])
    expected = np.zeros((3, 20))
    expected[0, STANDARD_RESIDUES.index("A")], expected[0, STANDARD_RESIDUES.index("C")] = 2 / 3, 1 / 3
    expected[2, STANDARD_RESIDUES.index("A")], expected[2, STANDARD_RESIDUES.index("W")] = 1 / 2, 1 / 2
    np.testing.assert_allclose(shares_PA, expected, rtol=1e-6)


def test_alignments_of_all_candidates_equal_a_comparison_of_all_pairs() -> None:
    generator = np.random.default_rng(1)
    references = [sample(generator, int(size)) for size in generator.integers(2, 60, 30)]
    queries = [mutate(generator, references[row], 0.4) for row in (3, 8, 20)] + ["MK"]
    aligner = PairwiseAligner("blastp", mode="local")  # Biopython's own name of these parameters
    scores_QR = np.array([[aligner.score(query, other) for other in references] for query in queries])
    scores_QR[0, 3] = -1
    order_QR = np.argsort(-scores_QR, axis=1, kind="stable")
    found = find_by_alignment(queries, WordIndex(references), 4, 30, [{3}, set(), set(), set()])
    np.testing.assert_array_equal(found.rows_QK, order_QR[:, :4])
    np.testing.assert_array_equal(found.scores_QK, np.take_along_axis(scores_QR, order_QR[:, :4], 1))


def test_relatives_are_among_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    monkeypatch.setattr(homologs, "_BLOCK", 3)
    references = [sample(generator, int(size)) for size in generator.integers(50, 900, 300)]
    rows = [5, 77, 123, 250, 299]
    queries = [mutate(generator, references[row], 0.5) for row in rows]
    found = find_by_alignment(queries, WordIndex(references), 1, 3, [set() for _ in rows])
    assert found.rows_QK[:, 0].tolist() == rows, "long sequences do not win by chance"
    without = find_by_alignment(queries, WordIndex(references), 1, 3, [{row} for row in rows])
    assert not set(without.rows_QK[:, 0].tolist()) & set(rows)


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_mmseqs_finds_relatives_and_nothing_unrelated() -> None:
    generator = np.random.default_rng(3)
    references = [sample(generator, 120) for _ in range(20)]
    queries = [mutate(generator, references[7], 0.3), sample(generator, 120), references[2]]
    found = find_by_mmseqs(queries, references, 2, [set(), set(), {2}])
    assert found is not None
    assert found.rows_QK.tolist() == [[7, -1], [-1, -1], [-1, -1]]


def test_without_mmseqs_there_are_no_hits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert find_by_mmseqs(["MKV"], ["MKV"], 1, [set()]) is None
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    assert find_by_mmseqs(["MKV"], ["MKV"], 1, [set()]) is None
    assert "MMseqs2 failed" in caplog.text


def test_ties_are_in_the_order_of_the_rows() -> None:
    hits = Hits.from_lists([[(1.0, 9), (2.0, 4), (1.0, 3), (1.0, 5)], []], 3)
    assert hits.rows_QK.tolist() == [[4, 3, 5], [-1, -1, -1]]
