"""Precision at L, L/2 and L/5 against a computation pair by pair, its baseline, and its interval over proteins."""

from typing import NamedTuple

import numpy as np
import pytest

from esm2kit.structure.evaluate import Scored, describe_summary, summarise
from esm2kit.structure.precision import (
    BETWEEN,
    RANGES,
    TOPS,
    PrecisionRow,
    SeparationStatistics,
    compute_precision,
    find_contacts,
    score_protein,
    select_pairs,
)

SIZE = 60


class Case(NamedTuple):
    contacts_TT: np.ndarray
    values_TT: np.ndarray
    missing: tuple[int, ...]


def build_case(seed: int, hits: float, missing: tuple[int, ...] = (3, 40)) -> Case:
    """Random contacts, of which a share `hits` has the highest values."""
    generator = np.random.default_rng(seed)
    upper = np.triu(generator.random((SIZE, SIZE)) < 0.08, 1)
    values = generator.random((SIZE, SIZE)) * 0.5 + 0.5 * upper * (generator.random((SIZE, SIZE)) < hits)
    contacts = (upper | upper.T).astype(float)
    contacts[list(missing)] = np.nan
    contacts[:, list(missing)] = np.nan
    values = np.triu(values, 1)
    return Case(contacts, values + values.T, missing)


def compute_by_pairs(case: Case, low: int, high: int, divisor: int, scores=None) -> tuple[float, int, int]:
    observed = [place for place in range(SIZE) if place not in case.missing]
    pairs = [(i, j) for i in observed for j in observed if low <= j - i <= high]
    ranked = sorted(pairs, key=lambda pair: -(case.values_TT if scores is None else scores)[pair])
    count = min(len(observed) // divisor, len(pairs))
    return float(np.mean([case.contacts_TT[pair] for pair in ranked[:count]])), count, len(pairs)


@pytest.mark.parametrize("hits", [0.0, 0.6, 1.0])
def test_precision_equals_a_count_of_pairs_in_all_ranges(hits: float) -> None:
    case = build_case(1, hits)
    pairs = select_pairs(case.contacts_TT, np.zeros(SIZE, int))
    rows = score_protein(case.values_TT, pairs, SIZE - len(case.missing), np.zeros(SIZE))
    assert [(row.range, row.top) for row in rows] == [(name, top) for name in RANGES for top in TOPS]
    for row in rows:
        low, high = RANGES[row.range]
        expected = compute_by_pairs(case, low, high or SIZE, TOPS[row.top])
        assert (row.precision, row.selected, row.pairs) == pytest.approx(expected)
        assert row.highest == pytest.approx(min(row.contacts / row.selected, 1))
        # all separations were equally frequent: the baseline is the share of contacts
        assert row.baseline == pytest.approx(row.contacts / row.pairs)
        if hits == 1.0:
            assert row.precision == pytest.approx(row.highest), "planted contacts are found"
    if hits == 0.0:
        assert np.mean([row.precision for row in rows]) < 0.3


def test_contacts_are_pairs_closer_than_eight_angstrom() -> None:
    cb_T3 = np.array([[0.0, 0, 0], [7.999, 0, 0], [8.0, 0, 0], [np.nan, 0, 0]])
    expected = [[1, 1, 0, np.nan], [1, 1, 1, np.nan], [0, 1, 1, np.nan], [np.nan] * 4]
    np.testing.assert_array_equal(find_contacts(cb_T3), expected)


def test_pairs_of_equal_score_count_by_their_expected_precision() -> None:
    scores, contacts = np.array([3.0, 2, 2, 2, 1]), np.array([True, False, True, True, False])
    assert compute_precision(scores, contacts, 1) == 1
    assert compute_precision(scores, contacts, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert compute_precision(scores, contacts, 4) == pytest.approx(3 / 4)
    assert compute_precision(scores, contacts, 5) == pytest.approx(3 / 5)
    assert np.isnan(compute_precision(scores, contacts, 0))
    shuffled = np.random.default_rng(0).permutation(5)
    assert compute_precision(scores[shuffled], contacts[shuffled], 2) == pytest.approx((1 + 2 / 3) / 2)


def test_pairs_between_chains_are_a_range_of_their_own() -> None:
    case = build_case(2, 0.5, missing=())
    chain_T = np.repeat([0, 1], [35, 25])
    pairs = select_pairs(case.contacts_TT, chain_T)
    assert len(pairs[BETWEEN].contact_M) == 35 * 25
    for name, found in pairs.items():
        assert ((chain_T[found.first_M] == chain_T[found.second_M]) == (name != BETWEEN)).all()
    assert select_pairs(case.contacts_TT, np.zeros(SIZE, int)).keys() == RANGES.keys()


def test_the_baseline_learns_from_the_other_proteins_only() -> None:
    """Contacts at separations 28 to 32 in all proteins but one, which has them at 48 to 52."""

    def build(middle: int) -> np.ndarray:
        separation_TT = np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))
        return (np.abs(separation_TT - middle) <= 2).astype(float)

    proteins = [select_pairs(build(middle), np.zeros(SIZE, int)) for middle in [30] * 20 + [50]]
    statistics = SeparationStatistics(proteins)
    usual, unusual = statistics.score_without(proteins[0]), statistics.score_without(proteins[-1])
    assert 29 <= usual[6:].argmax() + 6 <= 31  # nearer pairs are in no range
    assert 29 <= unusual[6:].argmax() + 6 <= 31
    # at separation 30, of the 20 others: the pairs at 29 to 31, and 100 that decrease with the separation
    pairs = 20 * sum(SIZE - separation for separation in (29, 30, 31))
    contacts = 20 * sum(SIZE - separation for separation in range(28, 33))
    inverse = 20 * sum((SIZE - separation) / separation for separation in range(6, SIZE))
    assert unusual[30] == pytest.approx((pairs + 100 / 30 * contacts / inverse) / (pairs + 100))
    scores = np.zeros((SIZE, SIZE))
    for protein, frequency_S, expected in ((proteins[0], usual, 1), (proteins[-1], unusual, 0)):
        rows = {(row.range, row.top): row for row in score_protein(scores, protein, SIZE, frequency_S)}
        assert rows["long", "L/5"].baseline == expected
    # a single protein has no others, and near pairs come first
    alone = SeparationStatistics(proteins[:1]).score_without(proteins[0])
    assert (np.diff(alone[1:]) < 0).all()


