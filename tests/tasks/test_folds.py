"""Folds: no shared group, balanced sizes and strata, compared with scikit-learn; independence of the order."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from support.errors import refused

from esm2kit.tasks.folds import assign_folds, name_groups


@st.composite
def grouped_proteins(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Draw groups of even or very uneven sizes, strata that may follow the groups, a number of folds and a seed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_proteins, num_folds = draw(st.integers(12, 200)), draw(st.integers(2, 6))
    num_groups = draw(st.integers(num_folds, num_proteins))
    if draw(st.booleans()):
        group_P = generator.integers(0, num_groups, num_proteins)
    else:
        group_P = generator.zipf(1.6, num_proteins) % num_groups
    group_P[:num_folds] = np.arange(num_folds)
    stratum_P = generator.integers(0, draw(st.integers(1, 6)), num_proteins)
    if draw(st.booleans()):
        stratum_P = (group_P + generator.integers(0, 2, num_proteins)) % 4
    return group_P, stratum_P, num_folds, draw(st.integers(0, 1000))


def count_sizes(fold_P: np.ndarray, num_folds: int) -> np.ndarray:
    """Count the proteins of each fold."""
    return np.bincount(fold_P, minlength=num_folds)


def measure_imbalance(fold_P: np.ndarray, stratum_P: np.ndarray, num_folds: int) -> float:
    """Return how many proteins of a stratum a fold has more or fewer than its share, at most."""
    members = [fold_P[stratum_P == stratum] for stratum in np.unique(stratum_P)]
    return max(np.abs(count_sizes(found, num_folds) - len(found) / num_folds).max() for found in members)


def split_by_sklearn(splitter, group_P: np.ndarray, stratum_P: np.ndarray) -> np.ndarray:
    """Return the fold of each protein that a splitter of scikit-learn chooses."""
    fold_P = np.full(len(group_P), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, test) in enumerate(splitter.split(group_P, stratum_P, group_P)):
            fold_P[test] = fold
    return fold_P


@settings(max_examples=150, deadline=None)
@given(grouped_proteins())
def test_no_group_is_shared_and_no_fold_is_empty(drawn):
    group_P, stratum_P, num_folds, seed = drawn
    fold_P = assign_folds(group_P, num_folds, seed, stratum_P)
    assert len(np.unique(np.stack([group_P, fold_P]), axis=1).T) == len(np.unique(group_P))
    assert set(fold_P.tolist()) == set(range(num_folds))


@settings(max_examples=100, deadline=None)
@given(grouped_proteins())
def test_the_order_of_the_proteins_has_no_influence(drawn):
    group_P, stratum_P, num_folds, seed = drawn
    order = np.random.default_rng(seed).permutation(len(group_P))
    expected = assign_folds(group_P, num_folds, seed, stratum_P)
    assert (assign_folds(group_P[order], num_folds, seed, stratum_P[order]) == expected[order]).all()
    assert (assign_folds(group_P, num_folds, seed, stratum_P) == expected).all()


@settings(max_examples=100, deadline=None)
@given(grouped_proteins())
def test_sizes_are_at_least_as_equal_as_those_of_group_k_fold(drawn):
    group_P, stratum_P, num_folds, seed = drawn
    ours = count_sizes(assign_folds(group_P, num_folds, seed), num_folds)
    theirs = count_sizes(split_by_sklearn(GroupKFold(num_folds), group_P, stratum_P), num_folds)
    assert np.square(ours).sum() <= np.square(theirs).sum()


def test_strata_are_at_least_as_equal_as_those_of_stratified_group_k_fold():
    generator, ours, theirs = np.random.default_rng(0), [], []
    for _ in range(100):
        num_proteins, num_folds = int(generator.integers(30, 200)), int(generator.integers(2, 6))
        group_P = generator.integers(0, int(generator.integers(2 * num_folds, num_proteins)), num_proteins)
        stratum_P = (group_P + generator.integers(0, 2, num_proteins)) % 4
        fold_P = assign_folds(group_P, num_folds, 0, stratum_P)
        peer_P = split_by_sklearn(StratifiedGroupKFold(num_folds), group_P, stratum_P)
        ours.append(measure_imbalance(fold_P, stratum_P, num_folds))
        theirs.append(measure_imbalance(peer_P, stratum_P, num_folds))
    worse = np.mean(np.array(ours) > np.array(theirs))
    assert np.mean(ours) <= np.mean(theirs)
    assert worse < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 150), st.integers(2, 6), st.integers(1, 7), st.integers(0, 1000))
def test_single_proteins_are_divided_as_evenly_as_possible(num_proteins, num_folds, num_strata, seed):
    stratum_P = np.random.default_rng(seed).integers(0, num_strata, num_proteins)
    fold_P = assign_folds(np.arange(num_proteins), num_folds, seed, stratum_P)
    assert np.ptp(count_sizes(fold_P, num_folds)) <= 1
    assert measure_imbalance(fold_P, stratum_P, num_folds) < 1


def test_seeds_give_different_folds_of_equal_balance():
    stratum_P = np.arange(40) % 4
    found = [assign_folds(np.arange(40), 4, seed, stratum_P) for seed in range(5)]
    together = {tuple((fold_P[:, None] == fold_P).ravel()) for fold_P in found}
    assert len(together) == 5
    assert all((count_sizes(fold_P, 4) == 10).all() for fold_P in found)


def test_known_optimum():
    # 4 + 3, 3 + 2 + 2: the longest group first gives 4 + 2, 3 + 3 + 2, and a swap the optimum
    group_P = np.repeat(["a", "b", "c", "d", "e"], [4, 3, 3, 2, 2])
    assert sorted(count_sizes(assign_folds(group_P, 2), 2).tolist()) == [7, 7]


@pytest.mark.parametrize(("num_folds", "code"), [(4, "folds.too-few-groups"), (1, "folds.number")])
def test_too_few_groups_or_folds(num_folds, code):
    with refused(code):
        assign_folds(["a", "a", "b", "c"], num_folds)
    assert sorted(assign_folds(["a", "a", "b", "c"], 3).tolist()) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])


def test_groups_are_named_by_their_content():
    sequences = ["MKV", "ACD", "MKV", "WWW"]
    names = name_groups(np.array([5, 7, 5, 7]), sequences)
    order = [3, 0, 2, 1]
    again = name_groups(np.array([1, 0, 0, 1]), [sequences[place] for place in order])
    assert names[0] == names[2] != names[1] == names[3]
    assert (again == names[order]).all()
