"""Pairs that are excluded without an alignment: against Biopython's alignments, all of those with the best score."""

import os
import random
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import ALIGNER, LETTERS, draw_relatives, draw_sequence, mutate

from esm2kit.sequences import screening
from esm2kit.sequences.alignment import Criterion, align_locally, replace_rare
from esm2kit.sequences.screening import FEWEST_COLUMNS, MOST_IDENTITIES, PairScreen
from esm2kit.sequences.similarity import SimilarityGroups
from esm2kit.splitting.leakage import find_nearest
from esm2kit.tasks.split import separate_groups

opal = pytest.mark.skipif(find_spec("pyopal") is None, reason="pyopal is not installed (no wheel for Python 3.14)")


def list_pairs(sequences):
    return np.array(list(combinations(range(len(sequences)), 2)), dtype=np.int64).T


def draw_mixture(seed, families=4):
    """Families, random sequences, and rare residues."""
    generator = random.Random(seed)
    found = {text for _ in range(families) for text in draw_relatives(generator, 4)}
    found |= {draw_sequence(generator, generator.choice([8, 20, 60, 200])) for _ in range(4)}
    rare = generator.choice(sorted(found))
    found.add("".join(generator.choice("UOJXBZ") if generator.random() < 0.2 else letter for letter in rare))
    return sorted(found)


def maximise(first, second, weights):
    """The best score, and the largest sum of weights of an alignment with it: Gotoh's recursions with pairs."""
    blosum = ALIGNER.substitution_matrix
    none = (-(10**9), 0)

    def add(one, *other):
        return one[0] + other[0], one[1] + other[1]

    above, gap_above = [(0, 0)] * (len(second) + 1), [none] * (len(second) + 1)
    best = (0, 0)
    for one in first:
        left, gap_left, row = (0, 0), none, [(0, 0)]
        for place, other in enumerate(second, 1):
            gap_left = max(add(left, -11, weights.gap), add(gap_left, -1, weights.gap))
            gap_above[place] = max(add(above[place], -11, weights.gap), add(gap_above[place], -1, weights.gap))
            score = int(blosum[replace_rare(one)][replace_rare(other)])
            paired = add(above[place - 1], score, weights.equal if one == other else weights.different)
            left = max((0, 0), paired, gap_left, gap_above[place])
            row.append(left)
            best = max(best, left)
        above = row
    return best


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    identity=st.sampled_from([0.0, 0.3, 0.5, 0.537, 0.7, 0.9, 1.0]),
    coverage=st.sampled_from([0.5, 0.8]),
)
def test_no_similar_pair_is_excluded(seed, identity, coverage):
    sequences = draw_mixture(seed)
    criterion = Criterion(identity, coverage, len(sequences))
    first_N, second_N = list_pairs(sequences)
    done = []
    possible = PairScreen(sequences, criterion).find_possible(first_N, second_N, done.append)
    for is_possible, first, second in zip(possible, first_N, second_N, strict=True):
        texts = sequences[first], sequences[second]
        found = align_locally(*texts)
        assert is_possible or found is None or not criterion.is_met(found, *map(len, texts))
    assert done == sorted(done)
    assert done[-1] == len(first_N)


@opal
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_highest_identity_is_that_of_all_alignments_with_the_best_score(seed):
    """Computed by recursions in Python, and not below the one of the alignment that Biopython lists first."""
    sequences = sorted(draw_mixture(seed, families=1), key=len)[:8]
    screen = PairScreen(sequences, Criterion(0.5, 0.8, len(sequences)))
    highest = screen.bound_identity(0, np.arange(1, len(sequences)))
    for other, bound in zip(sequences[1:], highest, strict=True):
        score, equal = maximise(sequences[0], other, MOST_IDENTITIES)
        again, columns = maximise(sequences[0], other, FEWEST_COLUMNS)
        found = align_locally(sequences[0], other)
        assert score == again == (found.score if found else 0)
        assert bound == (equal / -columns if score else np.inf)
        assert found is None or bound >= found.identity