def build_scored(precisions: list[float], baselines: list[float]) -> list[Scored]:
    return [
        Scored(None, None, [PrecisionRow("long", "L", 50, 900, 40, precision, baseline, 0.8)])
        for precision, baseline in zip(precisions, baselines, strict=True)
    ]


def test_means_have_intervals_over_proteins_and_a_verdict() -> None:
    generator = np.random.default_rng(0)
    precisions, baselines = generator.uniform(0.3, 0.7, 40), generator.uniform(0.0, 0.1, 40)
    (found,) = summarise(build_scored(precisions, baselines))
    assert (found["proteins"], found["highest"]) == (40, pytest.approx(0.8))
    for name, values in {"precision": precisions, "baseline": baselines, "difference": precisions - baselines}.items():
        assert found[name]["value"] == pytest.approx(values.mean())
        width = 1.96 * values.std() / np.sqrt(40)
        assert found[name]["low"] == pytest.approx(values.mean() - width, abs=0.2 * width)
        assert found[name]["high"] == pytest.approx(values.mean() + width, abs=0.2 * width)
    text = describe_summary([found])
    assert f"{precisions.mean():.3f} [" in text
    assert f"over 40 proteins, better than {baselines.mean():.3f} by sequence separation alone" in text
    assert "worse than" in describe_summary(summarise(build_scored(baselines, precisions)))
    equal = build_scored(precisions, generator.permutation(precisions))
    assert "not distinguishable from" in describe_summary(summarise(equal))
    (single,) = summarise(build_scored([0.5], [0.1]))
    assert (single["precision"]["low"], single["difference"]["high"]) == (None, None)
    assert "0.500 over 1 protein, compared with 0.100" in describe_summary([single])


def test_structures_without_contacts_have_no_verdict_about_the_model() -> None:
    row = PrecisionRow("long", "L", 50, 900, 0, 0.0, 0.0, 0.0)
    summary = summarise([Scored(None, None, [row])] * 3)
    assert describe_summary(summary) == (
        "no long-range contacts in 3 structures, so that their precision is 0 whatever the model predicts"
    )
    # one protein with contacts is enough for a comparison
    mixed = summarise([Scored(None, None, [row]), *build_scored([0.5, 0.6], [0.1, 0.1])])
    assert "by sequence separation alone" in describe_summary(mixed)
