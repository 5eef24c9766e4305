"""MaskedPredictions for hidden residues: hidden indeed, one at a time where asked, and held against frequency."""

import numpy as np
import pytest
import torch

from esm2kit.models import masked_scores as guesses
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.sequences.alphabet import MASK_IDX, STANDARD_RESIDUES, TOKENS, VOCAB_SIZE

SEQUENCE = "MKVLAAGIWCMKVLAAGIWXC"


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.initialised(ESM2Config(2, 32, 4), 0).eval()


class Frequencies(torch.nn.Module):
    """A model that knows nothing but how frequent residues are."""

    def __init__(self, log_share_V: np.ndarray) -> None:
        super().__init__()
        self.log_share_V = torch.nn.Parameter(torch.from_numpy(log_share_V))

    def forward(self, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.log_share_V.expand(*tokens_BT.shape, -1)}


def shares() -> np.ndarray:
    return np.log(np.random.default_rng(0).dirichlet(np.ones(VOCAB_SIZE)))


def test_one_at_a_time_is_what_a_loop_over_the_residues_gives(model: ESM2) -> None:
    told_TV = guesses.compute_masked_log_probs(model, SEQUENCE, every=len(SEQUENCE))
    for place in range(len(SEQUENCE)):
        tokens_BT = tokenize([SEQUENCE])
        tokens_BT[0, place + 1] = MASK_IDX
        with torch.inference_mode():
            expected_V = model(tokens_BT)["logits"][0, place + 1].log_softmax(-1)
        np.testing.assert_allclose(told_TV[place], expected_V, atol=1e-5)


def test_what_is_hidden_leaves_no_trace_in_its_own_guess(model: ESM2) -> None:
    place = 4
    other = f"{SEQUENCE[:place]}W{SEQUENCE[place + 1 :]}"
    here, there = (guesses.compute_masked_log_probs(model, sequence) for sequence in (SEQUENCE, other))
    np.testing.assert_allclose(here[place], there[place], atol=1e-6)
    assert np.abs(here[place + 1] - there[place + 1]).max() > 1e-4, "its neighbours do see it"


def test_frequencies_alone_gain_nothing() -> None:
    log_share_V = shares()
    found = guesses.guess_residues(Frequencies(log_share_V), [SEQUENCE, "MK"], log_share_V)
    assert "".join(found.residue_M) == SEQUENCE.replace("X", "") + "MK"
    assert found.protein_M.tolist() == [0] * 20 + [1] * 2
    assert found.is_first_M.sum() == 2
    np.testing.assert_allclose(list(found.mean_ratios().values()), 1, atol=1e-5)
    assert set(found.mean_ratios()) == set("KVLAGIWCM"), "the M inside the chain counts, the first does not"
    np.testing.assert_allclose(guesses.residue_odds(Frequencies(log_share_V), SEQUENCE, log_share_V), 0, atol=1e-5)


def test_a_planted_gain_is_found_in_its_letter_and_its_protein() -> None:
    log_share_V = shares()
    log_ratio_M = np.log([5.0, 2.0, 2.0, 1.0, 0.5])
    found = guesses.MaskedPredictions(
        np.array(list("MKKAA")), np.array([0, 0, 1, 1, 0]), log_ratio_M, np.array([True, False, False, False, False])
    )
    assert found.mean_ratios() == pytest.approx({"K": 2.0, "A": 0.5**0.5})
    assert list(found.mean_ratios()) == ["K", "A"]
    assert found.most_predictable() == 1
    odds_TL = guesses.residue_odds(Frequencies(log_share_V + np.log(4)), "MK", log_share_V)
    assert odds_TL.shape == (2, len(STANDARD_RESIDUES))
    np.testing.assert_allclose(odds_TL, 0, atol=1e-5)  # a constant falls away
    sharper = log_share_V.copy()
    sharper[TOKENS.index("K")] += np.log(8)
    odds_TL = guesses.residue_odds(Frequencies(sharper), "MK", log_share_V)
    raised = odds_TL[0, STANDARD_RESIDUES.index("K")] - odds_TL[0, STANDARD_RESIDUES.index("A")]
    assert raised == pytest.approx(3), "eight times likelier against the others, in powers of two"
