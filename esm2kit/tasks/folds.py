"""Divide proteins into folds for cross-validation: whole groups, equal sizes, and similar labels in every fold."""

import hashlib
from collections.abc import Sequence

import numpy as np

from esm2kit.core.errors import InputError

# Passes over all groups that move or swap them between folds. Few data sets need more than three.
MAX_PASSES = 20
# Groups up to which a pass also tries swaps, whose number grows with the square.
MAX_SWAPPED = 1000
SMALLEST_GAIN = 1e-9


def assign_folds(
    group_P: Sequence[str] | Sequence[int] | np.ndarray,
    num_folds: int,
    seed: int = 0,
    stratum_P: Sequence[str] | Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Assign proteins to folds, so that no group is in two folds.

    The folds minimise the sum of squared sizes, and of squared counts of each stratum relative to its size. The
    assignment depends on the names of the groups, on their sizes and strata and on the seed, and not on the order of
    the proteins.

    Args:
        group_P: (P,) name or number of the group of each protein. Name the groups by their content
            (`name_groups`), so that the folds do not depend on how groups were numbered.
        num_folds: K, number of folds.
        seed: Decides between assignments that are equally good.
        stratum_P: (P,) class, or number of the quantile of the value; each fold gets its share of each. None balances
            only the sizes.

    Returns:
        (P,) int64 folds from 0 to K - 1. No fold is empty.

    Raises:
        InputError: There are fewer groups than folds, or fewer than two folds.

    Source:
        Longest processing time first (Graham 1969, 10.1137/0117039), as in scikit-learn's GroupKFold, with the strata
        as further sizes, followed by a local search.
    """
    names, group_P = np.unique(np.asarray(group_P), return_inverse=True)
    if num_folds < 2:
        raise InputError(f"folds must be at least 2, found {num_folds}", code="folds.number", found=num_folds)
    if len(names) < num_folds:
        raise InputError(
            f"{num_folds} folds require at least {num_folds} groups, found {len(names)} groups of {len(group_P)} "
            "proteins. Choose fewer folds, or finer groups.",
            code="folds.too-few-groups",
            folds=num_folds,
            groups=len(names),
            proteins=len(group_P),
        )
    strata, stratum_P = np.unique(np.zeros(len(group_P)) if stratum_P is None else stratum_P, return_inverse=True)
    count_GS = np.zeros((len(names), len(strata)))
    np.add.at(count_GS, (group_P, stratum_P), 1)
    # the size of a fold counts as much as one stratum of all proteins
    count_GS = np.hstack([count_GS, count_GS.sum(axis=1, keepdims=True)])
    weighted_GS = count_GS / np.sqrt(count_GS.sum(axis=0))
    keys = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names.tolist()]
    # groups of one size follow each other by stratum, so that each stratum is dealt out in turn
    main_G = count_GS[:, :-1].argmax(axis=1)
    order = sorted(range(len(names)), key=lambda group: (-count_GS[group, -1], main_G[group], keys[group]))
    fold_G = _fill_folds(weighted_GS, order, num_folds)
    _improve_folds(weighted_GS, order, fold_G, num_folds)
    # the number of a fold carries no information: fold 0 has the first group of the seed's order
    numbers = dict.fromkeys(fold_G[sorted(range(len(names)), key=keys.__getitem__)].tolist())
    renumbered = {fold: number for number, fold in enumerate(numbers)}
    return np.array([renumbered[fold] for fold in fold_G.tolist()], dtype=np.int64)[group_P]


def name_groups(number_P: np.ndarray, key_P: Sequence[str]) -> np.ndarray:
    """Name each group by the smallest digest of its proteins, so that the names do not depend on the order.

    Args:
        number_P: (P,) group of each protein.
        key_P: Sequence or id of each protein.

    Returns:
        (P,) names of 16 hexadecimal digits.
    """
    smallest: dict[int, str] = {}
    for number, key in zip(number_P.tolist(), key_P, strict=True):
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        smallest[number] = min(digest, smallest.get(number, digest))
    return np.array([smallest[number] for number in number_P.tolist()])


def _fill_folds(weighted_GS: np.ndarray, order: Sequence[int], num_folds: int) -> np.ndarray:
    """Put each group into the fold whose sum of squares grows least; an empty fold always grows least."""
    total_KS = np.zeros((num_folds, weighted_GS.shape[1]))
    fold_G = np.empty(len(order), dtype=np.int64)
    for group in order:
        growth_K = total_KS @ weighted_GS[group]
        # of folds that grow equally, the smallest
        fold = min(range(num_folds), key=lambda fold: (round(growth_K[fold], 9), total_KS[fold, -1]))
        fold_G[group] = fold
        total_KS[fold] += weighted_GS[group]
    return fold_G


def _improve_folds(weighted_GS: np.ndarray, order: Sequence[int], fold_G: np.ndarray, num_folds: int) -> None:
    """Move groups to other folds, or swap two groups, as long as the sum of squares falls."""
    total_KS = np.stack([weighted_GS[fold_G == fold].sum(axis=0) for fold in range(num_folds)])
    size_K = np.bincount(fold_G, minlength=num_folds)
    for _ in range(MAX_PASSES):
        improved = False
        for group in order:
            own, weight_S = fold_G[group], weighted_GS[group]
            change_K = 2 * (total_KS - total_KS[own] + weight_S) @ weight_S
            change_K[own] = 0.0
            best = int(change_K.argmin())
            if size_K[own] > 1 and change_K[best] < -SMALLEST_GAIN:
                fold_G[group] = best
                total_KS[own] -= weight_S
                total_KS[best] += weight_S
                size_K[own] -= 1
                size_K[best] += 1
                improved = True
            elif len(order) <= MAX_SWAPPED:
                improved |= _swap_group(weighted_GS, group, fold_G, total_KS)
        if not improved:
            return


def _swap_group(weighted_GS: np.ndarray, group: int, fold_G: np.ndarray, total_KS: np.ndarray) -> bool:
    """Swap a group with the group of another fold that reduces the sum of squares most; return whether one does."""
    own = fold_G[group]
    moved_GS = weighted_GS - weighted_GS[group]  # what the own fold gains and the other one loses
    change_G = 2 * ((total_KS[own] - total_KS[fold_G] + moved_GS) * moved_GS).sum(axis=1)
    change_G[fold_G == own] = 0.0
    other = int(change_G.argmin())
    if change_G[other] >= -SMALLEST_GAIN:
        return False
    moved_S, theirs = moved_GS[other], fold_G[other]
    total_KS[own] += moved_S
    total_KS[theirs] -= moved_S
    fold_G[group], fold_G[other] = theirs, own
    return True
