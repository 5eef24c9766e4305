"""How similar the proteins of different sets are: the nearest training protein of each held-out protein."""

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.progress import Progress
from esm2kit.sequences.alignment import Alignment, Criterion, align_locally, align_ungapped, can_align
from esm2kit.sequences.homologs import WordIndex
from esm2kit.sequences.screening import PairScreen
from esm2kit.tasks.proteins import Strata
from esm2kit.tasks.task_data import SET_NAMES

logger = logging.getLogger(__name__)

CANDIDATES = 5  # training proteins that are aligned with a held-out protein
# Held-out proteins whose nearest training protein is searched, in the split and in the random one.
MAX_MEASURED, MAX_RANDOM = 5_000, 1_000
NUM_BINS = 20
GROUP_SIZES = (1, 2, 5, 10, 50, 100)


class Nearest(NamedTuple):
    """The nearest training proteins of held-out proteins.

    Args:
        row_N: (N,) rows of held-out proteins.
        nearest_N: (N,) rows of their nearest training proteins; -1 where none is similar beyond chance.
        identity_N: (N,) identities, 0 where there is none.
        coverage_N: (N,) share of the shorter protein that is aligned.
    """

    row_N: np.ndarray
    nearest_N: np.ndarray
    identity_N: np.ndarray
    coverage_N: np.ndarray


def name_sets(sets: Sequence[str]) -> list[str]:
    """Name the sets that occur, training first, or the folds in their order."""
    found = set(sets)
    if found <= set(SET_NAMES):
        return [name for name in SET_NAMES if name in found]
    return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def find_nearest(
    sequences: Sequence[str], sets: np.ndarray, coverage: float, most: int, seed: int, what: str
) -> Nearest:
    """Find the training protein with the highest identity for each held-out protein.

    Of the training proteins, those that share most 3-mers with a held-out protein are aligned with it, and equal ones
    are always found. In folds, the training proteins of a protein are those of all other folds.

    Args:
        sequences: (P) sequences.
        sets: (P,) name of the set, or of the fold.
        coverage: least share of the shorter protein that an alignment covers.
        most: number of held-out proteins, as a random sample of all.
        seed: of the sample.
        what: start of the lines about the progress.

    Returns:
        The nearest proteins, in the order of the rows.
    """
    has_train = "train" in sets
    held_out = np.flatnonzero(sets != "train") if has_train else np.arange(len(sets))
    if len(held_out) > most:
        held_out = np.sort(np.random.default_rng(seed).choice(held_out, most, replace=False))
    nearest = _NearestSearch(sequences, coverage)
    found: dict[int, tuple[int, Alignment | None]] = {}
    with Progress(logger, what, "held-out proteins", len(held_out)) as progress:
        for name in ["train"] if has_train else name_sets(sets.tolist()):
            references = np.flatnonzero((sets == name) if has_train else (sets != name))
            queries = held_out if has_train else held_out[sets[held_out] == name]
            first_row: dict[str, int] = {}
            for row in references.tolist():
                first_row.setdefault(sequences[row], row)
            texts = list(first_row)
            index = WordIndex(texts)
            for start in range(0, len(queries), 64):
                part = queries[start : start + 64].tolist()
                candidates_QN = index.list_candidates([sequences[row] for row in part], CANDIDATES)
                near = [
                    [sequences[row]]
                    if sequences[row] in first_row
                    else [texts[place] for place in candidates if can_align(sequences[row], texts[place])]
                    for row, candidates in zip(part, candidates_QN.tolist(), strict=True)
                ]
                chosen = nearest.choose([sequences[row] for row in part], near)
                for row, (other, aligned) in zip(part, chosen, strict=True):
                    found[row] = (-1 if other is None else first_row[other], aligned)
                progress.update(len(found))
    rows = sorted(found)
    lengths = {row: min(len(sequences[row]), len(sequences[found[row][0]])) for row in rows}
    aligned = [found[row][1] for row in rows]
    return Nearest(
        np.array(rows, dtype=np.int64),
        np.array([found[row][0] for row in rows], dtype=np.int64),
        np.array([each.identity if each else 0.0 for each in aligned]),
        np.array([each.covered / lengths[row] if each else 0.0 for row, each in zip(rows, aligned, strict=True)]),
    )


