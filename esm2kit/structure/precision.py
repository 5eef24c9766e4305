"""Precision of predicted contacts at L, L/2 and L/5, by sequence separation, compared with the separation alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONTACT_DISTANCE = 8.0  # Angstrom between CB atoms
# name -> smallest and largest sequence separation of its pairs
RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, None)}
BETWEEN = "between chains"
TOPS = {"L": 1, "L/2": 2, "L/5": 5}
# The pairs of other proteins count as much as the decrease with the separation if there are this many of them.
PRIOR_PAIRS = 100
WINDOW = 0.1  # separations that are averaged, as a share of the separation


def find_contacts(cb_T3: np.ndarray) -> np.ndarray:
    """Find the residues in contact.

    Args:
        cb_T3: (T, 3) CB coordinates (CA for glycine) in Angstrom, NaN for residues that were not observed.

    Returns:
        (T, T) 1 for a contact, 0 for none, NaN if one of the two was not observed.
    """
    distance_TT = np.linalg.norm(cb_T3[:, None] - cb_T3[None], axis=-1)
    return np.where(np.isnan(distance_TT), np.nan, distance_TT < CONTACT_DISTANCE)


class Pairs(NamedTuple):
    """The observed residue pairs of a protein that belong to a range.

    Args:
        first_M: (M,) first residue of each pair.
        second_M: (M,) second residue.
        separation_M: (M,) difference of their places in the chain; 0 for pairs between chains.
        contact_M: (M,) whether they are in contact.
    """

    first_M: np.ndarray
    second_M: np.ndarray
    separation_M: np.ndarray
    contact_M: np.ndarray


def select_pairs(contacts_TT: np.ndarray, chain_T: np.ndarray) -> dict[str, Pairs]:
    """Select the observed pairs of each range.

    Args:
        contacts_TT: as `find_contacts` returns them.
        chain_T: (T,) index of each residue's chain.

    Returns:
        Range -> pairs; BETWEEN has those of different chains, if there are several.
    """
    first, second = np.triu_indices(len(contacts_TT), 1)
    observed = ~np.isnan(contacts_TT[first, second])
    first, second = first[observed], second[observed]
    same = chain_T[first] == chain_T[second]
    separation, contact = np.where(same, second - first, 0), contacts_TT[first, second] > 0
    chosen = {
        name: same & (separation >= low) & (separation <= (high or len(contacts_TT)))
        for name, (low, high) in RANGES.items()
    }
    if not same.all():
        chosen[BETWEEN] = ~same
    return {name: Pairs(first[mask], second[mask], separation[mask], contact[mask]) for name, mask in chosen.items()}


def compute_precision(scores_M: np.ndarray, contact_M: np.ndarray, count: int) -> float:
    """Compute the share of contacts among the highest-ranked pairs.

    Pairs of equal score have no order. Of those at the limit, the expected number of contacts counts.

    Args:
        scores_M: (M,) a higher score is a more probable contact.
        contact_M: (M,) whether each pair is in contact.
        count: number of pairs to select, at most M.

    Returns:
        The precision, NaN if `count` is 0.
    """
    if not count:
        return float("nan")
    limit = np.partition(scores_M, len(scores_M) - count)[len(scores_M) - count]
    above, tied = scores_M > limit, scores_M == limit
    rest = count - int(above.sum())
    return float((contact_M[above].sum() + rest * contact_M[tied].mean()) / count)


class SeparationStatistics:
    """How frequent contacts are at each sequence separation, in a set of proteins.

    Args:
        proteins: the pairs of each protein by range.
    """

    def __init__(self, proteins: Sequence[dict[str, Pairs]]) -> None:
        self.longest = max(int(pairs.separation_M.max(initial=0)) for each in proteins for pairs in each.values())
        self.pairs_S, self.contacts_S = (sum(counts) for counts in zip(*map(self._count, proteins), strict=True))

    def _count(self, protein: dict[str, Pairs]) -> tuple[np.ndarray, np.ndarray]:
        within = [pairs for name, pairs in protein.items() if name != BETWEEN]
        separation = np.concatenate([pairs.separation_M for pairs in within])
        contact = np.concatenate([pairs.contact_M for pairs in within])
        pairs_S = np.bincount(separation, minlength=self.longest + 1).astype(float)
        return pairs_S, np.bincount(separation, contact, minlength=self.longest + 1)

    def score_without(self, protein: dict[str, Pairs]) -> np.ndarray:
        """Estimate the frequency of contacts at each separation from all proteins but one.

        Args:
            protein: the pairs of the protein to leave out.

        Returns:
            (S,) frequency at separation 0, 1, 2, ... Where the other proteins have few pairs, it decreases with the
            separation.
        """
        own_pairs_S, own_contacts_S = self._count(protein)
        pairs_S, contacts_S = self.pairs_S - own_pairs_S, self.contacts_S - own_contacts_S
        separation_S = np.arange(self.longest + 1)
        inverse_S = 1 / np.maximum(separation_S, 1)
        expected = (pairs_S * inverse_S).sum()
        prior_S = inverse_S * (contacts_S.sum() / expected if expected else 1)
        half_S = (separation_S * WINDOW / 2).astype(int)
        low_S, high_S = separation_S - half_S, np.minimum(separation_S + half_S, self.longest) + 1
        sums = (np.append(0, values_S.cumsum()) for values_S in (pairs_S, contacts_S))
        near_pairs_S, near_contacts_S = (total[high_S] - total[low_S] for total in sums)
        return (near_contacts_S + PRIOR_PAIRS * prior_S) / (near_pairs_S + PRIOR_PAIRS)


class PrecisionRow(NamedTuple):
    """The precision of one protein, in one range, at one number of pairs.

    Args:
        range: a key of RANGES, or BETWEEN.
        top: a key of TOPS.
        selected: number of the highest-ranked pairs that were selected.
        pairs: number of observed pairs in the range.
        contacts: number of contacts among them.
        precision: share of contacts among the selected pairs.
        baseline: the same for pairs that are ranked by their separation.
        highest: the precision of a perfect ranking.
    """

    range: str
    top: str
    selected: int
    pairs: int
    contacts: int
    precision: float
    baseline: float
    highest: float


def score_protein(
    values_TT: np.ndarray, pairs: dict[str, Pairs], num_observed: int, frequency_S: np.ndarray
) -> list[PrecisionRow]:
    """Compute the precisions of one protein.

    Args:
        values_TT: predicted contacts.
        pairs: as `select_pairs` returns them.
        num_observed: L, the number of observed residues.
        frequency_S: frequency of contacts by separation, from other proteins.

    Returns:
        A row per range and top, without ranges of which no pair was observed.
    """
    rows = []
    for name, found in pairs.items():
        if not found.contact_M.size:
            continue
        scores_M = values_TT[found.first_M, found.second_M]
        # a separation between chains has no meaning: all pairs are equal, and the baseline is the share of contacts
        by_separation_M = frequency_S[found.separation_M]
        contacts = int(found.contact_M.sum())
        for top, divisor in TOPS.items():
            count = min(max(num_observed // divisor, 1), found.contact_M.size)
            rows.append(
                PrecisionRow(
                    range=name,
                    top=top,
                    selected=count,
                    pairs=found.contact_M.size,
                    contacts=contacts,
                    precision=compute_precision(scores_M, found.contact_M, count),
                    baseline=compute_precision(by_separation_M, found.contact_M, count),
                    highest=min(contacts, count) / count,
                )
            )
    return rows
