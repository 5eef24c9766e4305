"""Sequences of ProteinGym's variants from the wild type of its reference file, for assays without a column of them."""

import re
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.tasks.tables import Table, read_table

REFERENCE = "DMS_substitutions.csv"
MUTANT, SEQUENCE, SCORE = "mutant", "mutated_sequence", "DMS_score"
MUTATION = re.compile(r"([A-Z])(\d+)([A-Z])")


def add_sequences(table: Table) -> Table:
    """Add the column mutated_sequence to an assay that lacks it, from the reference file next to it or above it.

    Args:
        table: a table.

    Returns:
        The assay with its sequences; the table itself if it has them, is no assay, or there is no reference file.

    Raises:
        InputError: the reference file does not have the assay, or a mutation does not fit the wild type.
    """
    if SEQUENCE in table.columns or not {MUTANT, SCORE} <= set(table.columns):
        return table
    folders = (table.path.parent, table.path.absolute().parent.parent)
    path = next((folder / REFERENCE for folder in folders if (folder / REFERENCE).is_file()), None)
    if path is None:
        return table
    wild = _find_wild_type(path, table.path)
    rows = [[*row, mutate(wild, row[table.columns.index(MUTANT)], table.path)] for row in table.rows]
    note = f"sequences from the wild type in {path.name}"
    return table._replace(columns=[*table.columns, SEQUENCE], rows=rows, notes=(*table.notes, note))


def _find_wild_type(reference: Path, assay: Path) -> str:
    table = read_table(reference)
    names, ids, wild = (table.cells(table.find_column(name)) for name in ("DMS_filename", "DMS_id", "target_seq"))
    stem = assay.name.removesuffix(".gz").removesuffix(".csv")
    found = [
        sequence
        for name, row_id, sequence in zip(names, ids, wild, strict=True)
        if assay.name == name or stem == row_id
    ]
    if not found:
        raise InputError(
            f"{reference} has no assay of the file {assay.name}. Name the file as in its column DMS_filename, or add a "
            "column mutated_sequence.",
            code="task.no-wild-type",
            path=assay,
            reference=reference,
        )
    return found[0]


def mutate(wild: str, mutant: str, path: Path) -> str:
    """Apply the substitutions of a variant to the wild type.

    Args:
        wild: sequence of the wild type.
        mutant: as ProteinGym writes it: A1P, or A1P:D2N for several.
        path: of the assay, for the message.

    Returns:
        The sequence of the variant.

    Raises:
        InputError: the text is no substitution, or one of another residue than that of the wild type.
    """
    residues = list(wild)
    for text in mutant.split(":"):
        found = MUTATION.fullmatch(text)
        place = int(found[2]) - 1 if found else -1
        if not found or not 0 <= place < len(wild) or wild[place] != found[1]:
            has = f"which has {wild[place]} there" if found and 0 <= place < len(wild) else f"of {len(wild)} residues"
            raise InputError(
                f"{path}: mutation {text!r} of {mutant!r} does not fit the wild type, {has}. Correct it, or add a "
                "column mutated_sequence.",
                code="task.mutation",
                found=text,
                path=path,
            )
        residues[place] = found[3]
    return "".join(residues)
