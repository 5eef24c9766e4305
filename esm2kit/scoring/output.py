"""The work of a run, as forward passes, and the tables that are written from their values."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from scipy.stats import rankdata

from esm2kit.scoring.config import ScoreConfig
from esm2kit.scoring.masked_passes import Pass
from esm2kit.scoring.scores import DELIMITERS
from esm2kit.scoring.strategies import (
    Likelihood,
    ProteinScorer,
    ProteinScores,
    ReadValues,
    ScoredVariant,
    count_values,
    likelihood_passes,
)
from esm2kit.scoring.variants import Variant, list_substitutions
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record

VARIANT_COLUMNS = (
    "protein", "mutation", "score", "rank", "position", "wild_type_probability", "mutant_probability", "window", "note",
)  # fmt: skip
SEQUENCE_COLUMNS = (
    "protein", "residues", "mean_log_likelihood", "pseudo_perplexity", "passes", "method", "exact_mean_log_likelihood",
)  # fmt: skip
MAX_SHOWN = 5  # most and least tolerated positions


class SubstitutionScan:
    """Scores of variants.

    Args:
        config: the strategy.
        proteins: wild types.
        variants: what is scored. None: every single substitution.
    """

    files = ("scores", "h5")

    def __init__(self, config: ScoreConfig, proteins: Sequence[Record], variants: Sequence[Variant] | None) -> None:
        self.config, self.proteins = config, proteins
        self.variants: list[list[Variant]] | None = None
        if variants is not None:
            self.variants = [[] for _ in proteins]
            for variant in variants:
                self.variants[variant.protein].append(variant)

    def steps(self) -> Iterator[list[Pass]]:
        """List the forward passes of all proteins, see `ProteinScorer.steps`."""
        for _, scorer in self._scorers():
            yield from scorer.steps()

    def _scorers(self) -> Iterator[tuple[Record, ProteinScorer]]:
        config = self.config
        for index, protein in enumerate(self.proteins):
            if self.variants is None:
                variants = list_substitutions(index, protein.sequence, offset=config.offset)
            else:
                variants = self.variants[index]
            yield (
                protein,
                ProteinScorer(protein.sequence, variants, config.strategy, config.max_tokens, config.mask_together),
            )

    def write(self, read: ReadValues, paths: Sequence[Path], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the table of variants and the HDF5 file.

        Args:
            read: returns the next values of the passes.
            paths: of the two files.
            attributes: of the HDF5 file.

        Returns:
            The summary for the manifest.
        """
        num_scores, tolerance = 0, None
        with (
            open(paths[0], "w", encoding="utf-8", newline="") as text,
            h5py.File(paths[1], "w") as file,
        ):
            file.attrs.update(attributes)
            rows = csv.writer(text, delimiter=DELIMITERS[paths[0].suffix], lineterminator="\n")
            rows.writerow(VARIANT_COLUMNS)
            for index, (protein, scorer) in enumerate(self._scorers()):
                found = scorer.collect(read)
                rows.writerows(_list_rows(protein.id, scorer.variants, found.variants, self.config.offset))
                _write_tables(file.create_group(str(index)), protein, found)
                num_scores += len(found.variants)
                tolerance = found.log_odds_TA
        summary = {"strategy": self.config.strategy, "num_scores": num_scores, "mean_error": None}
        most = least = None
        if len(self.proteins) == 1:
            most, least = describe_tolerance(self.proteins[0].sequence, tolerance, self.config.offset)
        return summary | {"most_tolerated": most, "least_tolerated": least}


