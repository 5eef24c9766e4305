"""Compare predicted contacts with structures: find each protein's structure, score it, and summarise all proteins."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.sequences.structures import Chain, ChainFit, Structure, align_chain, find_chain, read_structure
from esm2kit.structure.contact_file import ContactReader
from esm2kit.structure.inputs import Protein, describe_chains
from esm2kit.structure.precision import (
    BETWEEN,
    CONTACT_DISTANCE,
    RANGES,
    TOPS,
    PrecisionRow,
    SeparationStatistics,
    find_contacts,
    score_protein,
    select_pairs,
)
from esm2kit.tasks.metrics import compute_interval, sample_counts

logger = logging.getLogger(__name__)
SCHEMA = "esm2kit.contacts/1"
RESAMPLES = 1000
MAX_SHOWN = 5


class Truth(NamedTuple):
    """The structure of a protein.

    Args:
        structure: the file.
        chains: one chain of it per chain of the protein.
        contacts_TT: (T, T) 1 for a contact, 0 for none, NaN if a residue was not observed.
        num_observed: residues with a CB atom (CA for glycine).
    """

    structure: Structure
    chains: tuple[Chain, ...]
    contacts_TT: np.ndarray
    num_observed: int


class Scored(NamedTuple):
    """A protein and its precisions."""

    protein: Protein
    truth: Truth
    rows: list[PrecisionRow]


def find_truths(proteins: Sequence[Protein], paths: Sequence[Path]) -> dict[int, Truth]:
    """Find the structure of each protein, by its id or its sequence.

    Args:
        proteins: the proteins.
        paths: structure files. A protein that was read from a structure is compared with that one.

    Returns:
        Index of a protein -> its structure.

    Raises:
        InputError: a file cannot be read, the structure with a protein's id is of another protein, or no structure fits
            any protein.
    """
    structures = [read_structure(path) for path in paths]
    by_id: dict[str, Structure] = {structure.id.casefold(): structure for structure in structures}
    truths = {}
    for index, protein in enumerate(proteins):
        if protein.source is not None:
            fits = [(chain, align_chain(chain, chain.sequence)) for chain in protein.source.chains]
            truths[index] = _build_truth(protein.source, fits)
        elif (found := _find_truth(protein, by_id, structures)) is not None:
            truths[index] = found
    if structures and not any(proteins[index].source is None for index in truths):
        raise InputError(
            f"found no structure of {format_count(len(proteins), 'protein')} among "
            f"{format_count(len(structures), 'structure')}, neither by id nor by sequence. Pass those of these "
            "proteins, or name the files by the ids of the proteins.",
            code="contacts.no-structure",
            found=len(structures),
            proteins=len(proteins),
        )
    used = {truth.structure.path for truth in truths.values()}
    if unused := [structure.id for structure in structures if structure.path not in used]:
        logger.warning(
            "%d of %d structures fit no protein: %s", len(unused), len(structures), ", ".join(unused[:MAX_SHOWN])
        )
    return truths


def _find_truth(protein: Protein, by_id: dict[str, Structure], structures: Sequence[Structure]) -> Truth | None:
    named, chain_name = _find_by_id(protein.id, by_id)
    if named is not None and (found := _fit_structure(protein, named, chain_name)) is not None:
        return found
    fitted = (_fit_structure(protein, structure) for structure in structures)
    truths = [truth for truth in fitted if truth is not None]
    if truths:
        return max(truths, key=lambda truth: truth.num_observed)
    if named is not None:
        chains = ", ".join(f"{chain.name} with {len(chain.sequence)} residues" for chain in named.chains[:MAX_SHOWN])
        raise InputError(
            f"{named.path} has the id of protein '{protein.id}', but its chains ({chains}) do not fit the sequence of "
            f"{format_count(protein.num_residues, 'residue')}. Pass the structure of this protein, or rename the file.",
            code="contacts.structure-fit",
            path=named.path,
            id=protein.id,
        )
    return None


def _find_by_id(name: str, by_id: dict[str, Structure]) -> tuple[Structure | None, str]:
    """Find the structure of an id, or of a part between its bars; `1abc_B` names chain B of 1abc."""
    parts = [part.casefold() for part in (name, *name.split("|")) if part]
    for part, original in zip(parts, [name, *filter(None, name.split("|"))], strict=True):
        if part in by_id:
            return by_id[part], ""
        stem = part.rpartition("_")[0]
        if stem in by_id and any(each.name == original[len(stem) + 1 :] for each in by_id[stem].chains):
            return by_id[stem], original[len(stem) + 1 :]
    return None, ""


def _fit_structure(protein: Protein, structure: Structure, chain_name: str = "") -> Truth | None:
    """Fit the chains of a protein to different chains of a structure; None if one of them does not fit."""
    left = list(structure.select([chain_name] if chain_name else ()))
    fits = []
    for sequence in protein.chains:
        found = find_chain(left, sequence)
        if found is None:
            return None
        fits.append(found)
        left = [chain for chain in left if chain is not found[0]]
    return _build_truth(structure, fits)


def _build_truth(structure: Structure, fits: Sequence[tuple[Chain, ChainFit]]) -> Truth:
    cb_T3 = np.concatenate([fit.take_from_chain(chain.cb_C3) for chain, fit in fits])
    observed = int(np.isfinite(cb_T3).all(1).sum())
    return Truth(structure, tuple(chain for chain, _ in fits), find_contacts(cb_T3), observed)


def score_proteins(proteins: Sequence[Protein], truths: dict[int, Truth], reader: ContactReader) -> list[Scored]:
    """Compute the precisions of all proteins with a structure.

    Args:
        proteins: the proteins.
        truths: index of a protein -> its structure.
        reader: the predicted contacts, in the order of the proteins.

    Returns:
        The proteins that have at least one observed pair, in order.
    """
    pairs = {index: select_pairs(truth.contacts_TT, proteins[index].chain_T) for index, truth in truths.items()}
    statistics = SeparationStatistics(list(pairs.values()))
    scored = []
    for index, truth in truths.items():
        frequency_S = statistics.score_without(pairs[index])
        rows = score_protein(reader.read(index), pairs[index], truth.num_observed, frequency_S)
        scored.append(Scored(proteins[index], truth, rows))
    return [each for each in scored if each.rows]


def write_table(path: Path, scored: Sequence[Scored]) -> None:
    """Write one row per protein, range and number of pairs."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        columns = ("range", "top", "selected", "pairs", "contacts", "precision", "baseline", "highest")
        rows.writerow(["id", "structure", "chains", "residues", "observed", *columns])
        for protein, truth, found in scored:
            about = [protein.id, truth.structure.path.name, describe_chains(truth.chains)]
            about += [protein.num_residues, truth.num_observed]
            for row in found:
                rows.writerow([*about, *(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row)])


