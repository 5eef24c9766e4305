"""Nearest-neighbour baselines for variants of one protein: by edit distance, and by BLOSUM62 similarity."""

import logging

import numpy as np
from Bio.Align import substitution_matrices

from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.data import TaskData

logger = logging.getLogger(__name__)

# Pairs compared at most; beyond that a seeded sample of train stands for all of it, and the report says so.
MAX_PAIRS = 60_000_000
GAP_SCORE = -4.0
WORD = 64


def trim_shared(sequences: list[str]) -> list[str]:
    """Without the prefix and the suffix that all have in common, which changes no edit distance."""
    prefix = _shared_prefix(sequences)
    tails = [sequence[prefix:] for sequence in sequences]
    suffix = _shared_prefix([tail[::-1] for tail in tails])
    return [tail[: len(tail) - suffix] for tail in tails]


def _shared_prefix(texts: list[str]) -> int:
    """Letters that all begin with: what the first and the last in order share, all in between share too."""
    first, last = min(texts), max(texts)
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, min(len(first), len(last)))


def as_codes(sequences: list[str]) -> np.ndarray:
    """(P, longest) ASCII codes, 0 beyond a sequence's end."""
    width = max(1, max(map(len, sequences)))
    return np.array([sequence.encode() for sequence in sequences], dtype=f"S{width}").view(np.uint8).reshape(-1, width)


def levenshtein_to_many(pattern: str, text_PT: np.ndarray, sizes_P: np.ndarray) -> np.ndarray:
    """Edit distances from one sequence to many, (P,) int64.

    Args:
        pattern: at most 64 residues.
        text_PT: ASCII codes of the others, 0 beyond their ends.
        sizes_P: their residues.
    Source: Myers 1999 (10.1145/316542.316550) as Hyyroe 2003 computes the global distance, one 64-bit word a text.
    """
    size = len(pattern)
    if size > WORD:
        raise ValueError(f"{size} residues do not fit a {WORD}-bit word")
    if size == 0:
        return sizes_P.astype(np.int64)
    equal = np.zeros(256, dtype=np.uint64)
    for place, letter in enumerate(pattern.encode()):
        equal[letter] |= np.uint64(1) << np.uint64(place)
    one, last = np.uint64(1), np.uint64(1) << np.uint64(size - 1)
    plus = np.full(len(text_PT), ~np.uint64(0))
    minus = np.zeros(len(text_PT), dtype=np.uint64)
    score = np.full(len(text_PT), size, dtype=np.int64)
    for column in range(text_PT.shape[1]):
        matches = equal[text_PT[:, column]]
        vertical = matches | minus
        horizontal = (((matches & plus) + plus) ^ plus) | matches
        up, down = minus | ~(horizontal | plus), plus & horizontal
        alive = column < sizes_P
        score += alive & ((up & last) != 0)
        score -= alive & ((down & last) != 0)
        up, down = (up << one) | one, down << one
        plus, minus = down | ~(vertical | up), up & vertical
    return score


def _sampled_train(data: TaskData, num_texts: int) -> np.ndarray:
    train = data.rows("train")
    most = max(1, MAX_PAIRS // max(1, num_texts))
    if len(train) <= most:
        return train
    logger.info("nearest neighbours: a sample of %d of %d train variants", most, len(train))
    return np.sort(np.random.default_rng(0).choice(train, most, replace=False))


def levenshtein_nearest(data: TaskData) -> tuple[np.ndarray, str] | None:
    """Mean target of the train variants at the smallest edit distance, for every test variant (1, M), and a note.

    Returns: None where the part in which variants differ exceeds 64 residues.
    """
    trimmed = trim_shared(data.sequences)
    if max(map(len, trimmed)) > WORD:
        return None
    tests = data.rows("test")
    train = _sampled_train(data, len(tests))
    text_PT = as_codes([trimmed[row] for row in tests])
    sizes_P = np.array([len(trimmed[row]) for row in tests])
    nearest = np.full(len(tests), np.iinfo(np.int64).max)
    total, count = np.zeros(len(tests)), np.zeros(len(tests))
    for row in train:
        distance = levenshtein_to_many(trimmed[row], text_PT, sizes_P)
        closer, as_close = distance < nearest, distance == nearest
        nearest = np.minimum(nearest, distance)
        total = np.where(closer, 0.0, total) + (closer | as_close) * data.targets[row]
        count = np.where(closer, 0.0, count) + (closer | as_close)
    return (total / count)[None], _note(data, train)


def blosum_nearest(data: TaskData) -> tuple[np.ndarray, str]:
    """Mean target of the train variants most similar position by position under BLOSUM62, for every test variant."""
    matrix = substitution_matrices.load("BLOSUM62")
    score = np.full((len(RESIDUE_LETTERS) + 1,) * 2, GAP_SCORE, dtype=np.float32)
    for i, a in enumerate(RESIDUE_LETTERS):
        for j, b in enumerate(RESIDUE_LETTERS):
            # U and O are no part of BLOSUM62: as C and K, from which they are made
            score[i, j] = matrix["CK"["UO".index(a)] if a in "UO" else a]["CK"["UO".index(b)] if b in "UO" else b]
    score[-1, -1] = 0.0
    codes = as_codes(trim_shared(data.sequences))
    index = np.full(256, len(RESIDUE_LETTERS), dtype=np.int64)
    index[np.frombuffer(RESIDUE_LETTERS.encode(), np.uint8)] = np.arange(len(RESIDUE_LETTERS))
    codes = index[codes]
    codes = codes[:, (codes != codes[0]).any(0)]  # columns without variation favour nobody
    tests = data.rows("test")
    train = _sampled_train(data, len(tests))
    one_hot = np.eye(len(score), dtype=np.float32)[codes[train]].reshape(len(train), -1)
    predicted = np.empty(len(tests))
    for start in range(0, len(tests), 1024):
        scored = score[codes[tests[start : start + 1024]]]
        similarity = scored.reshape(len(scored), -1) @ one_hot.T
        best = similarity == similarity.max(1, keepdims=True)
        predicted[start : start + 1024] = best @ data.targets[train] / best.sum(1)
    return predicted[None], _note(data, train)


def _note(data: TaskData, train: np.ndarray) -> str:
    whole = len(data.rows("train"))
    return "" if len(train) == whole else f"nearest among {len(train)} of {whole} train variants (seed 0)"
