"""Divide labelled proteins into train, validation and test, with relatives in one set and similar labels in all."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.alignment import COVERAGE
from esm2kit.sequences.similarity import MAX_CELLS, Method, SetCheck, SimilarityGroups, group_by_identity
from esm2kit.tasks.task import SplitBy

logger = logging.getLogger(__name__)

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
VALIDATION_SHARES = {"train": 0.9, "validation": 0.1}
# A set has at least this many proteins, or a fifth of them if there are fewer than 25.
SMALLEST = 5
# Proteins per stratum, so that each set can have one of a stratum.
STRATUM = 10
# Part of its share that a set must get for a split by identity to be useful.
ENOUGH = 0.5


class SetAssignment(NamedTuple):
    """The sets of proteins.

    Args:
        sets: (P,) name of the set of each protein.
        method: how they were chosen, as words of a sentence.
        name: short name of the method, for the name of the split: identity50 or random.
        groups: (P,) number of the group of each protein; of a random split, of its sequence.
        check: the comparison of the sets; None for a random split.
    """

    sets: np.ndarray
    method: str
    name: str
    groups: np.ndarray
    check: SetCheck | None = None


def assign_sets(
    sequences: Sequence[str],
    strata: np.ndarray,
    shares: Mapping[str, float],
    split_by: SplitBy = "auto",
    identity: float = 0.5,
    seed: int = 0,
    coverage: float = COVERAGE,
    method: Method = "auto",
    max_cells: int = MAX_CELLS,
) -> SetAssignment:
    """Assign proteins to sets.

    Equal sequences are always in one set. The order of the proteins has no influence.

    Args:
        sequences: (P) sequences in upper case.
        strata: (P,) class, or group of similar values; each set gets its share of each. A stratum with a single
            group of sequences is in the first set.
        shares: set -> share of the proteins; the first set is the one for training.
        split_by: identity keeps similar sequences in one set, random only equal ones. auto is identity if the sets
            get at least half of their shares, and random otherwise, as for the variants of one protein.
        identity: share of equal residues from which sequences are similar.
        seed: of the assignment.
        coverage: share of the shorter sequence that the alignment of similar sequences covers.
        method: how similar sequences are found, as in `group_by_identity`.
        max_cells: of the alignments between sets, as in `SimilarityGroups.find_pairs_across`.

    Returns:
        The sets.

    Raises:
        InputError: there are too few different, or dissimilar, sequences.
    """
    unique, rows = find_unique(sequences)
    reason = ""
    if split_by != "random":
        try:
            groups = group_by_identity(unique, identity, coverage, method)

            def assign(group_P: np.ndarray) -> np.ndarray:
                return assign_to_sets(group_P, sequences, strata, shares, seed)

            sets, check = separate_groups(groups, rows, assign, max_cells)
            reason = _find_shortage(sets, shares)
            if not reason:
                name = f"identity{identity * 100:.0f}"
                return SetAssignment(sets, groups.method, name, groups.numbers[rows], check)
            reason = f"the {groups.method} ({groups.numbers.max() + 1}) leave {reason}"
        except InputError as error:
            if split_by == "identity":
                raise
            reason = str(error).rpartition(". ")[0]
    if split_by == "identity":
        raise InputError(
            f"{reason}. Set identity to a higher value than {identity:g}, or split at random.",
            code="split.identity",
            identity=identity,
        )
    sets = assign_to_sets(rows, sequences, strata, shares, seed)
    if shortage := _find_shortage(sets, shares):
        raise InputError(
            f"{len(unique)} different sequences cannot be divided into {', '.join(shares)}: they leave {shortage}. Add "
            "proteins, or a column with the sets.",
            code="split.too-few",
            sequences=len(unique),
        )
    how = "random, equal sequences in one set"
    return SetAssignment(sets, f"{how}, because {reason}" if reason else how, "random", rows)


def find_unique(sequences: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Find the different sequences.

    Args:
        sequences: (P) sequences.

    Returns:
        The different ones, sorted, and the place of each protein's sequence among them, (P,).
    """
    unique = sorted(set(sequences))
    row_of = {sequence: row for row, sequence in enumerate(unique)}
    return unique, np.array([row_of[sequence] for sequence in sequences])


