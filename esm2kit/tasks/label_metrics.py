"""Metrics of proteins with several labels each, and the threshold above which a label is predicted.

Truths are 0 or 1, predictions are probabilities. As in `tasks.metrics`, the counts of a bootstrap replicate are
weights, so that one pass scores all replicates.

Source: definitions of scikit-learn with `zero_division=0`; the tests compare with it. A label without a positive
protein counts as 0 in F1 and average precision, as in scikit-learn. Its AUROC is undefined, and is left out of the
mean.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack

from esm2kit.tasks.metrics import Ranking, join_blocks, split_replicates

LABEL_METRICS = ("macro_f1", "micro_f1", "samples_f1", "map", "auroc", "mcc", "subset_accuracy")
DEFAULT_THRESHOLD = 0.5
# Candidates for the threshold; of equally good ones the nearest to 0.5 is chosen.
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)


def compute_label_counts(
    truth_NL: np.ndarray, called_NL: np.ndarray, counts_NR: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count hits, true and predicted proteins of each label: three arrays (L, R)."""
    hits_NL = truth_NL * called_NL
    return tuple(
        np.ascontiguousarray(each_NL.T, dtype=np.float64) @ counts_NR for each_NL in (hits_NL, truth_NL, called_NL)
    )


def compute_f1(hits: np.ndarray, true: np.ndarray, called: np.ndarray) -> np.ndarray:
    """Compute F1 from counts; 0 without true and predicted proteins."""
    return _divide(2 * hits, true + called)


