"""What a model guesses for residues it cannot see: each hidden once, and held against guessing by frequency."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.sequences.alphabet import MASK_IDX, STANDARD_RESIDUES, TOKENS

# One in so many is hidden at a time, about as many as in training.
MASK_STRIDE = 7


class MaskedPredictions(NamedTuple):
    """MaskedPredictions for every residue of some proteins that is one of the twenty.

    Args:
        residue_M: the residue that was hidden.
        protein_M: the number of its protein.
        log_ratio_M: log of how many times likelier the model makes it than its frequency does.
        is_first_M: whether it is the first of its chain.
    """

    residue_M: np.ndarray
    protein_M: np.ndarray
    log_ratio_M: np.ndarray
    is_first_M: np.ndarray

    def mean_ratios(self) -> dict[str, float]:
        """Letter -> the geometric mean over its residues, the first of every chain left out, the highest first."""
        inner = ~self.is_first_M
        times = {
            letter: float(np.exp(self.log_ratio_M[inner & (self.residue_M == letter)].mean()))
            for letter in STANDARD_RESIDUES
            if (inner & (self.residue_M == letter)).any()
        }
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    def most_predictable(self) -> int:
        """The protein whose residues gain most, on average and without the first."""
        inner = ~self.is_first_M
        sums, counts = (np.bincount(self.protein_M[inner], weights=each) for each in (self.log_ratio_M[inner], None))
        return int(np.argmax(sums / np.maximum(counts, 1)))


def compute_masked_log_probs(model: ESM2, sequence: str, every: int = MASK_STRIDE) -> np.ndarray:
    """Log-probabilities of the tokens at each residue while that residue is hidden.

    Args:
        model: in evaluation mode.
        sequence: of at least one residue.
        every: one residue in so many is hidden at a time.
    Returns: (T, V), a row a residue.
    """
    turns = min(every, len(sequence))
    tokens_BT = tokenize([sequence] * turns)
    place_T = torch.arange(len(sequence))
    tokens_BT[place_T % turns, place_T + 1] = MASK_IDX
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits_TV = model(tokens_BT.to(device))["logits"][place_T % turns, place_T + 1]
        return logits_TV.float().log_softmax(-1).cpu().numpy()


def guess_residues(model: ESM2, sequences: Sequence[str], log_share_V: np.ndarray) -> MaskedPredictions:
    """Hide every residue once.

    Args:
        model: in evaluation mode.
        sequences: of the proteins.
        log_share_V: log of each token's frequency, see `TrainingSet.unigram`.
    """
    letters, proteins, gains, first = [], [], [], []
    for protein, sequence in enumerate(sequences):
        told_TV = compute_masked_log_probs(model, sequence)
        for place, letter in enumerate(sequence):
            if letter in STANDARD_RESIDUES:
                token = TOKENS.index(letter)
                letters.append(letter)
                proteins.append(protein)
                gains.append(told_TV[place, token] - log_share_V[token])
                first.append(place == 0)
    return MaskedPredictions(
        np.array(letters), np.array(proteins), np.array(gains, dtype=float), np.array(first, dtype=bool)
    )


def residue_odds(model: ESM2, sequence: str, log_share_V: np.ndarray) -> np.ndarray:
    """(T, 20) binary logarithm of how many times likelier each of the twenty is than by frequency, residue by residue.

    Args:
        model: in evaluation mode.
        sequence: the protein.
        log_share_V: as for `guess_residues`.
    """
    tokens = [TOKENS.index(letter) for letter in STANDARD_RESIDUES]
    return (compute_masked_log_probs(model, sequence)[:, tokens] - log_share_V[tokens]) / np.log(2)