def separate_groups(
    groups: SimilarityGroups, rows: np.ndarray, assign: Callable[[np.ndarray], np.ndarray], max_cells: int = MAX_CELLS
) -> tuple[np.ndarray, SetCheck]:
    """Assign proteins to sets by their groups, until no similar proteins are found in different sets.

    Args:
        groups: of the different sequences; groups with similar proteins in different sets are merged.
        rows: (P,) place of each protein's sequence in `groups`.
        assign: (P,) groups -> (P,) sets.
        max_cells: of the alignments between sets.

    Returns:
        The (P,) sets, and the last comparison, without pairs.
    """
    while True:
        set_P = assign(groups.numbers[rows])
        set_S = np.empty(len(groups.sequences), dtype=set_P.dtype)
        set_S[rows] = set_P
        check = groups.find_pairs_across(set_S, max_cells)
        if not check.pairs:
            return set_P, check
        found = format_count(len(check.pairs), "similar pair")
        logger.info("%s of proteins of different sets: their groups are merged, and the sets assigned again", found)


def build_strata(values: np.ndarray) -> np.ndarray:
    """Build up to ten groups of similar values, each of at least ten proteins unless values repeat.

    Args:
        values: (P,) numbers.

    Returns:
        (P,) number of the group of each value, from the lowest.
    """
    num_strata = int(np.clip(len(values) // STRATUM, 1, 10))
    edges = np.quantile(values, np.arange(1, num_strata) / num_strata)
    return np.searchsorted(edges, values, side="right")


def assign_to_sets(
    groups: np.ndarray, sequences: Sequence[str], strata: np.ndarray, shares: Mapping[str, float], seed: int
) -> np.ndarray:
    """Assign groups to sets, large ones first, each to the set that is furthest from its share of the group's strata.

    A set with c proteins of a quota q is by (n + 2 c) / q - 2 too full for n more proteins; for single proteins this is
    Sainte-Laguë's method. The sum counts all proteins as much as all strata together.

    Args:
        groups: (P,) number of the group of each protein.
        sequences: (P) sequences, which decide between groups that are equally good.
        strata: (P,) class, or group of similar values.
        shares: set -> share of the proteins; the first set is the one for training.
        seed: of the assignment.

    Returns:
        (P,) name of the set of each protein.
    """
    names = list(shares)
    keys = [hashlib.sha256(f"{seed} {sequence}".encode()).digest() for sequence in sequences]
    members = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        members[group].append(row)
    order = sorted(members, key=lambda group: (-len(members[group]), min(keys[row] for row in members[group])))
    kinds, strata = np.unique(strata, return_inverse=True)
    quota_K = compute_quotas(len(sequences), shares)
    quota_KS = quota_K[:, None] / len(sequences) * np.bincount(strata, minlength=len(kinds))
    large = quota_KS.min(axis=0) >= 1  # of smaller strata a small set would get nothing or too much
    weight = max(int(large.sum()), 1)
    count_KS, set_of_group, seen = np.zeros_like(quota_KS), {}, set()
    for group in order:
        added_S = np.bincount(strata[members[group]], minlength=len(kinds))
        added, count_K = added_S.sum(), count_KS.sum(axis=1)
        too_full_K = weight * added * ((added + 2 * count_K) / quota_K - 2)
        too_full_KS = added_S * ((added_S + 2 * count_KS) / quota_KS - 2)
        index = int(np.argmin(too_full_K + too_full_KS[:, large].sum(axis=1)))
        kinds_here = set(np.flatnonzero(added_S).tolist())
        index = index if kinds_here <= seen else 0  # every class is in the training set
        seen |= kinds_here
        count_KS[index] += added_S
        set_of_group[group] = index
    return np.array([names[set_of_group[group]] for group in groups.tolist()])


def compute_quotas(num_proteins: int, shares: Mapping[str, float]) -> np.ndarray:
    """Compute the number of proteins of each set; small sets get at least SMALLEST, or a fifth of the proteins."""
    least = max(1, min(SMALLEST, num_proteins / 5))
    quotas = np.maximum(num_proteins * np.array(list(shares.values())), least)
    quotas[0] = max(1, num_proteins - quotas[1:].sum())
    return quotas


def _find_shortage(sets: np.ndarray, shares: Mapping[str, float]) -> str:
    """Describe the first set that has too few proteins; empty if there is none."""
    quotas = compute_quotas(len(sets), shares)
    for name, quota in zip(shares, quotas, strict=True):
        found = int((sets == name).sum())
        if found < max(1, ENOUGH * quota):
            return f"{found} proteins in {name} instead of {quota:.0f}"
    return ""