class _NearestSearch:
    """Finds the nearest of some sequences; alignments that cannot be the best are left out.

    Args:
        sequences: all sequences.
        coverage: least share of the shorter protein that an alignment covers.
    """

    def __init__(self, sequences: Sequence[str], coverage: float) -> None:
        texts = list(dict.fromkeys(sequences))
        self.row_of = {text: row for row, text in enumerate(texts)}
        self.criterion = Criterion(0.0, coverage, len(texts))
        self.screen = PairScreen(texts, self.criterion)

    def choose(
        self, queries: Sequence[str], near: Sequence[Sequence[str]]
    ) -> list[tuple[str | None, Alignment | None]]:
        """Return the nearest sequence and its alignment for each query; None if no alignment is long enough."""
        rows_N2 = np.array(
            [(self.row_of[query], self.row_of[other]) for query, others in zip(queries, near, strict=True)
             for other in others if other != query],
            dtype=np.int64,
        ).reshape(-1, 2)  # fmt: skip
        possible = {
            pair
            for pair, is_possible in zip(
                map(tuple, rows_N2.tolist()), self.screen.find_possible(*rows_N2.T), strict=True
            )
            if is_possible
        }
        chosen = []
        for query, others in zip(queries, near, strict=True):
            row = self.row_of[query]
            chosen.append(self._choose(query, others, [(row, self.row_of[other]) in possible for other in others]))
        return chosen

    def _choose(
        self, query: str, others: Sequence[str], is_possible: Sequence[bool]
    ) -> tuple[str | None, Alignment | None]:
        """Return the sequence with the highest identity, the first one of several, and its alignment.

        Sequences of equal length are aligned without gaps too, as in `are_similar`, and the higher identity counts.
        """
        best: tuple[float, int, Alignment | None] = (-np.inf, 0, None)
        for place, other in enumerate(others):
            if len(query) == len(other):
                found = align_ungapped(query, other)
                if self.criterion.is_met(found, len(query), len(other)):
                    best = max(best, (found.identity, -2 * place, found), key=lambda entry: entry[:2])
        places = [place for place, possible in enumerate(is_possible) if possible]
        targets = np.array([self.row_of[others[place]] for place in places], dtype=np.int64)
        # one alignment takes less time than the bounds
        highest = (
            self.screen.bound_identity(self.row_of[query], targets).tolist() if len(places) > 1 else [1.0] * len(places)
        )
        for bound, place in sorted(zip(highest, places, strict=True), key=lambda pair: (-pair[0], pair[1])):
            if (bound, -2 * place - 1) <= best[:2]:
                continue
            found_locally = align_locally(query, others[place])
            if found_locally and self.criterion.is_met(found_locally, len(query), len(others[place])):
                best = max(best, (found_locally.identity, -2 * place - 1, found_locally), key=lambda entry: entry[:2])
        return (None if best[2] is None else others[-best[1] // 2]), best[2]


def summarise_nearest(nearest: Nearest, identity: float) -> dict[str, Any]:
    """Summarise identities to the nearest training protein.

    Args:
        nearest: the nearest proteins.
        identity: from which proteins are similar.

    Returns:
        Numbers of held-out proteins, of those with no nearest protein and of those from the identity on; quantiles; and
        the histogram, whose first bin starts at 0 and includes proteins with no nearest one.
    """
    values = nearest.identity_N
    quantiles = np.quantile(values, [0.5, 0.9, 1.0]) if len(values) else np.full(3, np.nan)
    return {
        "held_out": len(values),
        "without_nearest": int((nearest.nearest_N < 0).sum()),
        "similar": int((values >= identity - 1e-9).sum()),
        "full_identity": int((values == 1.0).sum()),
        "median": float(quantiles[0]),
        "quantile_90": float(quantiles[1]),
        "highest": float(quantiles[2]),
        "histogram": np.histogram(values, bins=np.linspace(0, 1, NUM_BINS + 1))[0].tolist(),
    }


def describe_sets(sets: np.ndarray, sequences: Sequence[str], groups: np.ndarray) -> list[dict[str, Any]]:
    """Count the proteins, different sequences and groups of each set.

    Args:
        sets: (P,) name of the set or fold of each protein.
        sequences: (P) sequences.
        groups: (P,) number of the group of each protein.

    Returns:
        One entry per set.
    """
    described = []
    for name in name_sets(sets.tolist()):
        rows = np.flatnonzero(sets == name).tolist()
        described.append(
            {
                "name": name,
                "proteins": len(rows),
                "share": len(rows) / len(sets),
                "sequences": len({sequences[row] for row in rows}),
                "groups": len({int(groups[row]) for row in rows}),
            }
        )
    return described


def describe_labels(sets: np.ndarray, strata: Strata, cells: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the labels of each set: numbers by their quantiles, classes by their shares.

    Args:
        sets: (P,) name of the set or fold of each protein.
        strata: the column of the labels.
        cells: (P) its cells.

    Returns:
        One entry per set, or none without labels.
    """
    if not strata.column:
        return []
    described = []
    for name in name_sets(sets.tolist()):
        rows = np.flatnonzero((sets == name) & (strata.numbers >= 0))
        entry: dict[str, Any] = {"name": name, "labelled": len(rows)}
        if strata.numeric:
            values = np.array([float(cells[row]) for row in rows])
            entry |= (
                {"mean": float(values.mean()), "quantiles": np.quantile(values, [0.1, 0.5, 0.9]).tolist()}
                if len(rows)
                else {}
            )
        else:
            counts = Counter(cells[row] for row in rows)
            entry["classes"] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
        described.append(entry)
    return described


def describe_groups(groups: np.ndarray, sets: np.ndarray) -> dict[str, Any]:
    """Describe the sizes of the groups, and those that are in several sets.

    Args:
        groups: (P,) number of the group of each protein.
        sets: (P,) name of the set or fold of each protein.

    Returns:
        The number of groups, the size of the largest one, the numbers of groups and proteins by size, and the number of
        groups in several sets.
    """
    sizes = np.array(sorted(Counter(groups.tolist()).values()))
    edges = [*GROUP_SIZES, max(int(sizes[-1]), GROUP_SIZES[-1]) + 1]
    by_size = []
    for low, high in pairwise(edges):
        chosen = sizes[(sizes >= low) & (sizes < high)]
        if len(chosen):
            by_size.append(
                {
                    "least": low,
                    "most": min(high - 1, int(sizes[-1])),
                    "groups": len(chosen),
                    "proteins": int(chosen.sum()),
                }
            )
    sets_of: dict[int, set[str]] = {}
    for group, name in zip(groups.tolist(), sets.tolist(), strict=True):
        sets_of.setdefault(group, set()).add(name)
    return {
        "groups": len(sizes),
        "largest": int(sizes[-1]),
        "sizes": by_size,
        "in_several_sets": sum(len(names) > 1 for names in sets_of.values()),
    }


def describe_duplicates(sequences: Sequence[str], sets: np.ndarray) -> dict[str, int]:
    """Count sequences that several proteins have, and those of them that are in several sets."""
    sets_of: dict[str, list[str]] = {}
    for sequence, name in zip(sequences, sets.tolist(), strict=True):
        sets_of.setdefault(sequence, []).append(name)
    repeated = [names for names in sets_of.values() if len(names) > 1]
    return {
        "sequences": len(repeated),
        "proteins": sum(map(len, repeated)),
        "in_several_sets": sum(len(set(names)) > 1 for names in repeated),
    }
