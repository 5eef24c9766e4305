"""Pairs of proteins: `esm2kit split` divides their proteins, and keeps the pairs whose proteins are in one set."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.splitting.config import SplitConfig
from esm2kit.tasks.kinds import read_table_or_sets
from esm2kit.tasks.pair_files import (
    ProteinPair,
    find_pair_columns,
    has_pairs,
    is_workbook,
    read_fasta_pairs,
    read_table_pairs,
)
from esm2kit.tasks.proteins import SET_FIELDS, Proteins, rename_column
from esm2kit.tasks.sources import Source
from esm2kit.tasks.task_data import SET_NAMES

ADDED = ("id_a", "id_b", "sequence_a", "sequence_b")
PARTNER_FIELDS = ("INTERACTOR", "SEQINTERACTOR")  # of a FASTA header


class PairTable(NamedTuple):
    """The pairs of a file.

    Args:
        columns: names of the columns.
        rows: cells of each pair.
        places_P2: (P, 2) places of its proteins in `proteins`.
        proteins: the different sequences.
    """

    columns: list[str]
    rows: list[list[str]]
    places_P2: np.ndarray
    proteins: Proteins


def find_pair_file(config: SplitConfig) -> Path | None:
    """Find the file of pairs that a configuration names.

    Args:
        config: fasta, labels or check.

    Returns:
        The file; None if the proteins are single ones.

    Raises:
        InputError: pairs are to be checked, or to be divided into folds or by labels.
    """
    path = config.check or config.labels
    if path is None and isinstance(config.fasta, Path) and config.fasta.is_file():
        path = config.fasta
    needs_sequences = config.fasta is None or path == config.fasta
    if path is None or config.id is not None or not has_pairs(expand_path(path), needs_sequences):
        return None
    if config.check is not None:
        raise InputError(
            f"{path} has pairs of proteins, and a leakage report is one of single proteins. Run esm2kit benchmark with "
            "it as --labels: its report has the scores of test pairs by the number of their proteins that train has.",
            code="split.pairs-check",
            path=path,
        )
    if config.folds is not None:
        raise InputError(
            f"{path} has pairs of proteins: with {config.folds} folds of proteins, about one pair in {config.folds} "
            "has both in one fold, and the others would be lost. Omit folds, and set fractions.",
            code="split.pairs-folds",
            path=path,
            folds=config.folds,
        )
    if config.target is not None:
        raise InputError(
            f"{path} has pairs of proteins, whose sets follow from those of the proteins and not from labels. Omit "
            f"target '{config.target}'.",
            code="split.pairs-target",
            path=path,
            target=config.target,
        )
    return path


def read_pair_table(path: Path, fasta: Path | list[Path] | None = None) -> PairTable:
    """Read pairs with all columns of their table.

    Args:
        path: table with the columns of pairs, or biotrainer's FASTA with INTERACTOR.
        fasta: sequences of the names in a table; None if the table has the sequences, or for a FASTA of pairs.

    Returns:
        The pairs. Columns of sets are named previous_set and so on; names and sequences are added where the table has
        no columns with them.

    Raises:
        InputError: a record is invalid.
    """
    path, notes = expand_path(path), []
    if path.is_dir() or is_workbook(path) or Source(path).is_table:
        table = read_table_or_sets(path)
        places = find_pair_columns(table.columns)
        assert places is not None
        pairs, sources = read_table_pairs(table, places, fasta)
        files = [source.path for source in sources.values()]
        kept = [number for number, pair in enumerate(pairs) if pair is not None]
        pairs, rows = [pairs[number] for number in kept], [list(table.rows[number]) for number in kept]
        columns = [rename_column(name) for name in table.columns]
        added = [] if places.ids else list(ADDED[:2])
        added += [] if places.sequences else list(ADDED[2:])
        if len(kept) < len(table.rows):
            left = format_count(len(table.rows) - len(kept), "row")
            notes.append(f"left out without a sequence of both proteins: {left}")
    else:
        found, files = read_fasta_pairs(Source(path)), [path]
        pairs: list[ProteinPair] = [((a, first), (b, second)) for a, first, b, second, _ in found]
        names = dict.fromkeys(name for *_, fields in found for name in fields if name not in PARTNER_FIELDS)
        names = [name for name in names if name not in SET_FIELDS]
        rows = [[fields.get(name, "") for name in names] for *_, fields in found]
        columns, added = [rename_column(name.lower()) for name in names], list(ADDED)
    texts = [
        dict(zip(ADDED, (first_id, second_id, first, second), strict=True))
        for (first_id, first), (second_id, second) in pairs
    ]
    rows = [[*(text[name] for name in added), *row] for text, row in zip(texts, rows, strict=True)]
    id_of: dict[str, str] = {}
    for pair in pairs:
        for name, sequence in pair:
            id_of.setdefault(sequence, name)
    place_of = {sequence: place for place, sequence in enumerate(sorted(id_of))}
    places_P2 = np.array([[place_of[sequence] for _, sequence in pair] for pair in pairs])
    proteins = Proteins([id_of[sequence] for sequence in place_of], list(place_of), {}, files, notes)
    return PairTable([*added, *columns], rows, places_P2, proteins)


def name_pair_sets(pairs: PairTable, sets: np.ndarray) -> np.ndarray:
    """Return the set of each pair (P,): that of both proteins, or empty if they are in different sets."""
    first_P, second_P = sets[pairs.places_P2].T
    return np.where(first_P == second_P, first_P, "")


def describe_pairs(pairs: PairTable, sets: np.ndarray) -> tuple[dict[str, Any], str]:
    """Describe the pairs that the sets of their proteins keep.

    Args:
        pairs: the pairs.
        sets: set of each protein.

    Returns:
        The number of pairs of each set and of those that are left out, and a sentence.

    Raises:
        InputError: a set has no pair.
    """
    pair_sets = name_pair_sets(pairs, sets)
    names = [name for name in SET_NAMES if name in sets]
    counts = {name: int((pair_sets == name).sum()) for name in names}
    if empty := next((name for name, count in counts.items() if not count), None):
        raise InputError(
            f"no pair has both proteins in {empty}, of {format_count(len(pair_sets), 'pair')} of "
            f"{format_count(len(sets), 'protein')}. Set larger fractions for validation and test, another seed, or a "
            "higher identity.",
            code="split.pairs-empty",
            set=empty,
            counts=counts,
        )
    kept = sum(counts.values())
    listed = [f"{name} {count:,}" for name, count in counts.items()]
    sentence = (
        f"{kept:,} of {format_count(len(pair_sets), 'pair')} have both proteins in one set ({', '.join(listed)}); the "
        "others are left out."
    )
    return counts | {"left_out": len(pair_sets) - kept}, sentence


def write_pair_table(path: Path, pairs: PairTable, sets: np.ndarray) -> None:
    """Write the pairs whose proteins are in one set, with their columns and the set, as FLIP does."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*pairs.columns, "set", "validation"])
        for row, name in zip(pairs.rows, name_pair_sets(pairs, sets).tolist(), strict=True):
            if name:
                table.writerow([*row, *(["train", "True"] if name == "validation" else [name, ""])])
