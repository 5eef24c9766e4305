"""Variants to score: mutations on the command line, lists, tables, ProteinGym's files and FASTA files of mutants."""

import itertools
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.scoring.config import TABLE_SUFFIXES, is_table_name
from esm2kit.scoring.mutations import (
    NamedSubstitution,
    Substitution,
    check_wild_type,
    compare_sequences,
    format_variant,
    is_wild_type_name,
    looks_like_mutation,
    parse_mutation,
    split_list,
)
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record, is_fasta_name, read_fasta
from esm2kit.tasks.labels import is_number
from esm2kit.tasks.matching import RecordMatcher
from esm2kit.tasks.tables import Table, clean_number, decode_text, is_numeric, list_missing, parse_numbers, read_table

logger = logging.getLogger(__name__)

# Usual names of columns, in lower case; the first ones have priority.
MUTATION_COLUMNS = ("mutant", "mutation", "mutations", "variant", "substitution", "hgvs_pro", "aa_change")
SEQUENCE_COLUMNS = ("mutated_sequence", "mutant_sequence", "sequence", "seq", "protein_sequence", "aa_seq")
PROTEIN_COLUMNS = ("protein", "protein_id", "uniprot_id", "uniprot", "accession", "gene")
MEASURED_COLUMN, FIT_COLUMN = "dms_score", "dms_score_bin"
# Columns of numbers that are not measurements: places, counts, and unnamed columns, such as a row number.
NOT_MEASURED = re.compile(
    r"(pos(ition)?|site|residue|resid|index|idx|row|n|num|number|counts?|rank|column \d+|unnamed.*)s?", re.IGNORECASE
)
MIN_MEASURED = 3  # different values for a correlation
MIN_SEQUENCE = 10  # letters from which a cell is a sequence
TARGET = re.compile(r"\bTARGET=(\S+)")
# UniProt's entry names, with which ProteinGym's files begin: B2L11_HUMAN_Dutta_2010_binding-Mcl-1
ENTRY_NAME = re.compile(r"([A-Z0-9]{1,10}_[A-Z0-9]{1,5})(_|$)")
# Texts of 1 and 0 in DMS_score_bin.
FIT = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


class Variant(NamedTuple):
    """A variant of a protein.

    Args:
        protein: index of the wild type.
        substitutions: what differs, by position; empty if `sequence` has another length than the wild type.
        sequence: the mutated sequence of an insertion or a deletion, otherwise None.
        text: its name, such as A42G:K50R, with the numbers of the input.
    """

    protein: int
    substitutions: tuple[Substitution, ...]
    sequence: str | None
    text: str


@dataclass(frozen=True)
class VariantSet:
    """Variants from one source, with their measured values if it has some.

    Args:
        name: of the file without its suffix; empty for mutations from the command line.
        variants: N different variants, in the order of the input.
        measured_N: (N,) measured values, nan where one is missing; None without measurements.
        is_fit_N: (N,) DMS_score_bin, whether a variant is above the cutoff of fitness; None without this column.
        notes: sentences on how the source was read.
    """

    name: str
    variants: list[Variant]
    measured_N: np.ndarray | None = None
    is_fit_N: np.ndarray | None = None
    notes: tuple[str, ...] = ()


class _Rows(NamedTuple):
    """The cells of a source that matter, one per variant; None for what it does not have."""

    name: str
    places: list[str]  # such as `file.csv: row 5`, for messages
    mutations: list[str] | None = None
    sequences: list[str] | None = None
    proteins: list[str] | None = None
    measured: list[float] | None = None
    is_fit: list[bool] | None = None
    notes: tuple[str, ...] = ()
    wild_type: str = ""  # from a column that repeats it
    is_table: bool = False