def compute_mcc(hits: np.ndarray, true: np.ndarray, called: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute Matthews' correlation of a label from counts; 0 if it is undefined."""
    spread = true * (total - true) * called * (total - called)
    return _divide(hits * total - true * called, np.sqrt(spread))


def rank_label(truth_N: np.ndarray, score_N: np.ndarray) -> csr_matrix:
    """Sort proteins by the scores of a label into the parts that average precision and AUROC are computed from.

    Only the S scores of proteins with the label matter: part s are the proteins from the next higher one, exclusively.

    Args:
        truth_N: (N,) 0 or 1.
        score_N: (N,) scores, higher for the label; ties are one threshold.

    Returns:
        (3 S, N) sparse: proteins with the label of each score, those without it of the same score, and those without it
        of higher scores. Proteins below all scores are in no row.
    """
    group_N = Ranking.from_values(-score_N).group
    has_G = np.bincount(group_N, weights=truth_N, minlength=group_N.max() + 1) > 0
    num_scores, next_G = int(has_G.sum()), np.cumsum(has_G) - has_G
    part_N, tied_N = next_G[group_N], has_G[group_N]
    kind_N = np.where(tied_N, 1 - truth_N, 2)
    used = np.flatnonzero(part_N < num_scores)
    rows = kind_N[used] * num_scores + part_N[used]
    return csr_matrix((np.ones(len(used)), (rows, used)), shape=(3 * num_scores, len(truth_N)))


def compute_ranking_metrics(parts_SR: np.ndarray, total_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute average precision and AUROC of one label.

    Args:
        parts_SR: (3 S, R) weights of the parts of `rank_label` in each replicate.
        total_R: (R,) weight of all proteins.

    Returns:
        (R,) average precision, 0 without positives, and (R,) AUROC, nan without positives or without negatives.
    """
    if not len(parts_SR):
        return np.zeros(len(total_R)), np.full(len(total_R), np.nan)
    positive_SR, tied_SR, higher_SR = parts_SR.reshape(3, -1, len(total_R))
    above_SR = np.cumsum(positive_SR, axis=0)
    called_SR = above_SR + np.cumsum(tied_SR + higher_SR, axis=0)
    positives_R = above_SR[-1]
    precision_R = _divide((positive_SR * _divide(above_SR, called_SR)).sum(0), positives_R)
    # each negative counts the positives above it, and half of those with the same score
    negatives_R, before_SR = total_R - positives_R, above_SR - positive_SR
    lowest_R = negatives_R - (tied_SR + higher_SR).sum(0)
    ordered_R = (higher_SR * before_SR + tied_SR * (before_SR + positive_SR / 2)).sum(0) + lowest_R * positives_R
    pairs_R = positives_R * negatives_R
    return precision_R, np.where(pairs_R > 0, _divide(ordered_R, pairs_R), np.nan)


def build_label_scorer(
    truth_NL: np.ndarray,
    probability_NL: np.ndarray,
    protein_N: np.ndarray,
    threshold: float | np.ndarray = DEFAULT_THRESHOLD,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that scores the labels of proteins.

    Args:
        truth_NL: (N, L) 0 or 1.
        probability_NL: (N, L) predicted probabilities.
        protein_N: (N,) protein of each row.
        threshold: probability above which a label is predicted; (N, 1) if it differs between proteins.

    Returns:
        A function from counts (R, P) to metric -> (R,) values, for LABEL_METRICS. map, auroc and mcc are means over
        labels.
    """
    called_NL = (probability_NL > threshold).astype(np.int64)
    hits_N, true_N, called_N = (each.sum(1) for each in (truth_NL * called_NL, truth_NL, called_NL))
    rankings = [rank_label(*columns) for columns in zip(truth_NL.T, probability_NL.T, strict=True)]
    ends, stacked = np.cumsum([ranking.shape[0] for ranking in rankings]), vstack(rankings, format="csr")
    f1_N, same_N = compute_f1(hits_N, true_N, called_N), (truth_NL == called_NL).all(1)

    def score_block(counts_NR: np.ndarray) -> dict[str, np.ndarray]:
        total_R = counts_NR.sum(0)
        hits_LR, true_LR, called_LR = compute_label_counts(truth_NL, called_NL, counts_NR)
        ranked = [compute_ranking_metrics(part, total_R) for part in np.split(stacked @ counts_NR, ends[:-1])]
        auroc_LR = np.stack([auroc_R for _, auroc_R in ranked])
        defined_R = np.isfinite(auroc_LR).sum(0)
        return {
            "macro_f1": compute_f1(hits_LR, true_LR, called_LR).mean(0),
            "micro_f1": compute_f1(hits_LR.sum(0), true_LR.sum(0), called_LR.sum(0)),
            "samples_f1": _divide(f1_N @ counts_NR, total_R),
            "map": np.mean([precision_R for precision_R, _ in ranked], axis=0),
            "auroc": np.where(defined_R > 0, _divide(np.nansum(auroc_LR, axis=0), defined_R), np.nan),
            "mcc": compute_mcc(hits_LR, true_LR, called_LR, total_R).mean(0),
            "subset_accuracy": _divide(same_N @ counts_NR, total_R),
        }

    def score(counts_RP: np.ndarray) -> dict[str, np.ndarray]:
        blocks = split_replicates(counts_RP, len(truth_NL))
        return join_blocks([score_block(block[protein_N].astype(np.float64)) for block in blocks])

    return score


def build_binary_scorer(
    truth_N: np.ndarray, score_N: np.ndarray, protein_N: np.ndarray
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that scores a ranking of two classes by AUROC and average precision of the second one.

    Args:
        truth_N: (N,) 0 or 1.
        score_N: (N,) scores, higher for class 1.
        protein_N: (N,) protein, or pair, of each row.

    Returns:
        A function from counts (R, P) to metric -> (R,) values.
    """
    ranking = rank_label(truth_N, score_N)

    def score_block(counts_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return compute_ranking_metrics(ranking @ counts_NR, counts_NR.sum(0))

    def score(counts_RP: np.ndarray) -> dict[str, np.ndarray]:
        blocks = split_replicates(counts_RP, len(truth_N))
        found = [score_block(block[protein_N].astype(np.float64)) for block in blocks]
        names = ("binary_ap", "binary_auroc")
        return {name: np.concatenate([parts[place] for parts in found]) for place, name in enumerate(names)}

    return score


def compute_per_label(
    truth_NL: np.ndarray,
    probability_NL: np.ndarray,
    labels: Sequence[str],
    threshold: float | np.ndarray = DEFAULT_THRESHOLD,
) -> dict[str, dict[str, float | None]]:
    """Compute precision, recall, F1, support, MCC, average precision and AUROC of each label.

    Args:
        truth_NL: (N, L) 0 or 1.
        probability_NL: (N, L) predicted probabilities.
        labels: names of the L labels.
        threshold: probability above which a label is predicted.

    Returns:
        Label -> metrics; a ratio with denominator 0 is 0, an undefined AUROC is None.
    """
    called_NL, ones_N1 = (probability_NL > threshold).astype(np.int64), np.ones((len(truth_NL), 1))
    hits_L, true_L, called_L = (counts[:, 0] for counts in compute_label_counts(truth_NL, called_NL, ones_N1))
    precision_L, recall_L, f1_L = (
        _divide(hits_L, called_L),
        _divide(hits_L, true_L),
        compute_f1(hits_L, true_L, called_L),
    )
    mcc_L = compute_mcc(hits_L, true_L, called_L, np.float64(len(truth_NL)))
    table = {}
    for place, label in enumerate(labels):
        parts_S1 = rank_label(truth_NL[:, place], probability_NL[:, place]) @ ones_N1
        average, auroc = compute_ranking_metrics(parts_S1, ones_N1.sum(0))
        table[label] = {
            "precision": float(precision_L[place]),
            "recall": float(recall_L[place]),
            "f1": float(f1_L[place]),
            "support": float(true_L[place]),
            "mcc": float(mcc_L[place]),
            "map": float(average[0]),
            "auroc": float(auroc[0]) if np.isfinite(auroc[0]) else None,
        }
    return table


def choose_threshold(truth_NL: np.ndarray, probability_NL: np.ndarray) -> float:
    """Choose the threshold with the best macro-F1 on validation; 0.5 unless another one is better.

    Args:
        truth_NL: (N, L) labels of the validation proteins.
        probability_NL: (N, L) predicted probabilities.

    Returns:
        One threshold for all labels, a multiple of 0.05.
    """
    ones_N1 = np.ones((len(truth_NL), 1))

    def score(threshold: float) -> tuple[float, float]:
        counts = compute_label_counts(truth_NL, (probability_NL > threshold).astype(np.int64), ones_N1)
        return round(float(compute_f1(*counts).mean()), 12), -abs(threshold - DEFAULT_THRESHOLD)

    return max(THRESHOLDS, key=score)
