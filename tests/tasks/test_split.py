"""Sets of proteins: no relatives across sets, similar labels in all, the same for any order of the proteins."""

import random
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.sequences.alignment import Criterion, are_similar
from esm2kit.tasks.split import SHARES, VALIDATION_SHARES, assign_sets, build_strata

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(autouse=True)
def no_mmseqs(monkeypatch):
    """Without MMseqs2, which takes seconds per call; tests/sequences/test_similarity.py runs it."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def mutate(generator, sequence, share_kept):
    return "".join(c if generator.random() < share_kept else generator.choice(LETTERS) for c in sequence)


def draw_families(generator, families, largest):
    """Families of relatives, some of them equal, and a value and a class per protein."""
    sequences = []
    for _ in range(families):
        founder = "".join(generator.choices(LETTERS, k=generator.choice([40, 80, 150])))
        members = generator.randint(1, largest)
        sequences += [
            founder,
            *(mutate(generator, founder, generator.choice([1, 0.9, 0.7])) for _ in range(members - 1)),
        ]
    values = np.array([round(generator.gauss(50, 8), 1) for _ in sequences])
    classes = [generator.choice("aaab") for _ in sequences]
    return sequences, values, classes


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    families=st.integers(20, 40),
    largest=st.integers(1, 4),
    split_by=st.sampled_from(["auto", "identity", "random"]),
    by_class=st.booleans(),
)
def test_invariants_of_a_split(seed, families, largest, split_by, by_class):
    generator = random.Random(seed)
    sequences, values, classes = draw_families(generator, families, largest)
    strata = np.array([ord(label) for label in classes]) if by_class else build_strata(values)
    found = assign_sets(sequences, strata, SHARES, split_by)
    sets = found.sets.tolist()
    assert found.name == ("random" if split_by == "random" else "identity50")
    criterion = Criterion(0.5, 0.8, len(set(sequences)))
    for i, first in enumerate(sequences):
        for j in range(i):
            if first == sequences[j] or (split_by != "random" and are_similar(first, sequences[j], criterion)):
                assert sets[i] == sets[j]
    sizes, number = Counter(sets), len(sequences)
    for name in ("validation", "test"):
        quota = max(number / 10, min(5, number / 5))
        assert quota / 2 <= sizes[name] <= quota + largest + 1
    assert set(classes) == {label for label, name in zip(classes, sets, strict=True) if name == "train"} or not by_class
    order = generator.sample(range(number), number)
    again = assign_sets([sequences[row] for row in order], strata[order], SHARES, split_by).sets
    assert again.tolist() == [sets[row] for row in order]


def test_another_seed_gives_another_split_of_the_same_sizes():
    sequences, values, _ = draw_families(random.Random(0), 100, 1)
    first, second = (assign_sets(sequences, build_strata(values), SHARES, seed=seed).sets for seed in (0, 1))
    assert (first != second).sum() > 20
    for sets in (first, second):
        sizes = Counter(sets)
        assert all(abs(sizes[name] - 100 * share) <= 1 for name, share in SHARES.items())


def test_every_set_has_its_share_of_each_stratum():
    sequences, values, _ = draw_families(random.Random(0), 200, 1)
    strata = build_strata(values)
    found = assign_sets(sequences, strata, SHARES, "random")
    assert found.method == "random, equal sequences in one set"
    assert len(set(strata)) == 10
    for stratum in range(10):
        sizes = Counter(found.sets[strata == stratum])
        assert sizes["validation"] in (1, 2, 3)
        assert sizes["test"] in (1, 2, 3)
    rare = ["common"] * 196 + ["rare"] * 3 + ["single"]
    sets = assign_sets(sequences, np.unique(rare, return_inverse=True)[1], SHARES).sets
    assert sets[199] == "train"
    assert "train" in sets[196:199]


def test_variants_of_one_protein_are_split_at_random():
    generator = random.Random(0)
    wild_type = "".join(generator.choices(LETTERS, k=100))
    variants = [wild_type[:place] + "A" + wild_type[place + 1 :] for place in range(90)]
    values = np.arange(90.0)
    found = assign_sets(variants, build_strata(values), SHARES)
    assert found.name == "random"
    assert found.method == (
        "random, equal sequences in one set, because the groups of at least 50% identity by shared 4-mers and "
        "alignments (1) leave 0 proteins in validation instead of 9"
    )
    assert Counter(found.sets) == {"train": 72, "validation": 9, "test": 9}
    with refused("split.identity", identity=0.5):
        assign_sets(variants, build_strata(values), SHARES, "identity")


@pytest.mark.parametrize(("number", "expected"), [(5, (3, 1, 1)), (10, (6, 2, 2)), (30, (20, 5, 5)), (60, (48, 6, 6))])
def test_small_data_have_some_proteins_in_each_set(number, expected):
    sequences, values, _ = draw_families(random.Random(2), number, 1)
    sizes = Counter(assign_sets(sequences, build_strata(values), SHARES).sets)
    assert all(abs(sizes[name] - size) <= 1 and sizes[name] for name, size in zip(SHARES, expected, strict=True))


def test_too_few_sequences_are_refused():
    for sequences in (["MKV", "AAA"], ["MKV"] * 50):
        with refused("split.too-few", sequences=len(set(sequences))):
            assign_sets(sequences, np.zeros(len(sequences), dtype=int), SHARES)


def test_a_tenth_of_train_for_validation():
    sequences, values, _ = draw_families(random.Random(3), 50, 3)
    found = assign_sets(sequences, build_strata(values), VALIDATION_SHARES)
    assert found.name == "identity50"
    assert abs((found.sets == "validation").sum() - len(sequences) / 10) <= 2
