"""Pair maps: the contact head equals fair-esm's, and explained variances equal a least-squares fit."""

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
def test_a_fitted_contact_head_equals_fair_esm(model: ESM2) -> None:
    fit_head(model)
    reference = esm.ESM2(2, 32, 4).eval()
    reference.load_state_dict(model.state_dict())
    expected = reference.predict_contacts(tokenize([SEQUENCE]))[0].numpy()
    found = contacts.pair_map(model, SEQUENCE)
    assert found.fitted
    np.testing.assert_allclose(found.values_TT, expected, atol=1e-5)
    first, second = np.triu_indices(len(SEQUENCE), 6)
    total = expected[first, second].sum()
    numbers = f"{total:,.0f} contacts between residues at least 6 apart, {total / len(SEQUENCE):.2f} per residue"
    assert numbers in found.describe()


def test_a_contact_head_that_was_never_fitted_is_recognised_by_its_bias(model: ESM2) -> None:
    assert not contacts.has_fitted_head(model)
    found = contacts.pair_map(model, SEQUENCE)
    with torch.no_grad():
        probability_TT = model(tokenize([SEQUENCE]), return_contacts=True)["contacts"][0].numpy()
    np.testing.assert_allclose(found.head_range, (probability_TT.min(), probability_TT.max()), rtol=1e-5)
    lowest, highest = found.head_range
    text = found.describe(found)
    assert f"was never fitted: it predicts {lowest:.0%} to {highest:.0%} for every pair" in text
    assert f"an untrained model of the same architecture, separation explains {found.explained['distance']:.0%}" in text
    assert "untrained" not in found.describe()
    assert highest < 1
    fit_head(model)
    assert contacts.has_fitted_head(model)


def test_coupling_equals_the_average_product_correction() -> None:
    generator = torch.Generator().manual_seed(0)
    attentions_LHTT = torch.rand(2, 3, 9, 9, generator=generator, dtype=torch.float64).softmax(-1)
    found = contacts.compute_coupling(attentions_LHTT)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-9)
    expected = np.zeros((9, 9))
    for map_TT in attentions_LHTT.flatten(0, 1).numpy():
        symmetric = (map_TT + map_TT.T) / 2
        expected += symmetric - np.outer(symmetric.sum(1), symmetric.sum(0)) / symmetric.sum()
    np.testing.assert_allclose(found, expected / 6 * 9, atol=1e-9)
    uniform = contacts.compute_coupling(torch.full((1, 1, 9, 9), 1 / 9))
    np.testing.assert_allclose(uniform, 0, atol=1e-6)


def test_explained_variances_equal_a_least_squares_fit(model: ESM2) -> None:
    found = contacts.pair_map(model, SEQUENCE)
    tokens_T = encode(SEQUENCE).astype(int)
    first, second = np.triu_indices(len(SEQUENCE), 1)
    values = found.values_TT[first, second].astype(float)
    kinds = [f"{min(pair)}-{max(pair)}" for pair in zip(tokens_T[first], tokens_T[second], strict=True)]
    designs = [
        np.equal.outer(np.asarray(labels), np.unique(labels)).astype(float) for labels in (second - first, kinds)
    ]
    spread = ((values - values.mean()) ** 2).sum()
    for name, design in {"distance": designs[0], "residues": designs[1], "both": np.hstack(designs)}.items():
        fit = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        np.testing.assert_allclose(found.explained[name], 1 - ((values - fit) ** 2).sum() / spread, atol=2e-3)
    np.testing.assert_allclose(found.expected_TT[first, second], fit, atol=0.15 * values.std())
    np.testing.assert_array_equal(found.expected_TT, found.expected_TT.T)
    for offset in (1, 7, len(SEQUENCE) - 1):
        np.testing.assert_allclose(found.by_separation[offset], values[second - first == offset].mean(), rtol=1e-5)


def test_a_map_that_depends_on_distance_is_explained_by_distance() -> None:
    tokens_T = np.random.default_rng(0).integers(4, 24, 60)
    separation_TT = np.abs(np.subtract.outer(np.arange(60), np.arange(60)))
    expected_TT, explained = contacts._fit_baseline(np.exp(-separation_TT / 9.0), tokens_T)
    assert explained["distance"] == pytest.approx(1)
    assert explained["both"] == pytest.approx(1)
    assert explained["residues"] < 0.3
    upper = np.triu_indices(60, 1)
    np.testing.assert_allclose(expected_TT[upper], np.exp(-separation_TT / 9.0)[upper], atol=1e-6)


def test_long_and_short_proteins(model: ESM2) -> None:
    assert contacts.pair_map(model, "MKTAYIAK" * 80).values_TT.shape == (512, 512)
    with refused("contacts.too-short", found=7):
        contacts.pair_map(model, "MKTAYIA")
