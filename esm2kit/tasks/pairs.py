"""Pairs of proteins: the second proteins of a task's records, which proteins test shares with train, and splits.

Source: the three classes of test pairs are those of Park and Marcotte 2012, 10.1038/nmeth.2259: C1 shares both proteins
with train (2), C2 one (1), C3 none (0).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.similarity import group_by_identity
from esm2kit.tasks.metrics import sample_counts
from esm2kit.tasks.split import assign_sets
from esm2kit.tasks.task import PairFeatures, SplitBy

# Shares of the proteins where both proteins of a pair must be in one set: a share s of them keeps s * s of all pairs.
PROTEIN_SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
PAIR_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
VALIDATION_SHARES = {"train": 0.9, "validation": 0.1}
SHARED = (0, 1, 2)


@dataclass(frozen=True)
class Pairs:
    """The proteins of pairs; the first sequences are `TaskData.sequences`.

    Args:
        first_ids: (P) names of the first proteins.
        second_ids: (P) names of the second proteins.
        second: (P) sequences of the second proteins.
        groups_P2: (P, 2) number of the group of each protein. Proteins of one group count as the same one.
        grouping: what is in one group, as words of a sentence.
        features: how the vectors of two proteins become one: symmetric (sum, absolute difference, product) or concat.
    """

    first_ids: list[str]
    second_ids: list[str]
    second: list[str]
    groups_P2: np.ndarray
    grouping: str = "equal sequences"
    features: PairFeatures = "symmetric"

    def subset(self, rows: Sequence[int]) -> Self:
        """Return the pairs of some rows."""
        first_ids, second_ids, second = (
            [values[row] for row in rows] for values in (self.first_ids, self.second_ids, self.second)
        )
        return replace(
            self, first_ids=first_ids, second_ids=second_ids, second=second, groups_P2=self.groups_P2[np.asarray(rows)]
        )


def build_keys(first: Sequence[str], second: Sequence[str], ordered: bool) -> list[str]:
    """Build one text per pair, equal for equal pairs; without `ordered` also for (A, B) and (B, A)."""
    pairs = zip(first, second, strict=True)
    return ["/".join(pair if ordered else sorted(pair)) for pair in pairs]


def group_proteins(first: Sequence[str], second: Sequence[str], identity: float | None) -> tuple[np.ndarray, str]:
    """Number the groups of the proteins of pairs.

    Args:
        first: (P) sequences.
        second: (P) sequences.
        identity: share of equal residues from which proteins are in one group; None for equal sequences.

    Returns:
        (P, 2) numbers, and what is in one group.
    """
    unique = sorted({*first, *second})
    numbers, method = np.arange(len(unique)), "equal sequences"
    if identity is not None:
        found = group_by_identity(unique, identity)
        numbers, method = found.numbers, found.method
    number_of = dict(zip(unique, numbers.tolist(), strict=True))
    return np.array([[number_of[a], number_of[b]] for a, b in zip(first, second, strict=True)]), method


class PairSets(NamedTuple):
    """The sets of pairs.

    Args:
        sets: (P,) name of the set of each pair; empty for a pair whose proteins are in different sets.
        method: how they were chosen, as words of a sentence.
        name: short name of the method.
    """

    sets: np.ndarray
    method: str
    name: str


def assign_pair_sets(
    first: Sequence[str],
    second: Sequence[str],
    strata: np.ndarray,
    split_by: SplitBy,
    identity: float,
    seed: int,
) -> PairSets:
    """Assign pairs to train, validation and test.

    Args:
        first: (P) sequences.
        second: (P) sequences.
        strata: (P,) class or group of similar values of each pair.
        split_by: identity divides the proteins, so that neither protein of a test pair resembles one of train, and
            leaves out pairs of proteins in different sets. Otherwise the pairs are divided, equal ones in one set.
        identity: share of equal residues from which proteins are similar.
        seed: of the assignment.

    Returns:
        The sets.

    Raises:
        InputError: there are too few different, or dissimilar, proteins.
    """
    if split_by != "identity":
        keys = build_keys(first, second, ordered=False)
        found = assign_sets(keys, strata, PAIR_SHARES, "random", identity, seed)
        return PairSets(found.sets, "random pairs, whose proteins may be in several sets", "random")
    unique = sorted({*first, *second})
    found = assign_sets(unique, np.zeros(len(unique), dtype=np.int64), PROTEIN_SHARES, "identity", identity, seed)
    set_of = dict(zip(unique, found.sets.tolist(), strict=True))
    pairs = [(set_of[a], set_of[b]) for a, b in zip(first, second, strict=True)]
    sets = np.array([a if a == b else "" for a, b in pairs])
    dropped = int((sets == "").sum())
    method = (
        f"proteins divided by {found.method}; {format_count(dropped, 'pair')} of proteins in different sets left out"
    )
    return PairSets(sets, method, found.name)


def choose_pair_validation(
    first: Sequence[str], second: Sequence[str], strata: np.ndarray, identity: float, seed: int
) -> np.ndarray:
    """Choose a tenth of the train pairs for validation, equal pairs in one set: (P,) "train" or "validation"."""
    return assign_sets(build_keys(first, second, False), strata, VALIDATION_SHARES, "random", identity, seed).sets


def count_shared(pairs: Pairs, sets: np.ndarray) -> np.ndarray:
    """Count the proteins of each pair that train has, or that resemble one of train: (P,) 0, 1 or 2."""
    train = np.unique(pairs.groups_P2[sets == "train"])
    return np.isin(pairs.groups_P2, train).sum(1)


def sample_pair_counts(groups_P2: np.ndarray, num_resamples: int, seed: int = 0) -> np.ndarray:
    """Sample bootstrap replicates of proteins: a pair counts as often as both of its proteins occur together.

    Pairs that share a protein are not independent. Resampled as if they were, their intervals would be far too narrow:
    of simulated intervals of 95% only half contain the true value.

    Args:
        groups_P2: (P, 2) numbers of the proteins of each pair.
        num_resamples: R, number of replicates.
        seed: of the random numbers.

    Returns:
        (R, P) int32, the product of the counts of both proteins; of a pair of a protein with itself its count.

    Source:
        The pigeonhole bootstrap, Owen 2007, 10.1214/07-AOAS122.
    """
    proteins, places = np.unique(groups_P2, return_inverse=True)
    first_P, second_P = places.reshape(groups_P2.shape).T
    counts_RG = sample_counts(len(proteins), num_resamples, seed)
    return counts_RG[:, first_P] * np.where(first_P == second_P, 1, counts_RG[:, second_P])


def describe_overlap(pairs: Pairs, sets: np.ndarray) -> str:
    """Describe how many proteins of test pairs are in train."""
    shared = count_shared(pairs, sets)[sets == "test"]
    counts = ", ".join(f"{number}: {int((shared == number).sum())}" for number in SHARED)
    return f"test pairs by the number of their proteins that train has ({pairs.grouping}): {counts}"


def find_repeated_pairs(keys: Sequence[str], targets: np.ndarray, sets: np.ndarray) -> list[str]:
    """Note pairs that are in train and in test, and pairs with different targets."""
    fitted = {key for key, name in zip(keys, sets, strict=True) if name != "test"}
    both = sum(key in fitted for key, name in zip(keys, sets, strict=True) if name == "test")
    first: dict[str, int] = {}
    differing = {
        key
        for row, key in enumerate(keys)
        if not np.array_equal(targets[first.setdefault(key, row)], targets[row], equal_nan=targets.dtype.kind == "f")
    }
    notes = [f"{both} test pairs also occur in train or validation, in either order"] if both else []
    if differing:
        notes.append(f"{format_count(len(differing), 'pair')} with different targets in different records")
    return notes


def check_ids(ids: Sequence[str], sequences: Sequence[str], source: object) -> None:
    """Raise InputError if one name has two different sequences."""
    sequence_of: dict[str, str] = {}
    for name, sequence in zip(ids, sequences, strict=True):
        if sequence_of.setdefault(name, sequence) != sequence:
            raise InputError(
                f"{source}: the protein {name!r} has two different sequences. Give each protein a name of its own.",
                code="pairs.two-sequences",
                record=name,
            )
