"""Read pairs of proteins: tables with two sequences or two names a row, and biotrainer's FASTA with INTERACTOR."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.fasta import find_fasta_files
from esm2kit.sequences.headers import parse_header
from esm2kit.tasks.files import ATTRIBUTE, TaskRecord, check_sequence, parse_set, read_records
from esm2kit.tasks.kinds import TDC_PAIRS, TDC_TARGET, find_set_files, peek_table, read_set_files
from esm2kit.tasks.labels_table import (
    TARGET_NAMES,
    UNASSIGNED,
    VALIDATION_NAMES,
    find_set_column,
    read_cells,
    read_fasta_records,
)
from esm2kit.tasks.matching import RecordMatcher
from esm2kit.tasks.pairs import check_ids
from esm2kit.tasks.sources import Source
from esm2kit.tasks.tables import Table, read_table, split_unit
from esm2kit.tasks.task import TargetType

# Words in the names of columns of pairs; what remains is a or b, or 1 or 2: sequence_a, seq1, Protein 1, uniprot_B.
WORDS = re.compile(r"sequence|seq|proteins?|interactor|uniprot|accession|entry|name|gene|id|[\W_]+")
WORKBOOK = re.compile(r"\.xls[xm](:.+)?$", re.IGNORECASE)
ENDS = (("a", "b"), ("1", "2"))
INTERACTION_NAMES = TARGET_NAMES | {"interaction", "interacts", "interacting", "binding", "affinity", "score"}


class PairRecord(NamedTuple):
    """A pair as read from its file: the record of the first protein with the target, and the second protein."""

    row: TaskRecord
    first_id: str
    second_id: str
    second: str


class PairFile(NamedTuple):
    """The pairs of a file.

    Args:
        records: the pairs. `set` is UNASSIGNED if the file has no sets.
        targets: names of the columns of the targets.
        set_column: name of the column of the sets; empty without one.
        files: "split", and "fasta" if the names are those of a FASTA.
        notes: what was read from where, and left out.
    """

    records: list[PairRecord]
    targets: tuple[str, ...]
    set_column: str
    files: dict[str, Source]
    notes: list[str]


class PairColumns(NamedTuple):
    """The places of the two columns of sequences, and of the two columns of names; None without them."""

    sequences: tuple[int, int] | None
    ids: tuple[int, int] | None


def find_pair_columns(columns: Sequence[str]) -> PairColumns | None:
    """Find the columns of the two proteins of a pair.

    Args:
        columns: names of the columns, such as sequence_a and sequence_b, seq1 and seq2, or protein1 and protein2.

    Returns:
        Their places; None if the table is not of pairs.
    """
    for first, second in TDC_PAIRS:
        ids = (f"{first}_ID", f"{second}_ID")
        if {first, second, *ids, TDC_TARGET} <= set(columns):
            sequences, named = ((columns.index(a), columns.index(b)) for a, b in ((first, second), ids))
            return PairColumns(sequences, named)
    found: dict[tuple[bool, str], int] = {}
    for place, column in enumerate(columns):
        name = column.lower()
        rest = WORDS.sub("", name)
        if rest in ("a", "b", "1", "2") and rest != name.strip():
            found.setdefault(("seq" in name, rest), place)

    def choose(sequences: bool) -> tuple[int, int] | None:
        both = [(found.get((sequences, a)), found.get((sequences, b))) for a, b in ENDS]
        return next(((a, b) for a, b in both if a is not None and b is not None), None)

    if "sequence" in map(str.lower, columns):
        return None
    pair = PairColumns(choose(True), choose(False))
    return pair if pair.sequences or pair.ids else None


def has_pairs(path: Path, needs_sequences: bool) -> bool:
    """Whether a file is of pairs: a table with their columns, or a FASTA whose first record has INTERACTOR.

    Args:
        path: the file.
        needs_sequences: whether a table must have the sequences, because there is no FASTA with them.

    Returns:
        True or False; False for a file that cannot be read, which other readers report.
    """
    if path.is_dir():  # with a file per set
        path = next(iter(find_set_files(path).get("train", ())), path)
    if not path.is_file() and not is_workbook(path):
        return False
    source = Source(path)
    if source.is_table or not needs_sequences or is_workbook(path):
        try:
            table = read_table(path) if is_workbook(path) else peek_table(path)
        except InputError:
            return False
        columns = table and find_pair_columns(table.columns)
        return bool(columns and (columns.sequences or not needs_sequences))
    try:
        header, _ = next(read_records(source))
    except InputError:
        return False
    return any(key.upper() == "INTERACTOR" for key, _ in ATTRIBUTE.findall(header))


def is_workbook(path: Path) -> bool:
    """Whether a path is of an Excel workbook, or of a sheet of one."""
    return WORKBOOK.search(path.name) is not None


def read_pairs(
    path: Path,
    fasta: Path | None = None,
    target: str | Sequence[str] | None = None,
    set_name: str | None = None,
    target_type: TargetType | None = None,
) -> PairFile:
    """Read a file of pairs with their targets.

    Args:
        path: table or FASTA.
        fasta: sequences of the names in a table; None if the table has the sequences.
        target: column, or header field, of the targets, or several. None is the only column that can be it.
        set_name: column of the sets. None is one with such a name.
        target_type: as for `labels_table.read_labels`.

    Returns:
        The pairs.

    Raises:
        InputError: a column or a protein is not found, or a record is invalid.
    """
    set_files = find_set_files(path) if path.is_dir() else {}
    if fasta is None and not set_files and not Source(path).is_table and not is_workbook(path):
        return _read_pair_fasta(Source(path), target)
    table = read_set_files(set_files) if set_files else read_table(path)
    places = find_pair_columns(table.columns)
    names = [target] if isinstance(target, str) else list(target or ())
    set_place = find_set_column(table, set_name)
    used = {set_place, *(places.sequences or ()), *(places.ids or ())}
    targets = tuple(map(table.find_column, names)) or (_find_target(table, used),)
    columns = [read_cells(table, place, target_type) for place in targets]
    validation = next((i for i, name in enumerate(table.columns) if name.lower() in VALIDATION_NAMES), -1)
    proteins, files = read_table_pairs(table, places, fasta)
    records, missing = [], Counter()
    for number, (row, pair) in enumerate(zip(table.rows, proteins, strict=True)):
        cells = tuple(column.cells[number] for column in columns)
        chosen: str | None = UNASSIGNED
        if set_place >= 0:
            chosen = parse_set(
                f"row {number + 1}", row[set_place], row[validation] if validation >= 0 else "", Source(path)
            )
        left_out = "protein" if pair is None else "set" if chosen is None else "" if any(cells) else "value"
        if left_out:
            missing[left_out] += 1
            continue
        (first_id, first), (second_id, second) = pair
        several = cells if len(cells) > 1 else ()
        record = TaskRecord(f"{first_id} {second_id}", first, cells[0] or None, chosen, None, several)
        records.append(PairRecord(record, first_id, second_id, second))
    if not records:
        raise InputError(
            f"{path}: no row has two proteins, a target and a set. Check the names of the columns and of the proteins.",
            code="pairs.empty",
            path=path,
        )
    shown = " and ".join(repr(table.columns[place]) for place in places.sequences or places.ids)
    is_tdc = places.sequences is not None and tuple(table.columns[place] for place in places.sequences) in TDC_PAIRS
    read_as = "read as a TDC table: " if is_tdc else ""
    note = f"{path.name}: {read_as}pairs of proteins from {shown}, "
    note += f"target {', '.join(table.columns[place] for place in targets)}"
    note += "".join(f"; {each}" for each in table.notes)
    note += "".join(f"; {format_count(count, 'row')} without a {what}" for what, count in missing.items())
    set_column = table.columns[set_place] if set_place >= 0 else ""
    files |= {f"split/{each.name}": Source(each) for paths in set_files.values() for each in paths}
    return PairFile(records, tuple(table.columns[place] for place in targets), set_column, files, [note])


ProteinPair = tuple[tuple[str, str], tuple[str, str]]


def read_table_pairs(
    table: Table, places: PairColumns, fasta: Path | list[Path] | None
) -> tuple[list[ProteinPair | None], dict[str, Source]]:
    """Read the two proteins of each row of a table.

    Args:
        table: the table.
        places: its columns.
        fasta: sequences of the names; None if the table has the sequences.

    Returns:
        (id, sequence) of both proteins of each row, None where one is missing from the FASTA; and the files.

    Raises:
        InputError: a sequence is invalid, or a name has two sequences.
    """
    source = Source(table.path)
    if fasta is None:
        sequences = [
            [check_sequence(f"row {number + 1}", row[place], source) for place in places.sequences]
            for number, row in enumerate(table.rows)
        ]
        number_of: dict[str, str] = {}
        ids = [
            [row[place] for place in places.ids]
            if places.ids
            else [number_of.setdefault(sequence, f"protein{len(number_of) + 1}") for sequence in pair]
            for row, pair in zip(table.rows, sequences, strict=True)
        ]
        flat = [name for pair in ids for name in pair], [sequence for pair in sequences for sequence in pair]
        check_ids(*flat, source)
        pairs = [tuple(zip(names, pair, strict=True)) for names, pair in zip(ids, sequences, strict=True)]
        return pairs, {"split": source}
    if places.ids is None:
        raise InputError(
            f"{table.path} has the sequences of its pairs in columns. Omit the FASTA.",
            code="pairs.fasta-unused",
            path=table.path,
        )
    files = find_fasta_files(fasta)
    records = read_fasta_records(files)
    matcher = RecordMatcher(records)
    found = [matcher.match(table.cells(place)).records for place in places.ids]
    pairs = [
        tuple((records[place].id, records[place].sequence) for place in pair) if min(pair) >= 0 else None
        for pair in zip(*found, strict=True)
    ]
    if not any(pairs):
        cell = table.rows[0][places.ids[0]]
        raise InputError(
            f"{table.path}: no row names two proteins of {fasta}: its ids are like {records[0].id!r}, the cells like "
            f"{cell!r}. Use the same names.",
            code="labels.no-match",
            found=cell,
            expected=records[0].id,
            path=table.path,
        )
    return pairs, {"split": source} | {f"fasta/{file.name}": Source(file) for file in files}


def _find_target(table: Table, used: set[int]) -> int:
    """Find the column of the targets: by its name, or the only column that is left."""
    free = [
        place for place, name in enumerate(table.columns) if place not in used and name.lower() not in VALIDATION_NAMES
    ]
    named = [place for place in free if split_unit(table.columns[place])[0].lower() in INTERACTION_NAMES]
    found = named or free
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(table.columns[place]) for place in found) or "none"
    raise InputError(
        f"{table.path}: the columns that may be the target of the pairs are {listed}. Choose with --target.",
        code="labels.which-target",
        allowed=tuple(table.columns[place] for place in found),
        path=table.path,
    )


def read_fasta_pairs(source: Source) -> list[tuple[str, str, str, str, dict[str, str]]]:
    """Read biotrainer's FASTA of pairs.

    The second protein is named by INTERACTOR=. Its sequence is in SEQINTERACTOR=, or below the record of that id.

    Args:
        source: the file.

    Returns:
        Ids and sequences of the first and of the second protein, and the fields of the header, of each pair.

    Raises:
        InputError: a second protein has no sequence.
    """
    parsed, sequence_of = [], {}
    for header, body in read_records(source):
        row_id, text = parse_header(header)
        fields = {key.upper(): value.strip() for key, value in ATTRIBUTE.findall(text)}
        sequence = check_sequence(row_id, body, source)
        sequence_of.setdefault(row_id, sequence)
        parsed.append((row_id, sequence, fields))
    pairs = []
    for row_id, sequence, fields in parsed:
        if "INTERACTOR" not in fields:
            continue  # the sequence of a second protein
        other = fields["INTERACTOR"]
        given = fields.get("SEQINTERACTOR")
        second = check_sequence(other, given, source) if given else sequence_of.get(other)
        if second is None:
            raise InputError(
                f"{source}: record {row_id!r} has INTERACTOR={other}, whose sequence is neither in SEQINTERACTOR= nor "
                "in a record of that id. Add one of them.",
                code="pairs.no-sequence",
                record=row_id,
                found=other,
                path=source.path,
            )
        pairs.append((row_id, sequence, other, second, fields))
    return pairs


def _read_pair_fasta(source: Source, target: str | Sequence[str] | None) -> PairFile:
    """Read pairs with targets and sets from biotrainer's FASTA."""
    names = tuple(name.upper() for name in ([target or "TARGET"] if isinstance(target, str | None) else target))
    records = []
    for first_id, first, second_id, second, fields in read_fasta_pairs(source):
        row_id = f"{first_id} {second_id}"
        absent = next((name for name in (*names[:1], "SET") if name not in fields), None)
        if absent is not None:
            raise InputError(
                f"{source}: the pair {row_id!r} has no {absent}=. Add it to its header.",
                code="pairs.no-field",
                record=row_id,
                field=absent,
                path=source.path,
            )
        chosen = parse_set(row_id, fields["SET"], fields.get("VALIDATION", ""), source)
        if chosen is None:
            continue
        cells = tuple(fields.get(name, "") for name in names)
        several = cells if len(cells) > 1 else ()
        record = TaskRecord(row_id, first, cells[0] or None, chosen, None, several)
        records.append(PairRecord(record, first_id, second_id, second))
    ids = [name for pair in records for name in (pair.first_id, pair.second_id)]
    check_ids(ids, [sequence for pair in records for sequence in (pair.row.sequence, pair.second)], source)
    note = f"{source.path.name}: pairs of proteins from INTERACTOR=, target {', '.join(names)}="
    return PairFile(records, names, "SET", {"split": source}, [note])
