"""Maps of a protein's residue pairs: contact probabilities, or attention if the contact head was never fitted.

Both are compared with a baseline that knows nothing of the structure: an additive model of the separation along the
chain and the two residue types.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError, check_type
from esm2kit.models.esm2 import ESM2, symmetrise_with_apc, tokenize
from esm2kit.sequences.alphabet import encode

# Attention maps have layers x heads x residues x residues values: 0.7 GB for the 650M model at this length.
MAX_RESIDUES = 512
BACKFITTING_ROUNDS = 6
# Pairs with a smaller separation are in contact because they are neighbours along the chain.
MIN_SEPARATION = 6


class PairMap(NamedTuple):
    """A value per residue pair of one protein, with a baseline.

    Args:
        values_TT: contact probabilities if `fitted`, else coupling: the attention of each pair, symmetrised and
            corrected by the average product, as the mean over layers and heads, in multiples of uniform attention.
        expected_TT: the same pairs as predicted from sequence separation and the two residue types.
        explained: share of the pairs' variance that `distance`, `residues` and `both` explain.
        fitted: whether the model's contact head was fitted to structures.
        head_range: minimum and maximum contact probability of the head, fitted or not.
    """

    values_TT: np.ndarray
    expected_TT: np.ndarray
    explained: dict[str, float]
    fitted: bool
    head_range: tuple[float, float]

    @property
    def by_separation(self) -> np.ndarray:
        """(T,) mean value of the pairs at separation 0, 1, 2 ... residues; NaN at separation 0."""
        size = len(self.values_TT)
        return np.array([np.nan, *(np.diagonal(self.values_TT, offset).mean() for offset in range(1, size))])

    def describe(self, untrained: "PairMap | None" = None) -> str:
        """Describe the map in sentences, for a caption.

        Args:
            untrained: the map of the same protein by an untrained model of the same architecture.

        Returns:
            Several sentences in one line.
        """
        if self.fitted:
            first, second = np.triu_indices(len(self.values_TT), MIN_SEPARATION)
            expected = self.values_TT[first, second].sum()
            return (
                f"The contact head predicts {expected:,.0f} contacts between residues at least {MIN_SEPARATION} apart, "
                f"{expected / len(self.values_TT):.2f} per residue. {self._describe_variance()}"
            )
        lowest, highest = self.head_range
        comparison = ""
        if untrained:
            shares = untrained.explained
            comparison = (
                f" For an untrained model of the same architecture, separation explains {shares['distance']:.0%} and "
                f"residue types {shares['residues']:.0%}."
            )
        return (
            f"The contact head of this model was never fitted: it predicts {lowest:.0%} to {highest:.0%} for every "
            f"pair. The plot therefore shows attention. {self._describe_variance()} Without a structure, the share of "
            f"true contacts in the remaining variance is unknown.{comparison}"
        )

    def _describe_variance(self) -> str:
        explained = self.explained
        return (
            f"Separation along the chain explains {explained['distance']:.0%} of the variance between pairs, the two "
            f"residue types {explained['residues']:.0%}, both together {explained['both']:.0%}."
        )


def has_fitted_head(model: ESM2) -> bool:
    """Check whether a model's contact head was fitted.

    Args:
        model: any ESM-2.

    Returns:
        False if the bias is exactly zero, as in untrained models and in files without a contact head.
    """
    return bool(model.contact_head.regression.bias.detach().ne(0).any())


@torch.inference_mode()
def pair_map(model: ESM2, sequence: str) -> PairMap:
    """Compute a model's map of the residue pairs of a protein.

    Args:
        model: in evaluation mode, on the CPU.
        sequence: residues; only the first MAX_RESIDUES are used.

    Returns:
        Contact probabilities if the model's contact head was fitted, else attention couplings.

    Raises:
        InputError: the sequence has fewer than eight residues.

    Source:
        Rao et al. 2021, 10.1101/2020.12.15.422761: contacts by logistic regression on attention maps.
    """
    check_type(model, ESM2, "model", "load one with load_model")
    sequence = sequence[:MAX_RESIDUES]
    if len(sequence) < 8:
        raise InputError(
            f"a pair map requires at least 8 residues, found {len(sequence)}. Choose a longer protein.",
            code="contacts.too-short",
            found=len(sequence),
        )
    tokens_1T = tokenize([sequence])
    found = model(tokens_1T, need_head_weights=True)
    probability_TT = model.contact_head(tokens_1T, found["attentions"])[0].numpy()
    fitted = has_fitted_head(model)
    values_TT = probability_TT if fitted else compute_coupling(found["attentions"][0, ..., 1:-1, 1:-1])
    expected_TT, explained = _fit_baseline(values_TT, encode(sequence).astype(np.int64))
    head_range = (float(probability_TT.min()), float(probability_TT.max()))
    return PairMap(values_TT, expected_TT, explained, fitted, head_range)


def compute_coupling(attentions_LHTT: Tensor) -> np.ndarray:
    """Average attention maps to one coupling per residue pair.

    Args:
        attentions_LHTT: attention weights of the residues per layer and head, without BOS and EOS.

    Returns:
        (T, T) couplings in multiples of uniform attention.
    """
    maps = symmetrise_with_apc(attentions_LHTT.flatten(0, 1)) / 2
    return (maps.mean(0) * maps.shape[-1]).numpy()


def _fit_baseline(values_TT: np.ndarray, tokens_T: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Fit one term per separation plus one per pair of residue types; returns the fit and the explained variances."""
    first, second = np.triu_indices(len(tokens_T), 1)
    values = values_TT[first, second].astype(np.float64)
    low, high = np.minimum(tokens_T[first], tokens_T[second]), np.maximum(tokens_T[first], tokens_T[second])
    groups = {"distance": second - first, "residues": low * (tokens_T.max() + 1) + high}
    chosen = {"distance": ("distance",), "residues": ("residues",), "both": ("distance", "residues")}
    spread = max(((values - values.mean()) ** 2).sum(), np.finfo(float).tiny)
    explained = {}
    for name, parts in chosen.items():
        fit = _fit_additive(values, [groups[part] for part in parts])
        explained[name] = float(1 - ((values - fit) ** 2).sum() / spread)
    expected_TT = np.full_like(values_TT, values.mean(), dtype=np.float64)
    expected_TT[first, second] = expected_TT[second, first] = fit
    return expected_TT, explained


def _fit_additive(values_M: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Fit an additive model with one categorical term per group by backfitting."""
    mean = values_M.mean()
    terms = [np.zeros_like(values_M) for _ in groups]
    for _ in range(BACKFITTING_ROUNDS):
        for index, group_M in enumerate(groups):
            residuals = values_M - mean - sum(term for other, term in enumerate(terms) if other != index)
            counts = np.maximum(np.bincount(group_M), 1)
            terms[index] = (np.bincount(group_M, residuals) / counts)[group_M]
    return mean + sum(terms)
