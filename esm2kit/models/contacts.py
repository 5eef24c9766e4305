"""Which residues of a protein a model couples: its contact head's map, or the attention such a head would read.

Both are held against what knows nothing of the fold: how far apart two residues are along the chain, and which two
letters they are.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.models.esm2 import ESM2, symmetrise_with_apc, tokenize
from esm2kit.sequences.alphabet import encode

# Attention maps of a whole protein are layers x heads x residues squared: 0.7 GB for 650M at this many.
MAX_RESIDUES = 512
BACKFITTING_ROUNDS = 6
# Nearer pairs touch because the chain joins them.
MIN_SEPARATION = 6


class PairMap(NamedTuple):
    """One protein's residue pairs.

    Args:
        values_TT: contact probabilities if `fitted`, else coupling: attention of each pair, symmetrised, its average
            product taken off, the mean over layers and heads, in units of attention spread evenly.
        expected_TT: the same pairs as distance along the chain and the two letters alone have it.
        explained: how much of the pairs' variance `distance`, `letters` and `both` tell.
        fitted: whether the model's contact head has been fitted to structures.
        head_range: least and greatest contact probability the head gives, fitted or not.
    """

    values_TT: np.ndarray
    expected_TT: np.ndarray
    explained: dict[str, float]
    fitted: bool
    head_range: tuple[float, float]

    @property
    def by_separation(self) -> np.ndarray:
        """(T,) mean of the pairs 0, 1, 2 ... residues apart; the first, a residue with itself, is NaN."""
        size = len(self.values_TT)
        return np.array([np.nan, *(np.diagonal(self.values_TT, apart).mean() for apart in range(1, size))])

    def describe(self, untrained: "PairMap | None" = None) -> str:
        """The numbers as sentences, for a caption.

        Args:
            untrained: the same protein by the same shape with fresh weights.
        """
        if self.fitted:
            first, second = np.triu_indices(len(self.values_TT), MIN_SEPARATION)
            expected = self.values_TT[first, second].sum()
            return (
                f"The contact head expects {expected:,.0f} contacts of residues {MIN_SEPARATION} or more apart, "
                f"{expected / len(self.values_TT):.2f} a residue. {self._describe_variance()}"
            )
        lowest, highest = self.head_range
        beside = ""
        if untrained:
            own = untrained.explained
            beside = f" Untrained, the same shape: distance {own['distance']:.0%}, letters {own['residues']:.0%}."
        return (
            f"No contact head was fitted to this model: its own gives every pair between {lowest:.0%} and "
            f"{highest:.0%}, which says nothing, so what is drawn is attention itself. "
            f"{self._describe_variance()} No structure is at hand to tell how much of the rest is contacts.{beside}"
        )

    def _describe_variance(self) -> str:
        explained = self.explained
        return (
            f"Distance along the chain tells {explained['distance']:.0%} of how pairs differ, the two letters "
            f"{explained['residues']:.0%}, both {explained['both']:.0%}."
        )


def has_fitted_head(model: ESM2) -> bool:
    """Whether a regression was ever fitted: fresh and absent contact heads have a bias of exactly zero."""
    return bool(model.contact_head.regression.bias.detach().ne(0).any())


@torch.inference_mode()
def pair_map(model: ESM2, sequence: str) -> PairMap:
    """What a model says of the pairs of a protein's residues.

    Args:
        model: in evaluation mode, on the CPU.
        sequence: residues; those beyond MAX_RESIDUES are left out.
    Raises: InputError for fewer than eight residues.
    Source: Rao et al. 2021, 10.1101/2020.12.15.422761: contacts by logistic regression on attention maps.
    """
    sequence = sequence[:MAX_RESIDUES]
    if len(sequence) < 8:
        raise InputError(
            f"{len(sequence)} residues make no map of pairs: choose a protein of 8 or more",
            code="contacts.too-short",
            found=len(sequence),
        )
    tokens_1T = tokenize([sequence])
    found = model(tokens_1T, need_head_weights=True)
    probability_TT = model.contact_head(tokens_1T, found["attentions"])[0].numpy()
    fitted = has_fitted_head(model)
    values_TT = probability_TT if fitted else compute_coupling(found["attentions"][0, ..., 1:-1, 1:-1])
    expected_TT, explained = _fit_baseline(values_TT, encode(sequence).astype(np.int64))
    ends = (float(probability_TT.min()), float(probability_TT.max()))
    return PairMap(values_TT, expected_TT, explained, fitted, ends)


def compute_coupling(attentions_LHTT: Tensor) -> np.ndarray:
    """(T, T) coupling of residues, in units of attention spread evenly, as `PairMap` describes it."""
    maps = symmetrise_with_apc(attentions_LHTT.flatten(0, 1)) / 2
    return (maps.mean(0) * maps.shape[-1]).numpy()


def _fit_baseline(values_TT: np.ndarray, letters_T: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """The best sum of a term for the distance and a term for the pair of letters, and what each tells."""
    first, second = np.triu_indices(len(letters_T), 1)
    values = values_TT[first, second].astype(np.float64)
    low, high = np.minimum(letters_T[first], letters_T[second]), np.maximum(letters_T[first], letters_T[second])
    groups = {"distance": second - first, "residues": low * (letters_T.max() + 1) + high}
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
    """Least squares on one term a group, by backfitting."""
    mean = values_M.mean()
    terms = [np.zeros_like(values_M) for _ in groups]
    for _ in range(BACKFITTING_ROUNDS):
        for place, group_M in enumerate(groups):
            rest = values_M - mean - sum(term for other, term in enumerate(terms) if other != place)
            counts = np.maximum(np.bincount(group_M), 1)
            terms[place] = (np.bincount(group_M, rest) / counts)[group_M]
    return mean + sum(terms)