def list_substitutions(
    protein: int, sequence: str, positions: Iterable[int] | None = None, offset: int = 0
) -> list[Variant]:
    """List every single substitution of a protein's standard residues.

    Args:
        protein: index of the protein.
        sequence: its residues.
        positions: indices of the residues from 0, see `mutations.parse_positions`. None is all.
        offset: what is added to the number of a residue.

    Returns:
        19 variants per residue, in the order of STANDARD_RESIDUES.
    """
    return [
        Variant(protein, (Substitution(position, sequence[position], mutant),), None, text)
        for position in (range(len(sequence)) if positions is None else positions)
        if sequence[position] in STANDARD_RESIDUES
        for mutant in STANDARD_RESIDUES
        if mutant != sequence[position]
        for text in (format_variant([Substitution(position, sequence[position], mutant)], offset),)
    ]


def read_variants(
    mutations: str | Path | Sequence[str],
    proteins: Sequence[Record] = (),
    *,
    offset: int = 0,
    column: str | None = None,
    measured: str | None = None,
) -> tuple[list[Record], list[VariantSet]]:
    """Read the variants to score.

    Args:
        mutations: mutations such as `A42G,A42G:K50R`; a text file of them; a table (CSV, TSV, Excel), such as one of
            ProteinGym's; a FASTA of mutated sequences; or a folder of such tables.
        proteins: the wild types. Without them, the wild type is recovered from the mutations together with the mutated
            sequences, which ProteinGym's files have.
        offset: what is added to the number of a residue: with 25, the first residue of the FASTA is residue 26.
        column: column of the mutations or of the mutated sequences. None finds it.
        measured: column of the measured values. None is DMS_score, or else the only column of numbers.

    Returns:
        The wild types, and the variants of each file. Identical variants are one, with the mean of their measured
        values; rows of the wild type are omitted.

    Raises:
        InputError: a variant cannot be read or does not fit its wild type; the message names the first one.
    """
    path = find_path(mutations)
    if path is None:
        sources = [_split_text(mutations)]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if is_table_name(file.name))
        if not files:
            raise InputError(
                f"{path}: no table of variants in this folder. Names must end in {', '.join(TABLE_SUFFIXES)}.",
                code="mutations.none",
                path=path,
            )
        sources = [_read_rows(file, proteins, column, measured) for file in files]
    else:
        sources = [_read_rows(path, proteins, column, measured)]
    known, sets = list(proteins), []
    for rows in sources:
        only = None
        if not proteins:
            wild_type = _recover_wild_type(rows, offset)
            only = next((index for index, record in enumerate(known) if record.sequence == wild_type), len(known))
            if only == len(known):
                name = _name_protein(rows.name, {record.id for record in known})
                known.append(Record(name, name, wild_type))
        elif len(proteins) > 1 and rows.proteins is None and (rows.wild_type or (rows.mutations and rows.sequences)):
            only = _find_wild_type(rows, proteins, offset)
        sets.append(_build_set(rows, known, only, offset))
        if not rows.is_table:
            check_no_columns(rows.name or "mutations", column, measured)
        for note in sets[-1].notes:
            logger.info("%s: %s", rows.name or "mutations", note)
    return known, sets


def check_no_columns(name: str, column: str | None, measured: str | None) -> None:
    """Check that no column is named for what has none.

    Args:
        name: what is scored, for the message.
        column: as for `read_variants`.
        measured: as for `read_variants`.

    Raises:
        InputError: one is named.
    """
    if named := column or measured:
        raise InputError(
            f"{name}: column {named!r} is named, but this is no table. Pass a table (CSV, TSV or Excel) with it, or "
            "omit --column and --measured.",
            code="mutations.no-table",
            found=named,
        )


def _name_protein(name: str, taken: set[str]) -> str:
    """Name a recovered wild type by UniProt's entry name at the start of the file's name, or by the file."""
    entry = ENTRY_NAME.match(name)
    return entry[1] if entry and entry[1] not in taken else name