def summarise(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Average the precisions over proteins.

    Args:
        scored: the proteins.

    Returns:
        For each range and top: the number of proteins, and the means of `precision`, `baseline`, `highest` and of the
        `difference` between model and baseline. The intervals are 95% bootstrap intervals over proteins, None for a
        single protein.
    """
    summary = []
    for name in [*RANGES, BETWEEN]:
        for top in TOPS:
            rows = [row for each in scored for row in each.rows if (row.range, row.top) == (name, top)]
            if not rows:
                continue
            precision_P, baseline_P, highest_P = np.array(
                [(row.precision, row.baseline, row.highest) for row in rows]
            ).T
            counts_RP = sample_counts(len(rows), RESAMPLES)
            found = {"range": name, "top": top, "proteins": len(rows)}
            for column, values_P in (
                ("precision", precision_P),
                ("baseline", baseline_P),
                ("difference", precision_P - baseline_P),
            ):
                interval = compute_interval(values_P.mean(), counts_RP @ values_P / len(rows))
                ends = [end if math.isfinite(end) else None for end in (interval.low, interval.high)]
                found[column] = {"value": interval.value, "low": ends[0], "high": ends[1]}
            summary.append(found | {"highest": float(highest_P.mean())})
    return summary


def describe_summary(summary: Sequence[dict[str, Any]]) -> str:
    """Describe the precision at L in the longest range, with its baseline, in one line."""
    found = next((row for row in summary if (row["range"], row["top"]) == ("long", "L")), summary[0])
    precision, difference = found["precision"], found["difference"]
    if not found["highest"]:
        return (
            f"no {found['range']}-range contacts in {format_count(found['proteins'], 'structure')}, so that their "
            "precision is 0 whatever the model predicts"
        )
    interval = "" if precision["low"] is None else f" [{precision['low']:.3f}, {precision['high']:.3f}]"
    verdict = "better than"
    if difference["low"] is None:
        verdict = "compared with"
    elif difference["low"] <= 0 <= difference["high"]:
        verdict = "not distinguishable from"
    elif difference["high"] < 0:
        verdict = "worse than"
    return (
        f"precision at {found['top']} of {found['range']}-range contacts {precision['value']:.3f}{interval} over "
        f"{format_count(found['proteins'], 'protein')}, {verdict} {found['baseline']['value']:.3f} by sequence "
        f"separation alone; a perfect ranking has {found['highest']:.3f}"
    )


def write_summary(path: Path, summary: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the means with their definitions and the provenance, sealed with a digest."""
    definitions = {
        "contact": f"CB atoms (CA of glycine) closer than {CONTACT_DISTANCE} Angstrom",
        "ranges": {name: f"{low} to {high}" if high else f"at least {low}" for name, (low, high) in RANGES.items()},
        "L": "number of observed residues",
        "baseline": "pairs ranked by the frequency of contacts at their sequence separation in the other proteins",
    }
    write_sealed_json(path, {"schema": SCHEMA, **about, "definitions": definitions, "summary": list(summary)})
