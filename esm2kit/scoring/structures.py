"""Colour structures by scores: copies with one value per residue in the column of B factors."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.scoring.pictures import average_substitutions, drop_wild_type
from esm2kit.scoring.scores import Scores
from esm2kit.sequences.fasta import Record
from esm2kit.sequences.structures import (
    Chain,
    ChainFit,
    Structure,
    align_chain,
    find_structures,
    read_structure,
    write_b_factors,
)

COLOUR_NAMES = {
    "mean": "mean score of the substitutions",
    "worst": "lowest score of the substitutions",
    "entropy": "entropy of the model's guess",
}
MIN_END = 0.01  # of the colour scale


class FittedChain(NamedTuple):
    """A chain that is one of the proteins.

    Args:
        chain: of a structure.
        protein: index of the protein.
        fit: alignment of both.
    """

    chain: Chain
    protein: int
    fit: ChainFit


class FittedStructure(NamedTuple):
    """A structure and those of its chains that are proteins of the run."""

    structure: Structure
    chains: tuple[FittedChain, ...]


class ColouredStructure(NamedTuple):
    """A copy of a structure with scores in the column of B factors.

    Args:
        path: the copy.
        chains: chain -> protein.
        end: value at both ends of a symmetric colour scale, or at the upper end for the entropy.
        colour_by: key of COLOUR_NAMES.
    """

    path: Path
    chains: dict[str, str]
    end: float
    colour_by: str

    @property
    def commands(self) -> dict[str, str]:
        """Program -> the command that opens and colours the structure."""
        low = 0 if self.colour_by == "entropy" else f"-{self.end:g}"
        colours = ("blue", "white", "orange") if self.colour_by == "entropy" else ("orange", "white", "blue")
        name = self.path.name
        return {
            "PyMOL": f'pymol "{name}" -d "spectrum b, {" ".join(colours)}, minimum={low}, maximum={self.end:g}"',
            "ChimeraX": f'open "{name}"; color bfactor palette {":".join(colours)} range {low},{self.end:g}',
        }


def fit_structures(path: Path | None, proteins: Sequence[Record]) -> list[FittedStructure]:
    """Read structures and find the proteins that they show.

    Args:
        path: a PDB or mmCIF file, or a folder of them; None for no structure.
        proteins: the wild types.

    Returns:
        The structures; of a complex, every chain that is one of the proteins.

    Raises:
        InputError: a structure cannot be read, or none of its chains is one of the proteins.
    """
    return [] if path is None else [_fit(read_structure(file), proteins) for file in find_structures(path)]


def _fit(structure: Structure, proteins: Sequence[Record]) -> FittedStructure:
    found: list[FittedChain] = []
    failed: list[InputError] = []
    for chain in structure.chains:
        fits: list[FittedChain] = []
        for index, protein in enumerate(proteins):
            try:
                fits.append(FittedChain(chain, index, align_chain(chain, protein.sequence, repr(protein.id))))
            except InputError as error:
                failed.append(error)
        if fits:  # the protein of which the chain shows most; of equal ones the first
            found.append(max(fits, key=lambda each: ((each.fit.rows_T >= 0).sum() * each.fit.identity, -each.protein)))
    if not found:
        if len(failed) == 1:
            raise failed[0]
        raise InputError(
            f"{structure.path}: none of its {format_count(len(structure.chains), 'chain')} fits one of the "
            f"{format_count(len(proteins), 'protein')}. Pass the structure of a scored protein.",
            code="score.structure",
            path=structure.path,
            chains=tuple(chain.name for chain in structure.chains),
        )
    return FittedStructure(structure, tuple(found))


def compute_colours(scores: Scores, protein: int, colour_by: str) -> np.ndarray:
    """Compute the value of each residue, (T,); NaN where nothing was scored.

    Args:
        scores: the run.
        protein: index of the protein.
        colour_by: `mean` or `worst` of the substitutions, or `entropy`.

    Returns:
        The values.
    """
    if colour_by == "entropy":
        return scores.entropy(protein).astype(np.float64)
    log_odds_TA, sequence = scores.table(protein), scores.sequence(protein)
    if colour_by == "mean":
        return average_substitutions(log_odds_TA, sequence)
    mutants_TA = drop_wild_type(log_odds_TA, sequence)
    lowest_T = np.where(np.isfinite(mutants_TA), mutants_TA, np.inf).min(1)
    return np.where(np.isfinite(lowest_T), lowest_T, np.nan)


def colour_structures(scores: Scores, fitted: Sequence[FittedStructure], colour_by: str) -> list[ColouredStructure]:
    """Write the structures with the scores of the run next to its other files.

    Args:
        scores: the run.
        fitted: the structures.
        colour_by: see `compute_colours`.

    Returns:
        The copies: `<name>_scores_<structure>.pdb` or `.cif`.
    """
    proteins = scores.proteins
    colours: dict[int, np.ndarray] = {}
    found = []
    for structure, chains in fitted:
        values = {}
        for chain, protein, fit in chains:
            if protein not in colours:
                colours[protein] = compute_colours(scores, protein, colour_by)
            values[chain.name] = fit.place_on_chain(colours[protein], len(chain.sequence))
        suffix = "pdb" if structure.format == "pdb" else "cif"
        path = scores.manifest.with_name(f"{scores.manifest.stem}_{portable_name(structure.id)}.{suffix}")
        write_b_factors(structure, path, values)
        shown = np.concatenate(list(values.values()))
        shown = np.abs(shown[np.isfinite(shown)])
        end = max(float(np.ceil(10 * np.quantile(shown, 0.95)) / 10), MIN_END) if shown.size else 1.0
        names = {each.chain.name: proteins[each.protein] for each in chains}
        found.append(ColouredStructure(path, names, 3.0 if colour_by == "entropy" else end, colour_by))
    return found