class SequenceScan:
    """Likelihoods of proteins.

    Args:
        config: exact, or the estimate and its sample.
        proteins: what is scored.
    """

    files = ("scores",)

    def __init__(self, config: ScoreConfig, proteins: Sequence[Record]) -> None:
        self.config, self.proteins = config, proteins
        count = min(config.sample, len(proteins)) if config.fast else 0
        self.sample = np.linspace(0, len(proteins) - 1, count).round().astype(int).tolist()

    def steps(self) -> Iterator[list[Pass]]:
        """List the forward passes of all proteins, then those of the sample that is also computed exactly."""
        for protein in self.proteins:
            yield self._passes(protein)
        for index in self.sample:
            yield likelihood_passes(self.proteins[index].sequence, self.config.max_tokens)

    def _passes(self, protein: Record) -> list[Pass]:
        num_passes = self.config.passes if self.config.fast else None
        return likelihood_passes(protein.sequence, self.config.max_tokens, num_passes)

    def write(self, read: ReadValues, paths: Sequence[Path], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the table of proteins, see `SubstitutionScan.write`."""
        del attributes  # this table has none
        found = []
        for protein in self.proteins:
            passes = self._passes(protein)  # those of all proteins need much more memory than their likelihoods
            found.append((len(passes), _read_likelihood(passes, read)))
        exact = {}
        for index in self.sample:
            passes = likelihood_passes(self.proteins[index].sequence, self.config.max_tokens)
            exact[index] = _read_likelihood(passes, read)
        method = "estimate" if self.config.fast else "exact"
        with open(paths[0], "w", encoding="utf-8", newline="") as text:
            rows = csv.writer(text, delimiter=DELIMITERS[paths[0].suffix], lineterminator="\n")
            rows.writerow(SEQUENCE_COLUMNS)
            for index, (protein, (num_passes, likelihood)) in enumerate(zip(self.proteins, found, strict=True)):
                checked = f"{exact[index].mean:.7g}" if index in exact else ""
                numbers = [f"{likelihood.mean:.7g}", f"{likelihood.pseudo_perplexity:.7g}"]
                numbers = numbers if likelihood.num_residues else ["", ""]
                rows.writerow([protein.id, len(protein.sequence), *numbers, num_passes, method, checked])
        errors = [abs(found[index][1].mean - each.mean) for index, each in exact.items() if each.num_residues]
        summary = {"strategy": method, "num_scores": len(found), "most_tolerated": None, "least_tolerated": None}
        return summary | {"mean_error": float(np.mean(errors)) if errors else None}


def _read_likelihood(passes: Sequence[Pass], read: ReadValues) -> Likelihood:
    values = read(count_values(passes))
    return Likelihood(float(values.sum(dtype=np.float64)), len(values))


def _list_rows(
    protein: str, variants: Sequence[Variant], scored: Sequence[ScoredVariant], offset: int
) -> Iterator[list[Any]]:
    """List the rows of a protein's variants."""
    ranks = rankdata([-each.score for each in scored], method="min") if scored else []
    for variant, each, rank in zip(variants, scored, ranks, strict=True):
        yield [
            protein,
            variant.text,
            f"{each.score:.7g}",
            int(rank),
            ":".join(str(substitution.position + 1 + offset) for substitution in variant.substitutions),
            ":".join(f"{value:.4g}" for value in each.wild_probabilities),
            ":".join(f"{value:.4g}" for value in each.mutant_probabilities),
            ":".join(f"{first + offset}-{last + offset}" for first, last in each.windows),
            each.note,
        ]


def _write_tables(group: h5py.Group, protein: Record, found: ProteinScores) -> None:
    group.attrs["original_id"], group.attrs["sequence"] = protein.id, protein.sequence
    group["log_odds"] = found.log_odds_TA
    if found.log_prob_TA is not None:
        group["log_probabilities"] = found.log_prob_TA
        group["entropy"] = compute_entropy(found.log_prob_TA)


def compute_entropy(log_prob_TA: np.ndarray) -> np.ndarray:
    """Compute the entropy of the 20 standard residues at each position, after normalising their probabilities.

    Args:
        log_prob_TA: (T, 20) log-probabilities.

    Returns:
        (T,) float32 in nats, from 0 to ln 20; NaN where the row is NaN.
    """
    log_prob_TA = log_prob_TA.astype(np.float64)
    normalised_TA = log_prob_TA - np.log(np.exp(log_prob_TA).sum(1, keepdims=True))
    return -(np.exp(normalised_TA) * normalised_TA).sum(1).astype(np.float32)


def describe_tolerance(sequence: str, log_odds_TA: np.ndarray, offset: int = 0) -> tuple[str | None, str | None]:
    """Name the positions with the highest and with the lowest mean log-odds of their 19 substitutions.

    Args:
        sequence: the wild type.
        log_odds_TA: (T, 20) log-odds.
        offset: what is added to the number of a residue.

    Returns:
        The most and the least tolerated positions, such as "S2 Q4", different ones; None if fewer than two positions
        have all scores.
    """
    complete = np.flatnonzero(~np.isnan(log_odds_TA).any(1))
    shown = min(MAX_SHOWN, complete.size // 2)
    if not shown:
        return None, None
    order = complete[np.argsort(log_odds_TA[complete].sum(1) / (len(STANDARD_RESIDUES) - 1), kind="stable")]
    names = [f"{sequence[place]}{place + 1 + offset}" for place in order]
    return " ".join(names[::-1][:shown]), " ".join(names[:shown])


class Attributes(NamedTuple):
    """Attributes of the HDF5 file of a run."""

    model_name: str
    strategy: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def as_dict(self) -> dict[str, str]:
        """Return the attributes as HDF5 stores them."""
        return {
            "esm2kit_scores": 1,
            "model_name": self.model_name,
            "strategy": self.strategy,
            "residues": STANDARD_RESIDUES,
            "settings": json.dumps(self.settings, sort_keys=True),
            "provenance": json.dumps(self.provenance),
        }
