"""Nearest-neighbour baselines for variants of one protein, by edit distance and by BLOSUM62 similarity."""

import logging
from importlib.resources import files

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from esm2kit.core.processes import count_cores
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

# Maximum number of compared pairs, for variable parts of up to 64 residues. Above it a random sample of train is used,
# which the report notes.
MAX_PAIRS = 60_000_000
WORD = 64  # residues per machine word in the edit distance
ROWS = 64  # train variants whose distances are in memory together
GAP_SCORE = -4.0


def trim_shared(sequences: list[str]) -> list[str]:
    """Remove the prefix and the suffix that all sequences share; edit distances do not change."""
    prefix = _shared_prefix(sequences)
    tails = [sequence[prefix:] for sequence in sequences]
    suffix = _shared_prefix([tail[::-1] for tail in tails])
    return [tail[: len(tail) - suffix] for tail in tails]


def _shared_prefix(texts: list[str]) -> int:
    """Return the length of the prefix that all texts share; the first and the last in sorted order determine it."""
    first, last = min(texts), max(texts)
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, min(len(first), len(last)))


def encode_ascii(sequences: list[str]) -> np.ndarray:
    """Encode sequences as ASCII codes (P, longest), padded with 0."""
    width = max(1, max(map(len, sequences)))
    return np.array([sequence.encode() for sequence in sequences], dtype=f"S{width}").view(np.uint8).reshape(-1, width)


def _sample_train(data: TaskData, num_texts: int, words: int = 1) -> np.ndarray:
    """Return the rows of train, or a random sample of them if there are too many pairs."""
    train = data.rows("train")
    most = max(1, MAX_PAIRS // max(1, num_texts * words))
    if len(train) <= most:
        return train
    logger.info("nearest neighbours: comparing with a sample of %d of %d train variants", most, len(train))
    return np.sort(np.random.default_rng(0).choice(train, most, replace=False))


def predict_by_edit_distance(data: TaskData) -> tuple[np.ndarray, str]:
    """Predict the mean target of the train variants at the smallest edit distance; return (1, M) and a note."""
    trimmed = trim_shared(data.sequences)
    texts = [trimmed[row] for row in data.rows("test")]
    train = _sample_train(data, len(texts), words=-(-max(map(len, trimmed)) // WORD))
    nearest = np.full(len(texts), np.iinfo(np.int32).max)
    targets, width = data.targets.reshape(len(data.ids), -1), data.task.num_outputs if data.task.has_columns else 1
    total, count = np.zeros((len(texts), width)), np.zeros((len(texts), width))
    for start in range(0, len(train), ROWS):
        rows = train[start : start + ROWS]
        patterns = [trimmed[row] for row in rows]
        distances = cdist(patterns, texts, scorer=Levenshtein.distance, dtype=np.int32, workers=count_cores())
        for row, distance in zip(rows, distances, strict=True):
            closer, as_close = distance < nearest, distance == nearest
            nearest = np.minimum(nearest, distance)
            known = np.isfinite(targets[row])
            chosen = (closer | as_close)[:, None] & known
            total = np.where(closer[:, None], 0.0, total) + np.where(chosen, targets[row], 0.0)
            count = np.where(closer[:, None], 0.0, count) + chosen
    predicted = _fill_unknown(total, count, targets[train])
    return (predicted if data.task.has_columns else predicted[:, 0])[None], _describe_sample(data, train)


def _fill_unknown(total_MC: np.ndarray, count_MC: np.ndarray, train_NC: np.ndarray) -> np.ndarray:
    """Return means (M, C); where no neighbour has a value, the mean of train."""
    mean_C = np.nanmean(train_NC, axis=0)
    return np.where(count_MC > 0, total_MC / np.maximum(count_MC, 1), mean_C)


def read_blosum62() -> dict[str, dict[str, int]]:
    """Read BLOSUM62, in half bits, indexed by two letters."""
    text = files("esm2kit.benchmarking.baselines").joinpath("blosum62.txt").read_text(encoding="utf-8")
    letters, *rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {letter: dict(zip(letters, map(int, scores), strict=True)) for letter, *scores in rows}


def predict_by_blosum62(data: TaskData) -> tuple[np.ndarray, str]:
    """Predict the mean target of the train variants with the highest BLOSUM62 score; return (1, M) and a note."""
    matrix = read_blosum62()
    replaced = {"U": "C", "O": "K"}  # not in BLOSUM62: use the amino acid that they derive from
    score = np.full((len(RESIDUE_LETTERS) + 1,) * 2, GAP_SCORE, dtype=np.float32)
    for i, a in enumerate(RESIDUE_LETTERS):
        for j, b in enumerate(RESIDUE_LETTERS):
            score[i, j] = matrix[replaced.get(a, a)][replaced.get(b, b)]
    score[-1, -1] = 0.0
    codes = encode_ascii(trim_shared(data.sequences))
    index = np.full(256, len(RESIDUE_LETTERS), dtype=np.int64)
    index[np.frombuffer(RESIDUE_LETTERS.encode(), np.uint8)] = np.arange(len(RESIDUE_LETTERS))
    codes = index[codes]
    codes = codes[:, (codes != codes[0]).any(0)]  # constant columns do not affect the ranking
    tests = data.rows("test")
    train = _sample_train(data, len(tests))
    one_hot = np.eye(len(score), dtype=np.float32)[codes[train]].reshape(len(train), -1)
    targets = data.targets.reshape(len(data.ids), -1)[train]
    known, values = np.isfinite(targets).astype(float), np.nan_to_num(targets)
    predicted = np.empty((len(tests), targets.shape[1]))
    for start in range(0, len(tests), 1024):
        scored = score[codes[tests[start : start + 1024]]]
        similarity = scored.reshape(len(scored), -1) @ one_hot.T
        best = similarity == similarity.max(1, keepdims=True)
        predicted[start : start + 1024] = _fill_unknown(best @ values, best @ known, targets)
    return (predicted if data.task.has_columns else predicted[:, 0])[None], _describe_sample(data, train)


def _describe_sample(data: TaskData, train: np.ndarray) -> str:
    """Return a note if the neighbours come from a sample of train."""
    total = len(data.rows("train"))
    return "" if len(train) == total else f"nearest among a sample of {len(train)} of {total} train variants (seed 0)"
