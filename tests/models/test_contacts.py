"""Residue pairs: the contact head against fair-esm; what distance and letters tell against least squares."""

import esm
import numpy as np
import pytest
import torch
from support.errors import refused

from esm2kit.models import contacts
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.sequences.alphabet import encode

CONFIG = ESM2Config(2, 32, 4)
SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKA"


@pytest.fixture
def model() -> ESM2:
    return ESM2.initialised(CONFIG, seed=0).eval()


def fit_head(model: ESM2) -> None:
    with torch.no_grad():
        model.contact_head.regression.bias.fill_(-3.4)
        model.contact_head.regression.weight.mul_(40)


@torch.no_grad()
def test_a_fitted_heads_map_is_fair_esms(model: ESM2) -> None:
    fit_head(model)
    theirs = esm.ESM2(2, 32, 4).eval()
    theirs.load_state_dict(model.state_dict())
    expected = theirs.predict_contacts(tokenize([SEQUENCE]))[0].numpy()
    found = contacts.pair_map(model, SEQUENCE)
    assert found.fitted
    np.testing.assert_allclose(found.values_TT, expected, atol=1e-5)
    first, second = np.triu_indices(len(SEQUENCE), 6)
    total = expected[first, second].sum()
    told = f"expects {total:,.0f} contacts of residues 6 or more apart, {total / len(SEQUENCE):.2f} a residue"
    assert told in found.describe()


def test_a_head_that_was_never_fitted_is_known_by_its_bias(model: ESM2) -> None:
    assert not contacts.has_fitted_head(model)
    found = contacts.pair_map(model, SEQUENCE)
    with torch.no_grad():
        probability_TT = model(tokenize([SEQUENCE]), return_contacts=True)["contacts"][0].numpy()
    np.testing.assert_allclose(found.head_range, (probability_TT.min(), probability_TT.max()), rtol=1e-5)
    lowest, highest = found.head_range
    told = found.describe(found)
    assert f"No contact head was fitted to this model: its own gives every pair between {lowest:.0%} and" in told
    assert f"Untrained, the same shape: distance {found.explained['distance']:.0%}" in told
    assert "Untrained" not in found.describe()
    assert highest < 1
    fit_head(model)
    assert contacts.has_fitted_head(model)


def test_coupling_has_no_row_and_no_column_left_to_explain() -> None:
    generator = torch.Generator().manual_seed(0)
    attentions_LHTT = torch.rand(2, 3, 9, 9, generator=generator, dtype=torch.float64).softmax(-1)
    found = contacts.compute_coupling(attentions_LHTT)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-9)
    by_hand = np.zeros((9, 9))
    for map_TT in attentions_LHTT.flatten(0, 1).numpy():
        symmetric = (map_TT + map_TT.T) / 2
        by_hand += symmetric - np.outer(symmetric.sum(1), symmetric.sum(0)) / symmetric.sum()
    np.testing.assert_allclose(found, by_hand / 6 * 9, atol=1e-9)
    even = contacts.compute_coupling(torch.full((1, 1, 9, 9), 1 / 9))
    np.testing.assert_allclose(even, 0, atol=1e-6)


def test_what_distance_and_letters_tell_is_least_squares(model: ESM2) -> None:
    found = contacts.pair_map(model, SEQUENCE)
    letters_T = encode(SEQUENCE).astype(int)
    first, second = np.triu_indices(len(SEQUENCE), 1)
    values = found.values_TT[first, second].astype(float)
    kinds = [f"{min(pair)}-{max(pair)}" for pair in zip(letters_T[first], letters_T[second], strict=True)]
    designs = [
        np.equal.outer(np.asarray(labels), np.unique(labels)).astype(float) for labels in (second - first, kinds)
    ]
    spread = ((values - values.mean()) ** 2).sum()
    for name, design in {"distance": designs[0], "residues": designs[1], "both": np.hstack(designs)}.items():
        fit = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        np.testing.assert_allclose(found.explained[name], 1 - ((values - fit) ** 2).sum() / spread, atol=2e-3)
    np.testing.assert_allclose(found.expected_TT[first, second], fit, atol=0.15 * values.std())
    np.testing.assert_array_equal(found.expected_TT, found.expected_TT.T)
    for apart in (1, 7, len(SEQUENCE) - 1):
        np.testing.assert_allclose(found.by_separation[apart], values[second - first == apart].mean(), rtol=1e-5)


def test_a_map_of_distance_alone_is_told_by_distance_alone() -> None:
    letters_T = np.random.default_rng(0).integers(4, 24, 60)
    apart_TT = np.abs(np.subtract.outer(np.arange(60), np.arange(60)))
    expected_TT, explained = contacts._fit_baseline(np.exp(-apart_TT / 9.0), letters_T)
    assert explained["distance"] == pytest.approx(1)
    assert explained["both"] == pytest.approx(1)
    assert explained["residues"] < 0.3
    upper = np.triu_indices(60, 1)
    np.testing.assert_allclose(expected_TT[upper], np.exp(-apart_TT / 9.0)[upper], atol=1e-6)


def test_long_and_short_proteins(model: ESM2) -> None:
    assert contacts.pair_map(model, "MKTAYIAK" * 80).values_TT.shape == (512, 512)
    with refused("contacts.too-short", found=7):
        contacts.pair_map(model, "MKTAYIA")