@opal
def test_each_bound_excludes_a_pair():
    """Scores reach the number of equal residues that are required; identity, columns or chance exclude the pairs."""
    generator = random.Random(0)
    founder = draw_sequence(generator, 200)
    half = "".join(letter if place % 2 else {"I": "V", "L": "M", "D": "E", "K": "R"}.get(letter, letter)
                   for place, letter in enumerate(mutate(generator, founder, 0.55)))  # fmt: skip
    short = founder[:100] + draw_sequence(generator, 100)
    repeat = "WWWWWWWW"
    pairs = [(founder, half, 0.8, 0.3), (founder, short, 0.3, 0.8), (repeat, repeat[:7] + "ACDEFGHIKLM", 0.3, 0.8)]
    for first, second, identity, coverage in pairs:
        criterion = Criterion(identity, coverage, 10**12 if first == repeat else 100)
        found = align_locally(first, second)
        assert found.score >= criterion.count_required(min(len(first), len(second))), "the score excludes it"
        assert not criterion.is_met(found, len(first), len(second))
        rows = np.array([0]), np.array([1])
        assert not PairScreen([first, second], criterion).find_possible(*rows)[0]
        easier = criterion._replace(identity=0.1, coverage=0.1, num_sequences=1)
        assert PairScreen([first, second], easier).find_possible(*rows)[0], "the counter-example"


@opal
def test_most_unrelated_pairs_are_excluded():
    generator = random.Random(0)
    sequences = sorted(draw_sequence(generator, 120) for _ in range(30))
    possible = PairScreen(sequences, Criterion(0.5, 0.8, 30)).find_possible(*list_pairs(sequences))
    assert possible.sum() == 0
    assert len(possible) == 435


@opal
def test_long_sequences():
    """A sequence of more than MAX_QUERY residues is a target; sums of weights that are too large exclude nothing."""
    generator = random.Random(0)
    long = draw_sequence(generator, 6_000)
    sequences = [long, long[2000:2100], draw_sequence(generator, 100), mutate(generator, long[:3_000], 0.9)]
    screen = PairScreen(sequences, Criterion(0.537, 0.8, 4))
    pairs = np.array([[0, 0, 0, 1], [1, 2, 3, 2]])
    assert screen.find_possible(*pairs).tolist() == [True, False, True, False]
    assert len(screen.find_possible(*np.empty((2, 0), dtype=np.int64))) == 0


def divide(group_P):
    return group_P % 3


@pytest.mark.parametrize("available", [pytest.param(True, marks=opal), False])
@pytest.mark.parametrize(("identity", "coverage"), [(0.3, 0.8), (0.5, 0.8), (0.7, 0.5), (0.9, 0.8)])
def test_results_are_those_of_aligning_every_pair(monkeypatch, identity, coverage, available):
    """Groups, the comparison of the sets and the nearest proteins: equal to those without the screen."""

    def compute():
        groups = SimilarityGroups(sequences, identity, coverage)
        groups.group_by_kmers()
        first = groups.numbers.tolist()
        sets, check = separate_groups(groups, np.arange(len(sequences)), divide)
        again = SimilarityGroups(sequences, identity, coverage)
        again.group_by_kmers()
        some = again.find_pairs_across(again.numbers, max_cells=3_000_000)
        nearest = [
            [values.tolist() for values in find_nearest(sequences, names, coverage, 30, 0, "compared")]
            for names in (np.array(["train", "test"])[np.arange(len(sequences)) % 2], divide(sets).astype(str))
        ]
        return first, sets.tolist(), check, some, groups.numbers.tolist(), nearest

    sequences = sorted({text for seed in range(4) for text in draw_mixture(seed)})
    if not available:
        monkeypatch.setattr(screening, "find_spec", lambda name: None)
    found = compute()
    monkeypatch.setattr(PairScreen, "find_possible", lambda self, first, *_: np.ones(len(first), dtype=bool))
    monkeypatch.setattr(PairScreen, "bound_identity", lambda self, query, targets: np.full(len(targets), np.inf))
    assert found == compute()
    assert len(set(LETTERS) - set("".join(sequences))) == 0
    assert max(found[0]) + 1 < len(sequences), "there are relatives"
    assert any(np.isfinite(each[2]).any() and max(each[2]) > 0.4 for each in found[5])


@opal
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux reports the memory in /proc")
def test_the_memory_of_each_query_is_freed():
    """Scores of more than 8 bits: a way of calling Opal that does not free it takes 18 KB per query."""

    def measure():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    generator = random.Random(0)
    founder = draw_sequence(generator, 260)
    sequences = [founder, *(mutate(generator, founder, 0.9) for _ in range(8))]
    screen = PairScreen(sequences, Criterion(0.99, 0.8, 9))
    pairs = np.zeros(8, dtype=np.int64), np.arange(1, 9)
    screen.find_possible(*pairs)
    before = measure()
    for _ in range(1_000):
        screen.find_possible(*pairs)
    assert measure() - before < 5_000_000