def find_path(mutations: str | Path | Sequence[str]) -> Path | None:
    """Return the file or folder that is meant, or None for mutations themselves."""
    if not isinstance(mutations, str | os.PathLike):
        return None
    path = expand_path(mutations)
    sheet = re.fullmatch(r"(.+\.xls[xm]):.+", str(mutations), re.IGNORECASE)
    # unlike Path.is_file, these are False for a list of mutations that is too long for the name of a file
    if isinstance(mutations, os.PathLike) or sheet or os.path.isfile(path) or os.path.isdir(path):
        return path
    # a suffix, such as .docx, but not HGVS's p.A42G
    if re.fullmatch(r"(?!p\.)[^,\s]+\.[a-z][a-z0-9]{1,5}", str(mutations), re.IGNORECASE):
        raise InputError(f"{path}: no such file. Check the path.", code="mutations.absent", path=path)
    return None


def _split_text(mutations: str | Sequence[str]) -> _Rows:
    """Split mutations of the command line or of Python."""
    texts = [mutations] if isinstance(mutations, str) else list(mutations)
    found = [part for text in texts for part in split_list(text)]
    if not found:
        raise InputError("no mutations given. Write them such as A42G,K50R.", code="mutations.none")
    return _Rows("", ["mutations"] * len(found), found)


