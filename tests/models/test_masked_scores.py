"""Predictions of masked residues, compared with a loop over residues and with a model that knows only frequencies."""

import numpy as np
import pytest
import torch

from esm2kit.models import masked_scores
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.sequences.alphabet import MASK_IDX, STANDARD_RESIDUES, TOKENS, VOCAB_SIZE

SEQUENCE = "MKVLAAGIWCMKVLAAGIWXC"


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.initialised(ESM2Config(2, 32, 4), 0).eval()


class Frequencies(ESM2):
    """A model that predicts residue frequencies at every position."""

    def __init__(self, log_share_V: np.ndarray) -> None:
        torch.nn.Module.__init__(self)
        self.log_share_V = torch.nn.Parameter(torch.from_numpy(log_share_V))

    def forward(self, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.log_share_V.expand(*tokens_BT.shape, -1)}


def sample_log_shares() -> np.ndarray:
    return np.log(np.random.default_rng(0).dirichlet(np.ones(VOCAB_SIZE)))


def test_masking_one_residue_at_a_time_equals_a_loop(model: ESM2) -> None:
    log_prob_TV = masked_scores.compute_masked_log_probs(model, SEQUENCE, every=len(SEQUENCE))
    for position in range(len(SEQUENCE)):
        tokens_BT = tokenize([SEQUENCE])
        tokens_BT[0, position + 1] = MASK_IDX
        with torch.inference_mode():
            expected_V = model(tokens_BT)["logits"][0, position + 1].log_softmax(-1)
        np.testing.assert_allclose(log_prob_TV[position], expected_V, atol=1e-5)


def test_a_masked_residue_does_not_influence_its_own_prediction(model: ESM2) -> None:
    position = 4
    mutated = f"{SEQUENCE[:position]}W{SEQUENCE[position + 1 :]}"
    first_TV, second_TV = (masked_scores.compute_masked_log_probs(model, sequence) for sequence in (SEQUENCE, mutated))
    np.testing.assert_allclose(first_TV[position], second_TV[position], atol=1e-6)
    assert np.abs(first_TV[position + 1] - second_TV[position + 1]).max() > 1e-4, "predictions of its neighbours change"


def test_a_model_of_frequencies_has_a_ratio_of_one() -> None:
    log_share_V = sample_log_shares()
    found = masked_scores.guess_residues(Frequencies(log_share_V), [SEQUENCE, "MK"], log_share_V)
    assert "".join(found.residue_M) == SEQUENCE.replace("X", "") + "MK"
    assert found.protein_M.tolist() == [0] * 20 + [1] * 2
    assert found.is_first_M.sum() == 2
    np.testing.assert_allclose(list(found.mean_ratios().values()), 1, atol=1e-5)
    assert set(found.mean_ratios()) == set("KVLAGIWCM"), "an M within the chain counts, the first one does not"
    np.testing.assert_allclose(
        masked_scores.residue_odds(Frequencies(log_share_V), SEQUENCE, log_share_V), 0, atol=1e-5
    )


def test_known_ratios_are_averaged_per_residue_type_and_protein() -> None:
    log_share_V = sample_log_shares()
    log_ratio_M = np.log([5.0, 2.0, 2.0, 1.0, 0.5])
    found = masked_scores.MaskedPredictions(
        np.array(list("MKKAA")), np.array([0, 0, 1, 1, 0]), log_ratio_M, np.array([True, False, False, False, False])
    )
    assert found.mean_ratios() == pytest.approx({"K": 2.0, "A": 0.5**0.5})
    assert list(found.mean_ratios()) == ["K", "A"]
    assert found.most_predictable() == 1
    odds_TL = masked_scores.residue_odds(Frequencies(log_share_V + np.log(4)), "MK", log_share_V)
    assert odds_TL.shape == (2, len(STANDARD_RESIDUES))
    np.testing.assert_allclose(odds_TL, 0, atol=1e-5)  # the softmax removes a constant
    sharper = log_share_V.copy()
    sharper[TOKENS.index("K")] += np.log(8)
    odds_TL = masked_scores.residue_odds(Frequencies(sharper), "MK", log_share_V)
    raised = odds_TL[0, STANDARD_RESIDUES.index("K")] - odds_TL[0, STANDARD_RESIDUES.index("A")]
    assert raised == pytest.approx(3), "eight times as likely relative to the others, in log2"
