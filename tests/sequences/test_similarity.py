"""Groups of similar sequences: k-mers against a plain second implementation, alignments and MMseqs2."""

import random
import shutil
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.sequences import similarity
from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.similarity import group_by_identity, group_by_kmers

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@cache
def list_kmers(text):
    return {text[i : i + 4] for i in range(len(text) - 3)}


def share_kmers(first, second, identity):
    """The criterion of two sequences, written as in its description."""
    kmers = list_kmers(first), list_kmers(second)
    few, many = sorted(map(len, kmers))
    shared = len(kmers[0] & kmers[1])
    return shared >= 1 and shared >= identity**4 * few + 0.0587**4 * few * many


def mutate(generator, sequence, share_kept):
    return "".join(c if generator.random() < share_kept else generator.choice(LETTERS) for c in sequence)


@st.composite
def families(draw):
    generator = random.Random(draw(st.integers(0, 2**32)))
    found = set()
    for _ in range(draw(st.integers(1, 8))):
        founder = "".join(generator.choices(LETTERS, k=generator.choice([2, 8, 30, 90, 200])))
        found |= {mutate(generator, founder, generator.choice([0.4, 0.6, 0.8, 0.95])) for _ in range(4)} | {founder}
    found = sorted(found)
    generator.shuffle(found)
    return found


@settings(max_examples=60, deadline=None)
@given(sequences=families(), identity=st.sampled_from([0.4, 0.5, 0.7, 0.9]), shuffle=st.randoms())
def test_groups_are_the_components_of_similar_pairs(sequences, identity, shuffle):
    group = list(range(len(sequences)))
    for i, first in enumerate(sequences):
        for j in range(i):
            if share_kmers(first, sequences[j], identity):
                old, new = group[i], group[j]
                group = [new if each == old else each for each in group]
    found = group_by_kmers(sequences, identity)
    together = {(i, j) for i in range(len(group)) for j in range(i) if group[i] == group[j]}
    assert {(i, j) for i in range(len(group)) for j in range(i) if found[i] == found[j]} == together
    order = list(range(len(sequences)))
    shuffle.shuffle(order)
    again = dict(zip(order, group_by_kmers([sequences[row] for row in order], identity), strict=True))
    assert {(i, j) for i in again for j in again if j < i and again[i] == again[j]} == together


def test_the_kmer_criterion_agrees_with_alignments_of_real_families(root):
    """Of the pairs with the identity or more nearly all are found; pairs far below it are not."""
    sequences = sorted({r.sequence for r in read_fasta(root / "data/sample/uniref50_train_filt.fasta")})[::3]
    sequences += sorted({r.sequence for r in read_fasta(root / "data/sample/ur90_ur50_sampler.fasta")})[::3]
    sequences = sorted(set(sequences))
    pairs = [
        (Levenshtein.normalized_similarity(first, second, score_cutoff=0.2), first, second)
        for i, first in enumerate(sequences)
        for second in sequences[:i]
        if 0.8 < len(first) / len(second) < 1.25
    ]
    for identity in (0.5, 0.6, 0.7):
        alike = [share_kmers(a, b, identity) for found, a, b in pairs if found >= identity]
        apart = [share_kmers(a, b, identity) for found, a, b in pairs if found < identity - 0.2]
        assert len(alike) > 20
        assert np.mean(alike) >= 0.95
        assert np.mean(apart) <= 0.005


def test_without_mmseqs_limits_are_stated(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with refused("identity.limit", identity=0.3):
        group_by_identity(["MKV", "AAA"], 0.3)
    monkeypatch.setattr(similarity, "MAX_SEQUENCES", 1)
    with refused("identity.limit", sequences=2):
        group_by_identity(["MKV", "AAA"], 0.5)


def test_the_advice_is_to_install_mmseqs_only_where_that_helps(monkeypatch):
    for installed, advice in ((None, True), ("/bin/true", False)):  # MMseqs2 is not used for peptides
        monkeypatch.setattr(shutil, "which", lambda name, found=installed: found)
        with pytest.raises(InputError) as raised:
            group_by_identity(["MKVLA", "AAAAA"], 0.3)
        assert ("Install MMseqs2" in str(raised.value)) == advice
        assert "et split_by to random" in str(raised.value)


def test_a_failing_mmseqs_is_replaced_by_kmers(tmp_path, monkeypatch, caplog):
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    generator = random.Random(0)
    first, second = ("".join(generator.choices(LETTERS, k=100)) for _ in range(2))
    found = group_by_identity([first, second, mutate(generator, first, 0.9)], 0.5)
    assert found.numbers[0] == found.numbers[2] != found.numbers[1]
    assert "shared 4-mers" in found.method
    assert "MMseqs2 failed (no memory)" in caplog.text


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_mmseqs_groups_families_whatever_their_order():
    generator = random.Random(1)
    founders = ["".join(generator.choices(LETTERS, k=120)) for _ in range(6)]
    sequences = [mutate(generator, founder, 0.8) for founder in founders for _ in range(4)]
    expected = [row // 4 for row in range(24)]
    order = generator.sample(range(24), 24)
    found = group_by_identity([sequences[row] for row in order], 0.5)
    assert "MMseqs2" in found.method
    numbers = dict(zip(order, found.numbers.tolist(), strict=True))
    assert all((numbers[i] == numbers[j]) == (expected[i] == expected[j]) for i in numbers for j in numbers)
    peptides = group_by_identity([sequence[:20] for sequence in sequences], 0.5)
    assert "4-mers" in peptides.method