def _read_rows(path: Path, proteins: Sequence[Record], column: str | None, measured: str | None) -> _Rows:
    """Read a FASTA, a list or a table."""
    if not path.is_file() and ":" not in path.name:
        raise InputError(f"{path}: no such file. Check the path.", code="mutations.absent", path=path)
    if is_fasta_name(path.name):
        return _read_fasta(path, proteins)
    start = path.read_bytes()[:4] if path.is_file() else b"PK"
    if start[:2] != b"PK" and start[:1] != b"\xd0":
        lines = [line.strip() for line in decode_text(path)[0].splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if lines and lines[0].startswith(">"):
            return _read_fasta(path, proteins)
        rows = _read_list(path, lines)
        if rows is not None:
            return rows
    return _read_table(read_table(path), proteins, column, measured)


def _read_list(path: Path, lines: list[str]) -> _Rows | None:
    """Read lines of mutations, which may follow one name of a column; None if this is a table."""
    if not lines:
        raise InputError(
            f"{path} is empty. Write one mutation per line, such as A42G.", code="mutations.none", path=path
        )
    # a name of a column has no number; K50del in the first line is a variant, and an error
    is_name = not re.search(r"\d", lines[0]) and not looks_like_mutation(lines[0])
    header = int(is_name and len(re.split(r"[\t,;|]", lines[0])) == 1 and len(lines) > 1)
    cells = [split_list(line) for line in lines[header:]]
    # semicolons may also separate the columns of a table
    single = all(len(parts) == 1 and (";" not in parts[0] or looks_like_mutation(parts[0])) for parts in cells)
    if not (single or all(looks_like_mutation(part) for parts in cells for part in parts)):
        first = cells[0][0]
        if not header and looks_like_mutation(first):
            raise InputError(
                f"{path}: the first line {lines[0][:60]!r} has no names of columns. Add such a line, for example "
                "'mutant,DMS_score'.",
                code="mutations.no-header",
                path=path,
            )
        return None
    places = [f"{path.name}: line {number}" for number, parts in enumerate(cells, header + 1) for _ in parts]
    return _Rows(strip_suffix(path), places, [part for parts in cells for part in parts])


def strip_suffix(path: Path) -> str:
    """Return the name of a file without its suffixes; points in the name stay."""
    return re.sub(r"\.(csv|tsv|txt|xls[xm]|fasta|fa|faa|fas)?(\.gz|\.zst)?$", "", path.name, flags=re.IGNORECASE)


def _read_fasta(path: Path, proteins: Sequence[Record]) -> _Rows:
    """Read a FASTA of mutated sequences; without a wild type, the ids are the mutations."""
    records = list(read_fasta(path))
    places = [f"{path.name}: record {record.id!r}" for record in records]
    targets = [TARGET.search(record.description) for record in records]
    measured = None
    if any(targets):
        measured = [
            _parse_measured(found[1], place, "TARGET") if found else float("nan")
            for found, place in zip(targets, places, strict=True)
        ]
    sequences = [record.sequence for record in records]
    mutations = None if proteins else [record.id for record in records]
    if mutations and not looks_like_mutation(mutations[0]):
        raise InputError(
            f"{path}: the wild type of these sequences is not known. Pass its FASTA.",
            code="mutations.no-wild-type",
            path=path,
        )
    return _Rows(strip_suffix(path), places, mutations, sequences, measured=measured)


def _read_table(table: Table, proteins: Sequence[Record], column: str | None, measured: str | None) -> _Rows:
    """Find the columns of a table."""
    cells = [table.cells(place) for place in range(len(table.columns))]
    are_mutations = [_has_most(found, looks_like_mutation) for found in cells]
    are_sequences = [_has_most(found, _looks_like_sequence) for found in cells]
    chosen = None if column is None else table.find_column(column)
    if chosen is not None and are_sequences[chosen]:
        mutation, sequence = None, chosen
    else:  # a chosen column with another content is read as mutations, and the error names its first cell
        mutation = _choose_column(table, are_mutations, MUTATION_COLUMNS) if chosen is None else chosen
        sequence = _choose_column(table, are_sequences, SEQUENCE_COLUMNS)
    if mutation is None and sequence is None:
        raise InputError(
            f"{table.path} has no column of mutations, such as A42G, or of mutated sequences; its columns are "
            f"{', '.join(map(repr, table.columns))}.",
            code="mutations.no-column",
            path=table.path,
        )
    places = [f"{table.path.name}: row {number}" for number in range(2, len(table.rows) + 2)]
    names = [name.casefold().strip() for name in table.columns]
    fit = names.index(FIT_COLUMN) if FIT_COLUMN in names else None
    protein = _find_proteins(table, cells, proteins, {mutation, sequence})
    used = {mutation, sequence, fit, protein}
    value, notes = _find_measured(table, cells, measured, used)
    sequences = None if sequence is None else [cell.upper().removesuffix("*") for cell in cells[sequence]]
    wild_type = ""
    if sequences and mutation is not None and len(set(sequences)) == 1 < len(set(cells[mutation])):
        wild_type, sequences = sequences[0], None
        notes.append(f"column {table.columns[sequence or 0]!r} is the wild type")
    return _Rows(
        strip_suffix(table.path),
        places,
        None if mutation is None else cells[mutation],
        sequences,
        None if protein is None else cells[protein],
        None if value is None else _parse_column(table, value, places),
        None if fit is None else [_parse_fit(cell, place) for cell, place in zip(cells[fit], places, strict=True)],
        (*table.notes, *notes),
        wild_type,
        is_table=True,
    )


def _has_most(cells: Sequence[str], has_form: Any) -> bool:
    """Return whether most cells with text have a form."""
    filled = [cell for cell in cells if cell]
    return 2 * sum(map(has_form, filled)) > len(filled)


def _looks_like_sequence(cell: str) -> bool:
    return len(cell) >= MIN_SEQUENCE and set(cell.upper().removesuffix("*")) <= set(RESIDUE_LETTERS)


def _choose_column(table: Table, is_kind: list[bool], names: Sequence[str]) -> int | None:
    """Choose a column among those of a kind: the only one, or the first with a usual name."""
    found = [place for place, is_one in enumerate(is_kind) if is_one]
    usual = [place for name in names for place in found if table.columns[place].casefold().strip() == name]
    if len(found) > 1 and not usual:
        raise InputError(
            f"{table.path}: several columns have mutations or sequences "
            f"({', '.join(repr(table.columns[place]) for place in found)}). Name one with --column.",
            code="mutations.which-column",
            path=table.path,
            found=tuple(table.columns[place] for place in found),
        )
    return next(iter(usual or found), None)


def _find_proteins(
    table: Table, cells: list[list[str]], proteins: Sequence[Record], used: set[int | None]
) -> int | None:
    """Find the column that names the protein of each row."""
    free = [place for place in range(len(cells)) if place not in used]
    if len(proteins) > 1:
        matcher = RecordMatcher(list(proteins))
        counts = {place: sum(row >= 0 for row in matcher.match(cells[place]).records) for place in free}
        best = max(free, key=lambda place: counts[place], default=None)
        if best is not None and counts[best]:
            return best
    named = {table.columns[place].casefold().strip(): place for place in free}
    return next((named[name] for name in PROTEIN_COLUMNS if name in named), None)


def _find_measured(
    table: Table, cells: list[list[str]], measured: str | None, used: set[int | None]
) -> tuple[int | None, list[str]]:
    """Find the column of measured values, and write a note about it."""
    if measured is not None:
        return table.find_column(measured), []
    names = [name.casefold().strip() for name in table.columns]
    if MEASURED_COLUMN in names:
        return names.index(MEASURED_COLUMN), []
    numeric = [
        place
        for place in range(len(cells))
        if place not in used and any(cells[place]) and is_numeric(cells[place])
        and not NOT_MEASURED.fullmatch(names[place])
    ]  # fmt: skip
    if len(numeric) == 1:
        name = table.columns[numeric[0]]
        if len(set(filter(None, cells[numeric[0]]))) < MIN_MEASURED:
            return None, [f"column {name!r} has too few different numbers for measured values"]
        return numeric[0], [f"measured values are in column {name!r}"]
    if numeric:
        found = ", ".join(repr(table.columns[place]) for place in numeric)
        return None, [f"several columns have numbers ({found}); name the measured values with --measured"]
    return None, []


def _parse_column(table: Table, column: int, places: list[str]) -> list[float]:
    """Parse a column of measured values; missing ones are nan."""
    name = table.columns[column]
    numbers, _ = parse_numbers(table.cells(column), table, name)
    missing = list_missing(numbers, True)
    values = [
        float("nan") if cell.lower() in missing else _parse_measured(cell, place, name)
        for cell, place in zip(numbers, places, strict=True)
    ]
    if not any(np.isfinite(values)):
        raise InputError(
            f"{table.path}: column {name!r} has no measured value. Name another one with --measured.",
            code="mutations.no-measured",
            path=table.path,
            column=name,
        )
    return values


def _parse_measured(text: str, place: str, column: str) -> float:
    text = clean_number(text)
    if not is_number(text) or not np.isfinite(float(text)):
        raise InputError(
            f"{place}: {column} is {text!r}, which is not a finite number. Correct it, or leave the cell empty.",
            code="mutations.measured",
            found=text,
            column=column,
        )
    return float(text)


def _parse_fit(text: str, place: str) -> bool:
    if text.lower() not in FIT:
        raise InputError(
            f"{place}: DMS_score_bin is {text!r}. Write 1 for a variant above the cutoff and 0 for one below it.",
            code="mutations.fit",
            found=text,
        )
    return FIT[text.lower()]


def _recover_wild_type(rows: _Rows, offset: int) -> str:
    """Recover the wild type by reverting each mutation in its mutated sequence."""
    if rows.wild_type:
        return rows.wild_type
    if rows.mutations is None or rows.sequences is None:
        raise InputError(
            f"{rows.name or 'mutations'}: the wild type is not known. Pass its FASTA; only tables with mutations and "
            "mutated sequences, such as ProteinGym's, need none.",
            code="mutations.no-wild-type",
        )
    wild_types: Counter[str] = Counter()
    first: dict[str, str] = {}
    for place, text, sequence in zip(rows.places, rows.mutations, rows.sequences, strict=True):
        letters = list(sequence)
        if not is_wild_type_name(text):
            for number, wild, mutant in parse_mutation(text, place):
                index = number - 1 - offset
                if not 0 <= index < len(letters) or letters[index] != mutant:
                    found = letters[index] if 0 <= index < len(letters) else "no residue"
                    _raise_sequence(place, text, number, found, mutant)
                letters[index] = wild
        wild_type = "".join(letters)
        wild_types[wild_type] += 1
        first.setdefault(wild_type, f"{place}: {text}")
    (common, count), *others = wild_types.most_common()
    if others:
        raise InputError(
            f"{first[others[0][0]]} gives another wild type than {first[common]} and {format_count(count, 'row')} in "
            "all. A table has variants of one protein; otherwise pass a FASTA and a column that names the protein.",
            code="mutations.two-wild-types",
            found=len(wild_types),
        )
    return common


def _find_wild_type(rows: _Rows, proteins: Sequence[Record], offset: int) -> int:
    """Find the protein of a FASTA that is the wild type of a table with mutated sequences."""
    wild_type = _recover_wild_type(rows, offset)
    found = [index for index, record in enumerate(proteins) if record.sequence == wild_type]
    if not found:
        raise InputError(
            f"{rows.name}: none of the {len(proteins)} proteins of the FASTA is the wild type of the mutated "
            "sequences. Add it, or omit the FASTA.",
            code="mutations.no-wild-type",
            found=len(proteins),
        )
    return found[0]


def _raise_sequence(place: str, text: str, number: int, found: str, expected: str) -> None:
    raise InputError(
        f"{place}: the mutated sequence does not have mutation {text!r}: at position {number} it has {found!r}, not "
        f"{expected!r}. Correct the row, or pass --offset.",
        code="mutations.sequence",
        mutation=text,
        position=number,
        found=found,
    )


def _assign_proteins(rows: _Rows, proteins: Sequence[Record], only: int | None) -> list[int]:
    """Return the protein of each row: by a column, or the only one."""
    num_rows = len(rows.places)
    single = len(proteins) == 1 or only is not None
    if rows.proteins is None and not single:
        raise InputError(
            f"{rows.name or 'mutations'}: the FASTA has {len(proteins)} proteins, and nothing names the protein of a "
            "mutation. Pass a FASTA of one protein, or a table with a column of ids.",
            code="mutations.proteins",
            found=len(proteins),
        )
    if rows.proteins is None or single:
        named = [] if rows.proteins is None else list(dict.fromkeys(filter(None, rows.proteins)))
        if len(named) > 1:
            raise InputError(
                f"{rows.name}: the table has mutations of several proteins ({', '.join(named[:3])}"
                f"{', ...' if len(named) > 3 else ''}). Pass a FASTA with all of them, or one table per protein.",
                code="mutations.proteins",
                found=len(named),
            )
        return [only or 0] * num_rows
    found = RecordMatcher(list(proteins)).match(rows.proteins).records
    if -1 in found:
        row = found.index(-1)
        raise InputError(
            f"{rows.places[row]}: the protein {rows.proteins[row]!r} is not in the FASTA. Add it, or remove the row.",
            code="mutations.unknown-protein",
            found=rows.proteins[row],
        )
    return list(found)


def _build_set(rows: _Rows, proteins: Sequence[Record], only: int | None, offset: int) -> VariantSet:
    """Parse, check and merge the variants of a source."""
    protein_N = _assign_proteins(rows, proteins, only)
    if rows.mutations is not None:
        variants = _parse_mutations(rows, rows.mutations, proteins, protein_N, offset)
    else:
        variants = []
        for place, protein, sequence in zip(rows.places, protein_N, rows.sequences or [], strict=True):
            found, text = compare_sequences(proteins[protein].sequence, sequence, offset, place)
            variants.append(Variant(protein, found, None if found or not text else sequence, text))
    return _merge(rows, variants)


def _parse_mutations(
    rows: _Rows, mutations: list[str], proteins: Sequence[Record], protein_N: list[int], offset: int
) -> list[Variant]:
    """Parse mutations, compare their letters with the wild types, and with the mutated sequences if there are any."""
    named: list[tuple[NamedSubstitution, ...]] = []
    by_protein: dict[int, list[tuple[str, tuple[NamedSubstitution, ...]]]] = defaultdict(list)
    for place, text, protein in zip(rows.places, mutations, protein_N, strict=True):
        if not text:
            raise InputError(f"{place} has no mutation. Write one, or remove the row.", code="mutations.empty-cell")
        named.append(() if is_wild_type_name(text) else parse_mutation(text, place))
        by_protein[protein].append((f"{place}: mutation {text!r}", named[-1]))
    for protein, found in by_protein.items():
        check_wild_type(proteins[protein].id, proteins[protein].sequence, found, offset)
    variants = []
    for row, (protein, substitutions) in enumerate(zip(protein_N, named, strict=True)):
        found = tuple(Substitution(number - 1 - offset, wild, mutant) for number, wild, mutant in substitutions)
        if rows.sequences is not None:
            _check_sequence(rows, row, mutations[row], proteins[protein].sequence, found, offset)
        variants.append(Variant(protein, found, None, format_variant(found, offset)))
    return variants


def _check_sequence(
    rows: _Rows, row: int, text: str, wild_type: str, substitutions: Sequence[Substitution], offset: int
) -> None:
    """Check that the mutated sequence of a row is the wild type with its substitutions."""
    expected = list(wild_type)
    for position, _, mutant in substitutions:
        expected[position] = mutant
    sequence = (rows.sequences or [])[row]
    if sequence == "".join(expected):
        return
    if len(sequence) != len(expected):
        raise InputError(
            f"{rows.places[row]}: the mutated sequence of {text!r} has {len(sequence)} residues, the wild type "
            f"{len(expected)}. Correct the row, or choose one of the columns with --column.",
            code="mutations.sequence-length",
            mutation=text,
            found=len(sequence),
            expected=len(expected),
        )
    index = next(index for index, letter in enumerate(expected) if letter != sequence[index])
    _raise_sequence(rows.places[row], text, index + 1 + offset, sequence[index], expected[index])


def _merge(rows: _Rows, variants: list[Variant]) -> VariantSet:
    """Omit the wild type, and make identical variants one, with the mean of their measured values."""
    notes = list(rows.notes)
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row, variant in enumerate(variants):
        if variant.text:
            members[variant.protein, variant.substitutions, variant.sequence].append(row)
    if omitted := sum(not variant.text for variant in variants):
        notes.append(f"{format_count(omitted, 'row')} of the wild type omitted")
    if not members:
        raise InputError(
            f"{rows.name or 'mutations'}: all rows are the wild type. Add a mutation.", code="mutations.none"
        )
    groups = list(members.values())
    if repeated := sum(len(group) > 1 for group in groups):
        mean = "; their measured values are averaged" if rows.measured is not None else ""
        notes.append(f"{format_count(repeated, 'variant')} in several rows, scored once{mean}")
    return VariantSet(
        rows.name,
        [variants[group[0]] for group in groups],
        None if rows.measured is None else np.array([_mean([rows.measured[row] for row in group]) for group in groups]),
        None if rows.is_fit is None else np.array([_agree(rows, rows.is_fit, variants, group) for group in groups]),
        tuple(notes),
    )


def _mean(values: list[float]) -> float:
    """Average the values that are not missing; a single one is returned unchanged."""
    found = [value for value in values if np.isfinite(value)]
    return float(np.mean(found)) if found else float("nan")


def _agree(rows: _Rows, is_fit: list[bool], variants: list[Variant], group: list[int]) -> bool:
    """Return the common DMS_score_bin of identical variants."""
    for first, second in itertools.pairwise(group):
        if is_fit[first] != is_fit[second]:
            raise InputError(
                f"{rows.places[second]}: {variants[second].text} has another DMS_score_bin than in "
                f"{rows.places[first]}. Correct one of them.",
                code="mutations.fit-differs",
                mutation=variants[second].text,
            )
    return is_fit[group[0]]
