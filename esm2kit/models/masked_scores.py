"""Predict every residue of a protein while it is masked, and compare with prediction by residue frequency."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from esm2kit.core.errors import check_type
from esm2kit.models.config import check_lm_head
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.sequences.alphabet import MASK_IDX, STANDARD_RESIDUES, TOKENS

# One residue in MASK_STRIDE is masked at a time, about the mask ratio of training.
MASK_STRIDE = 7


class MaskedPredictions(NamedTuple):
    """Predictions for every standard residue of several proteins.

    Args:
        residue_M: the masked residue.
        protein_M: index of its protein.
        log_ratio_M: log of the predicted probability of the residue divided by its frequency.
        is_first_M: whether it is the first residue of its chain.
    """

    residue_M: np.ndarray
    protein_M: np.ndarray
    log_ratio_M: np.ndarray
    is_first_M: np.ndarray

    def mean_ratios(self) -> dict[str, float]:
        """Average the ratio of predicted probability to frequency per residue type, without the chains' first residues.

        Returns:
            Residue type -> geometric mean, in decreasing order.
        """
        inner = ~self.is_first_M
        ratios = {
            residue: float(np.exp(self.log_ratio_M[inner & (self.residue_M == residue)].mean()))
            for residue in STANDARD_RESIDUES
            if (inner & (self.residue_M == residue)).any()
        }
        return dict(sorted(ratios.items(), key=lambda item: -item[1]))

    def most_predictable(self) -> int:
        """Return the index of the protein with the highest mean log ratio, without the chains' first residues."""
        inner = ~self.is_first_M
        sums, counts = (np.bincount(self.protein_M[inner], weights) for weights in (self.log_ratio_M[inner], None))
        return int(np.argmax(sums / np.maximum(counts, 1)))


def compute_masked_log_probs(model: ESM2, sequence: str, every: int = MASK_STRIDE) -> np.ndarray:
    """Compute the log-probabilities of all tokens at each residue while that residue is masked.

    Args:
        model: in evaluation mode.
        sequence: at least one residue.
        every: one residue in this many is masked at a time.

    Returns:
        (T, V) log-probabilities, one row per residue.

    Raises:
        InputError: the model has no LM head.
    """
    batch_size = min(every, len(sequence))
    tokens_BT = tokenize([sequence] * batch_size)
    position_T = torch.arange(len(sequence))
    tokens_BT[position_T % batch_size, position_T + 1] = MASK_IDX
    device = next(model.parameters()).device
    with torch.inference_mode():
        found = model(tokens_BT.to(device))
        if "logits" not in found:
            check_lm_head(model.config)
        logits_TV = found["logits"][position_T % batch_size, position_T + 1]
        return logits_TV.float().log_softmax(-1).cpu().numpy()


def guess_residues(model: ESM2, sequences: Sequence[str], log_share_V: np.ndarray) -> MaskedPredictions:
    """Predict every residue of several proteins while it is masked.

    Args:
        model: in evaluation mode.
        sequences: residues, one string per protein.
        log_share_V: log frequency of each token, see `TrainingSet.unigram`.

    Returns:
        Predictions for the standard residues.
    """
    check_type(model, ESM2, "model", "load one with load_model")
    residues, proteins, log_ratios, is_first = [], [], [], []
    for protein, sequence in enumerate(sequences):
        log_prob_TV = compute_masked_log_probs(model, sequence)
        for position, residue in enumerate(sequence):
            if residue in STANDARD_RESIDUES:
                token = TOKENS.index(residue)
                residues.append(residue)
                proteins.append(protein)
                log_ratios.append(log_prob_TV[position, token] - log_share_V[token])
                is_first.append(position == 0)
    return MaskedPredictions(
        np.array(residues), np.array(proteins), np.array(log_ratios, dtype=float), np.array(is_first, dtype=bool)
    )


def residue_odds(model: ESM2, sequence: str, log_share_V: np.ndarray) -> np.ndarray:
    """Compute the log2 ratio of predicted probability to frequency for all 20 residue types along a protein.

    Args:
        model: in evaluation mode.
        sequence: at least one residue.
        log_share_V: as for `guess_residues`.

    Returns:
        (T, 20) log2 ratios, with columns in the order of STANDARD_RESIDUES.
    """
    check_type(model, ESM2, "model", "load one with load_model")
    tokens = [TOKENS.index(residue) for residue in STANDARD_RESIDUES]
    return (compute_masked_log_probs(model, sequence)[:, tokens] - log_share_V[tokens]) / np.log(2)
