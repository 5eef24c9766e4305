"""Groups of similar sequences, and sets without similar pairs: against alignments of all pairs, and MMseqs2."""

import random
import shutil
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.families import LETTERS, draw_relatives, draw_sequence, measure_identity, mutate

from esm2kit.core.errors import InputError
from esm2kit.sequences import similarity
from esm2kit.sequences.alignment import MAX_EXPECTED, Alignment, Criterion, are_similar
from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.similarity import SimilarityGroups, group_by_identity
from esm2kit.tasks.split import separate_groups


def list_similar_pairs(sequences, identity, coverage=0.8):
    """All pairs above the threshold, by aligning every pair; without those that chance explains."""
    criterion = Criterion(identity, coverage, len(sequences))
    found = []
    for one, other in combinations(range(len(sequences)), 2):
        texts = sequences[one], sequences[other]
        equal, columns, covered = measure_identity(*texts)
        if not equal or equal / columns < identity or covered < coverage * min(map(len, texts)):
            continue
        plain = Alignment(equal, equal, columns, covered, 0)
        if criterion.count_expected(plain, sum(map(len, texts))) <= MAX_EXPECTED / (2 * columns) ** 3:
            found.append((one, other))
    return found


def draw_families(generator, families=8, largest=5):
    sequences = {text for _ in range(families) for text in draw_relatives(generator, generator.randint(1, largest))}
    return sorted(sequences)


def divide(group_P, shares=(0.6, 0.2, 0.2)):
    """Put groups into three sets, the largest ones first, each where most is missing."""
    names, sizes = np.unique(group_P, return_counts=True)
    quota = np.array(shares) * len(group_P)
    set_of = {}
    for place in np.argsort(-sizes, kind="stable"):
        set_of[names[place]] = int(quota.argmax())
        quota[quota.argmax()] -= sizes[place]
    return np.array([set_of[name] for name in group_P.tolist()])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), identity=st.sampled_from([0.3, 0.5, 0.7, 0.9]), coverage=st.sampled_from([0.5, 0.8]))
def test_no_pair_above_the_threshold_is_in_different_sets(seed, identity, coverage):
    sequences = draw_families(random.Random(seed))
    groups = group_by_identity(sequences, identity, coverage, "kmers")
    sets, check = separate_groups(groups, np.arange(len(sequences)), divide)
    assert check.complete
    assert not check.pairs
    assert check.num_pairs == sum(sets[one] != sets[other] for one, other in combinations(range(len(sequences)), 2))
    similar = list_similar_pairs(sequences, identity, coverage)
    assert all(sets[one] == sets[other] for one, other in similar)
    numbers = groups.numbers
    assert all(numbers[one] == numbers[other] for one, other in similar if sets[one] != sets[other])


def test_a_random_split_has_similar_pairs_in_different_sets():
    """The counter-example: what the property above excludes happens where groups are not respected."""
    sequences = draw_families(random.Random(0), families=20)
    sets = divide(np.random.default_rng(0).permutation(len(sequences)))
    leaks = [pair for pair in list_similar_pairs(sequences, 0.5) if sets[pair[0]] != sets[pair[1]]]
    assert len(leaks) > 10
    check = SimilarityGroups(sequences, 0.5)
    check.group_by_kmers()
    found = check.find_pairs_across(sets)
    assert {*leaks} <= {*found.pairs}


def test_groups_are_the_components_of_the_similar_pairs_whatever_the_order():
    generator = random.Random(3)
    sequences = draw_families(generator, families=12)
    groups = group_by_identity(sequences, 0.5, method="kmers")
    separate_groups(groups, np.arange(len(sequences)), lambda numbers: numbers)  # every group is a set
    expected = SimilarityGroups(sequences, 0.5)
    for one, other in combinations(range(len(sequences)), 2):
        if are_similar(sequences[one], sequences[other], expected.criterion):
            expected.merge(one, other)
    assert groups.numbers.tolist() == expected.numbers.tolist()
    order = generator.sample(range(len(sequences)), len(sequences))
    again = group_by_identity([sequences[row] for row in order], 0.5, method="kmers")
    separate_groups(again, np.arange(len(sequences)), lambda numbers: numbers)
    pairs = combinations(range(len(sequences)), 2)
    numbers = dict(zip(order, again.numbers.tolist(), strict=True))
    assert all((numbers[i] == numbers[j]) == (groups.numbers[i] == groups.numbers[j]) for i, j in pairs)


