"""Local alignments: columns counted from Biopython's text, MMseqs2's alignments, and what makes proteins similar."""

import random
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from support.families import LETTERS, draw_relatives, measure_identity, mutate

from esm2kit.sequences.alignment import Alignment, Criterion, align_locally, align_ungapped, are_similar
from esm2kit.sequences.fasta import read_fasta


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_counts_are_those_of_the_columns(seed):
    generator = random.Random(seed)
    first, second = draw_relatives(generator, 2)[:2]
    found = align_locally(first, second)
    identities, columns, covered = measure_identity(first, second)
    assert (found.identities, found.columns, found.covered) == (identities, columns, covered)
    assert align_locally(second, first) == found
    assert align_locally(first, second, at_least=found.score) == found
    assert align_locally(first, second, at_least=found.score + 1) is None


def test_worked_example():
    """A gap of two residues costs 12; of the shorter sequence all residues are covered."""
    found = align_locally("MKVLAGSTREWWHQPNDF", "MKVLAGSWWHQPNDF".replace("SWW", "STWW"))
    assert (found.identities, found.columns, found.covered, found.gaps) == (16, 18, 16, 1)
    assert found.identity == pytest.approx(16 / 18)
    assert found.score == 5 + 5 + 4 + 4 + 4 + 6 + 4 + 5 - 12 + 11 + 11 + 8 + 5 + 7 + 6 + 6 + 6
    assert align_locally("AAAA", "WWWW") is None
    assert align_locally("UOJK", "UOJK").identities == 4, "residues that BLOSUM62 does not have"
    assert align_ungapped("MKVL", "MKWL").identity == 0.75


def test_number_of_equal_residues_that_are_required():
    criterion = Criterion(identity=0.5, coverage=0.8, num_sequences=100)
    assert [criterion.count_required(residues) for residues in (1, 10, 15, 100, 101)] == [1, 4, 6, 40, 41]
    assert Criterion(0.3, 0.8, 100).count_required(100) == 24


def test_each_part_of_the_criterion_decides():
    criterion = Criterion(identity=0.5, coverage=0.8, num_sequences=1000)
    fine = Alignment(score=250, identities=50, columns=100, covered=80, gaps=0)
    assert criterion.is_met(fine, 100, 300)
    assert not criterion.is_met(fine._replace(identities=49), 100, 300)
    assert not criterion.is_met(fine._replace(covered=79), 100, 300)
    assert not criterion.is_met(fine._replace(score=49), 100, 300)
    expected = 1000 * 60 * binom.sf(7, 16, 0.0587)
    short = Alignment(score=40, identities=8, columns=16, covered=16, gaps=0)
    assert criterion.count_expected(short, 60) == pytest.approx(expected)
    assert expected > 0.01, "1,000 random proteins have such an alignment by chance"
    assert not criterion.is_met(short, 20, 40)
    assert Criterion(0.5, 0.8, 2).is_met(short, 20, 40)
    gapped = criterion.count_expected(short._replace(gaps=2), 60)
    assert gapped == pytest.approx(expected * 32**2)


@pytest.mark.parametrize("identity", [0.3, 0.5])
def test_random_proteins_are_hardly_ever_similar(identity):
    """At most MAX_EXPECTED per protein in the mean, as the criterion promises, whatever their lengths."""
    generator = random.Random(0)
    sequences = ["".join(generator.choices(LETTERS, k=generator.choice([9, 15, 30, 60]))) for _ in range(160)]
    criterion = Criterion(identity, 0.8, len(sequences))
    similar = sum(
        are_similar(first, second, criterion) for place, first in enumerate(sequences) for second in sequences[:place]
    )
    assert similar <= 0.05 * len(sequences)
    relatives = [(sequence, mutate(generator, sequence, 0.9)) for sequence in sequences if len(sequence) >= 30]
    assert all(are_similar(*pair, criterion) for pair in relatives)


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_identity_and_coverage_are_those_of_mmseqs(root, tmp_path):
    """Of real relatives; MMseqs2 corrects scores for the composition unless it is told not to."""
    records = list(read_fasta(root / "data/sample/ur90_ur50_sampler.fasta"))
    sequences = sorted({record.sequence for record in records if len(record.sequence) >= 60})[::6]
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{row}\n{sequence}\n" for row, sequence in enumerate(sequences)))
    command = ["mmseqs", "easy-search", fasta, fasta, tmp_path / "out.tsv", tmp_path / "tmp", "-v", "1"]
    command += ["--comp-bias-corr", "0", "--alignment-mode", "3", "--threads", "1", "--mask", "0"]
    command += ["--format-output", "query,target,fident,qcov,tcov"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    differences = []
    for line in (tmp_path / "out.tsv").read_text().splitlines():
        query, target, identity, qcov, tcov = line.split("\t")
        if int(query) < int(target):
            found = align_locally(sequences[int(query)], sequences[int(target)])
            covered = found.covered / min(len(sequences[int(query)]), len(sequences[int(target)]))
            differences.append([found.identity - float(identity), covered - max(float(qcov), float(tcov))])
    assert len(differences) > 50
    assert np.quantile(np.abs(differences), 0.9, axis=0) == pytest.approx([0, 0], abs=0.002)