def test_what_the_kmers_miss_is_found_between_sets():
    """Relatives of half their residues without a common 4-mer: every second residue differs."""
    generator = random.Random(0)
    founder = draw_sequence(generator, 100)
    other = "".join(letter if place % 2 else draw_sequence(generator, 1) for place, letter in enumerate(founder))
    sequences = sorted([founder, other, *(draw_sequence(generator, 100) for _ in range(6))])
    groups = group_by_identity(sequences, 0.5, method="kmers")
    pair = tuple(sorted((sequences.index(founder), sequences.index(other))))
    assert len(set(groups.numbers)) == 8
    sets = np.zeros(8, dtype=int)
    sets[pair[0]] = 1
    check = groups.find_pairs_across(sets)
    assert check.pairs == [pair]
    assert (check.complete, check.num_pairs) == (True, 7)
    assert len(set(groups.numbers)) == 7
    assert not groups.find_pairs_across(sets, max_cells=0).complete, "the alignments have a limit"


def test_the_most_promising_pairs_are_aligned_first():
    """One pair of relatives without a common 4-mer among 1,225: found by 40 alignments, although lengths differ."""
    generator = random.Random(0)
    founder = draw_sequence(generator, 120)
    other = "".join(letter if place % 2 else draw_sequence(generator, 1) for place, letter in enumerate(founder))
    sequences = sorted(
        [founder, other, *(draw_sequence(generator, generator.choice([60, 120, 400])) for _ in range(48))]
    )
    groups = group_by_identity(sequences, 0.5, method="kmers")
    check = groups.find_pairs_across(np.arange(50), max_cells=40 * (120 * 120 + 5_000))
    assert check.pairs == [tuple(sorted((sequences.index(founder), sequences.index(other))))]
    assert (check.complete, check.num_pairs) == (False, 1225)
    assert check.num_aligned <= 40


def test_kmers_find_nearly_all_real_relatives(root):
    """Of the pairs that are similar by alignment; all of them, once proteins of different groups are compared."""
    records = read_fasta(root / "data/sample/ur90_ur50_sampler.fasta")
    sequences = sorted({record.sequence for record in records if len(record.sequence) < 160})[:160]
    groups = group_by_identity(sequences, 0.6, method="kmers")
    similar = [
        pair for pair in combinations(range(len(sequences)), 2)
        if are_similar(sequences[pair[0]], sequences[pair[1]], groups.criterion)
    ]  # fmt: skip
    together = [groups.numbers[one] == groups.numbers[other] for one, other in similar]
    assert len(similar) > 20
    assert np.mean(together) >= 0.95
    separate_groups(groups, np.arange(len(sequences)), lambda numbers: numbers, max_cells=10**12)
    assert all(groups.numbers[one] == groups.numbers[other] for one, other in similar)


def test_peptides():
    """A residue of ten may differ at an identity of 0.9; no pair of random ones is similar."""
    generator = random.Random(0)
    peptides = [draw_sequence(generator, 10) for _ in range(60)]
    relatives = [peptide[:4] + ("A" if peptide[4] != "A" else "W") + peptide[5:] for peptide in peptides[:20]]
    sequences = sorted({*peptides, *relatives})
    groups = group_by_identity(sequences, 0.9)
    assert groups.tool == "k-mers"
    separate_groups(groups, np.arange(len(sequences)), lambda numbers: numbers)
    numbers = dict(zip(sequences, groups.numbers.tolist(), strict=True))
    assert all(numbers[one] == numbers[other] for one, other in zip(peptides, relatives, strict=False))
    assert len(set(numbers.values())) == 60


def test_without_mmseqs_limits_are_stated(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(similarity, "MAX_ALL_ALIGNED", 1)
    with refused("identity.limit", identity=0.3, sequences=2, limit=1):
        group_by_identity(["MKV", "AAA"], 0.3)
    group_by_identity(["MKV", "AAA"], 0.5)
    monkeypatch.setattr(similarity, "MAX_SEQUENCES", 1)
    with refused("identity.limit", sequences=2):
        group_by_identity(["MKV", "AAA"], 0.5)
    with refused("identity.no-mmseqs"):
        group_by_identity(["MKV", "AAA"], 0.5, method="mmseqs")


def test_the_advice_is_to_install_mmseqs_only_where_that_helps(monkeypatch):
    monkeypatch.setattr(similarity, "MAX_ALL_ALIGNED", 1)
    for installed, advice in ((None, True), ("/bin/true", False)):  # MMseqs2 is not used for peptides
        monkeypatch.setattr(shutil, "which", lambda name, found=installed: found)
        with pytest.raises(InputError) as raised:
            group_by_identity(["MKVLA", "AAAAA"], 0.3)
        assert ("Install MMseqs2" in str(raised.value)) == advice
        assert "plit at random" in str(raised.value)


def write_program(path, text):
    program = path / "mmseqs"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_a_failing_mmseqs_is_replaced_by_kmers_unless_it_was_chosen(tmp_path, monkeypatch, caplog):
    write_program(tmp_path, "echo no memory >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    generator = random.Random(0)
    first, second = ("".join(generator.choices(LETTERS, k=100)) for _ in range(2))
    sequences = [first, second, mutate(generator, first, 0.9)]
    found = group_by_identity(sequences, 0.5)
    assert found.numbers[0] == found.numbers[2] != found.numbers[1]
    assert found.tool == "k-mers"
    assert "shared 4-mers" in found.method
    assert "MMseqs2 failed (no memory)" in caplog.text
    with refused("identity.mmseqs-failed", output="no memory"):
        group_by_identity(sequences, 0.5, method="mmseqs")


def test_command_of_mmseqs_and_its_clusters(tmp_path, monkeypatch):
    """A program that records its command line and puts the first two records into one cluster."""
    write_program(
        tmp_path, f'echo "$@" > {tmp_path}/command; printf "0\\t0\\n0\\t2\\n1\\t1\\n" > "$3_cluster.tsv"'
    )  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sequences = [draw_sequence(random.Random(seed), 50) for seed in range(3)]
    found = group_by_identity(sequences, 0.3, 0.7)
    assert found.numbers.tolist() == [0, 1, 0]
    assert found.tool == "MMseqs2"
    command = (tmp_path / "command").read_text()
    assert command.startswith("easy-cluster ")
    for option in ("--min-seq-id 0.3", "-c 0.7 --cov-mode 1", "--cluster-mode 1", "--max-seqs 2000", "-s 7.5"):
        assert f" {option}" in command
    group_by_identity(sequences, 0.5)
    assert " -s " not in (tmp_path / "command").read_text()


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_groups_are_those_of_mmseqs_whatever_their_order():
    generator = random.Random(1)
    founders = ["".join(generator.choices(LETTERS, k=120)) for _ in range(6)]
    sequences = [mutate(generator, founder, 0.8) for founder in founders for _ in range(4)]
    expected = [row // 4 for row in range(24)]
    order = generator.sample(range(24), 24)
    for method in ("mmseqs", "kmers"):
        found = group_by_identity([sequences[row] for row in order], 0.5, method=method)
        assert found.tool == {"mmseqs": "MMseqs2", "kmers": "k-mers"}[method]
        numbers = dict(zip(order, found.numbers.tolist(), strict=True))
        assert all((numbers[i] == numbers[j]) == (expected[i] == expected[j]) for i in numbers for j in numbers)
    peptides = group_by_identity([sequence[:20] for sequence in sequences], 0.5)
    assert "4-mers" in peptides.method


def test_blocks_and_the_limit_of_candidates_do_not_change_the_groups(monkeypatch):
    sequences = draw_families(random.Random(5), families=40)
    expected = group_by_identity(sequences, 0.5, method="kmers").numbers.tolist()
    monkeypatch.setattr(similarity, "_CELLS_PER_BLOCK", 1)  # 16 rows
    monkeypatch.setattr(similarity, "MAX_CANDIDATES", 3)
    groups = group_by_identity(sequences, 0.5, method="kmers")
    assert len(sequences) > 60
    assert groups.numbers.tolist() == expected
    separate_groups(groups, np.arange(len(sequences)), lambda numbers: numbers)
    assert not [pair for pair in list_similar_pairs(sequences, 0.5) if len({*groups.numbers[list(pair)]}) > 1]


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_groups_of_real_proteins_are_those_of_mmseqs(root):
    """At 0.7 all of them. At 0.5 MMseqs2, which corrects scores for the composition, may have a few in addition."""
    records = read_fasta(root / "data/sample/ur90_ur50_sampler.fasta")
    sequences = sorted({record.sequence for record in records if 30 <= len(record.sequence) < 160})[:200]
    for identity, fewest in ((0.7, 1.0), (0.5, 0.95)):
        pairs = []
        for method in ("kmers", "mmseqs"):
            groups = group_by_identity(sequences, identity, method=method)
            separate_groups(groups, np.arange(len(sequences)), lambda numbers: numbers, max_cells=10**11)
            numbers = groups.numbers
            pairs.append({pair for pair in combinations(range(len(numbers)), 2) if len({*numbers[list(pair)]}) == 1})
        ours, theirs = pairs
        assert len(ours) > 40
        assert ours <= theirs
        assert len(ours) >= fewest * len(theirs)
