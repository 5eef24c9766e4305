"""Join a table of measurements with the sequences of a FASTA file, or with those in the table itself."""

import logging
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_path
from esm2kit.sequences.fasta import Record, find_fasta_files, read_fasta
from esm2kit.sequences.pipes import is_pipe
from esm2kit.tasks.files import DROPPED_SETS, SETS, TaskRecord, check_sequence, parse_set
from esm2kit.tasks.kinds import (
    NATIVE,
    TableKind,
    describe_kind,
    find_kind,
    find_set_files,
    has_sequences,
    read_folds_as_sets,
    read_set_files,
)
from esm2kit.tasks.label_sets import find_row_separator, join_label_sets
from esm2kit.tasks.labels import is_number, split_residue_labels
from esm2kit.tasks.matching import Matches, RecordMatcher
from esm2kit.tasks.sources import Source
from esm2kit.tasks.tables import MISSING, Table, is_numeric, list_missing, parse_numbers, read_table, split_unit
from esm2kit.tasks.task import TargetType
from esm2kit.tasks.wild_types import add_sequences

logger = logging.getLogger(__name__)

UNASSIGNED = "unassigned"  # the set of a record whose table has no sets
SET_NAMES = {"set", "split", "partition", "subset", "dataset"}
VALIDATION_NAMES = {"validation", "is_validation"}
FOLD_NAMES = {"fold", "folds"}
TARGET_NAMES = {"target", "label", "value", "y", "measurement", "class"}
ID_NAMES = {"id", "protein", "name", "accession", "entry", "protein id", "protein_id", "uniprot", "identifier"}
SHORTEST = 20  # residues of the median sequence in a column whose name does not contain "seq"
EXAMPLES = 3
CELL_SEPARATOR = "\t"  # between the targets of a row, whose cells have no tabs


class LabelRecords(NamedTuple):
    """The labelled proteins of a table.

    Args:
        rows: one record per protein, in the order of the FASTA, or of the table that holds the sequences. `set` is
            UNASSIGNED if the table has no sets.
        targets: names of the columns of the targets.
        set_column: name of the column of the sets; empty without one.
        files: "labels" and, if there is one, "fasta".
        notes: what was read from where, joined and left out.
        kind: of the table, if another project published it.
    """

    rows: list[TaskRecord]
    targets: tuple[str, ...]
    set_column: str
    files: dict[str, Source]
    notes: list[str]
    kind: TableKind | None = None


class _Columns(NamedTuple):
    """The places of the columns that are read; -1 for one that the table does not have."""

    id: int
    targets: tuple[int, ...]
    set: int
    validation: int
    sequence: int


def read_labels(
    labels: Path,
    fasta: Path | None = None,
    id: str | None = None,
    target: str | Sequence[str] | None = None,
    set: str | None = None,
    target_type: TargetType | None = None,
    others: Sequence[str] = (),
    pooled: bool = False,
) -> LabelRecords:
    """Read a table of labels and join it with the sequences.

    Args:
        labels: table, as `tables.read_table` reads it.
        fasta: file or folder with the sequences. None takes them from a column of the table.
        id: column with the names of the proteins. None is the column that names most records of the FASTA.
        target: column of the targets, or several. None is the only column of numbers, or the only other column.
        set: column with train, validation or test. None is one with such a name, if there is one.
        target_type: "class" leaves numbers as they are written, "multilabel" joins the labels of several rows of one
            protein.
        others: columns that are not the target, such as folds or groups. Columns named fold never are.
        pooled: for cross-validation: columns of folds are not sets.

    Returns:
        The records, without proteins that have no value.

    Raises:
        InputError: a column is not found, nothing matches, or two rows contradict each other.
    """
    for path in filter(None, (labels, fasta)):
        if is_pipe(path):
            raise InputError(
                f"'{path}' is a pipe, but labels and their FASTA are read several times. Save it to a file.",
                code="labels.pipe",
                path=path,
            )
    path = expand_path(labels)
    set_files = find_set_files(path) if path.is_dir() else {}
    table = add_sequences(read_set_files(set_files) if set_files else read_table(path))
    kind = find_kind(table) if fasta is None else None
    files = find_fasta_files(fasta) if fasta is not None else []
    records = read_fasta_records(files)
    if kind is not None and kind is not NATIVE:
        id = id or (kind.id if kind.id in table.columns else None)
        target, set = target or kind.target, set or (None if pooled else _choose_set_column(table, kind))
    names = [target] if isinstance(target, str) else list(target or ())
    kind_line = [describe_kind(kind, table, ", ".join(names), set or "")] if kind not in (None, NATIVE) else []
    if set is not None and not pooled:
        table = read_folds_as_sets(table, set)
    sequence = find_sequence_column(table, [id, *names], required=fasta is None)
    id_place, matches = _match_ids(table, records, fasta, id, sequence)
    set_place = find_set_column(table, set)
    validation = next((i for i, name in enumerate(table.columns) if name.lower() in VALIDATION_NAMES), -1)
    columns = _Columns(id_place, (), set_place, validation if set_place >= 0 else -1, sequence)
    if fasta is None:
        records, matches = _read_sequences(table, columns)
    others = {table.find_column(name) for name in others}
    places = tuple(map(table.find_column, names)) or (_find_target_column(table, columns, records, matches, others),)
    columns = columns._replace(targets=places)
    if fasta is not None and sequence >= 0:
        _compare_sequences(table, columns, records, matches)
    rows, notes = _join(table, records, matches, columns, fasta, target_type)
    notes = [*kind_line, *notes, *_note_unread_sets(table, columns)]
    notes += [] if pooled else _note_unread_folds(table, columns)
    names = ["fasta"] if len(files) == 1 else [f"fasta/{file.name}" for file in files]
    sources = {f"labels/{path.name}": Source(path) for paths in set_files.values() for path in paths}
    sources = {"labels": Source(table.path)} | sources | dict(zip(names, map(Source, files), strict=True))
    set_column = table.columns[columns.set] if columns.set >= 0 else ""
    targets = tuple(table.columns[place] for place in columns.targets)
    return LabelRecords(rows, targets, set_column, sources, notes, None if kind is NATIVE else kind)


def _choose_set_column(table: Table, kind: TableKind) -> str | None:
    """Choose the column of the sets of a table of a kind.

    Returns:
        Its own, or its only column of folds; None without one.

    Raises:
        InputError: there are several columns of folds.
    """
    folds = kind.list_folds(table)
    if len(folds) > 1:
        raise InputError(
            f"{table.path} is {kind.name} with the folds {', '.join(folds)}. Choose one: --folds {folds[0]} for "
            f"cross-validation, --split {folds[0]} for one split of a task, or --set {folds[0]} for labels.",
            code="task.which-split",
            allowed=tuple(folds),
            path=table.path,
        )
    return kind.set or next(iter(folds), None)


def read_fasta_records(files: Sequence[Path]) -> list[Record]:
    """Read the records of FASTA files, without repetitions of equal ones."""
    records = (record for file in files for record in read_fasta(file))
    return list({(record.id, record.sequence): record for record in records}.values())


def find_sequence_column(table: Table, used: Sequence[str | None], required: bool) -> int:
    """Find the column of the sequences, which is neither the column of the names nor that of the targets.

    Returns:
        Its place, -1 without one.

    Raises:
        InputError: several columns may be the sequences, or there is none although there is no FASTA.
    """
    found = []
    for place, name in enumerate(table.columns):
        cells = ["".join(cell.split()) for cell in table.cells(place) if cell]  # Thermus thermophilus has 19 letters
        if name in used or not has_sequences(cells):
            continue
        if "seq" in name.lower() or sorted(map(len, cells))[len(cells) // 2] >= SHORTEST:
            found.append(place)
    named = [place for place in found if table.columns[place].lower() == "sequence"]
    named = named or [place for place in found if "seq" in table.columns[place].lower()]
    found = named or found
    if len(found) == 1 or not required:
        return found[0] if len(found) == 1 else -1
    listed = ", ".join(repr(table.columns[place]) for place in found)
    problem = f"several columns with sequences ({listed})" if found else "no column with sequences"
    fix = "Rename one to sequence" if found else "Pass the sequences as --fasta"
    raise InputError(f"{table.path} has {problem}. {fix}.", code="labels.sequences", path=table.path)


def _match_ids(
    table: Table, records: list[Record], fasta: Path | None, id: str | None, sequence: int
) -> tuple[int, Matches]:
    """Find the column of the names, which has most names of records, and match it.

    Returns:
        Its place, and its matches. Without a FASTA the place may be -1, and there are no matches.

    Raises:
        InputError: nothing matches, or two columns name different records.
    """
    if fasta is None:
        return table.find_column(id) if id is not None else find_name_column(table, sequence), Matches(
            [], Counter(), []
        )
    matcher = RecordMatcher(records)
    places = [table.find_column(id)] if id is not None else [p for p in range(len(table.columns)) if p != sequence]
    matched = {place: matcher.match(table.cells(place)) for place in places}

    def quality(place: int) -> tuple[int, int]:
        return len({row for row in matched[place].records if row >= 0}), matched[place].rules["exactly"]

    best = max(places, key=quality)
    if quality(best)[0] == 0:
        _raise_no_match(table, records, fasta, best if id is not None else find_name_column(table, sequence), matched)
    for place in places:
        contradicts = [
            (mine, other)
            for mine, other in zip(matched[best].records, matched[place].records, strict=True)
            if mine >= 0 and other >= 0 and mine != other
        ]
        if quality(place)[0] == quality(best)[0] and contradicts:
            raise InputError(
                f"{table.path}: the columns {table.columns[best]!r} and {table.columns[place]!r} name different "
                f"proteins of {fasta} in one row. Choose one with --id.",
                code="labels.two-ids",
                columns=(table.columns[best], table.columns[place]),
                path=table.path,
            )
    header = matcher.match(table.columns)
    if header.rules["exactly"] and any(map(is_number, table.columns)):
        raise InputError(
            f"{table.path}: the first line names the protein {table.columns[best]!r}. Add a line with the names of the "
            "columns before it.",
            code="labels.no-header",
            path=table.path,
        )
    return best, matched[best]


def _raise_no_match(table: Table, records: list[Record], fasta: Path, place: int, matched: dict[int, Matches]) -> None:
    """Raise the error for a table without a name of a record."""
    place = max(place, 0)
    cells = [cell for cell in table.cells(place) if cell]
    ambiguous = next((matches.ambiguous[0] for matches in matched.values() if matches.ambiguous), None)
    if ambiguous is not None:
        found = f"{ambiguous!r} names several different sequences of {fasta}"
        fix = "Give each record of the FASTA an id of its own"
    else:
        found = (
            f"no cell names a protein of {fasta}: its ids are like {records[0].id!r}, the cells of column "
            f"{table.columns[place]!r} like {cells[0] if cells else ''!r}"
        )
        fix = "Use the same names, or choose the column of the names with --id"
    raise InputError(
        f"{table.path}: {found}. {fix}.",
        code="labels.no-match",
        found=cells[0] if cells else "",
        expected=records[0].id,
        path=table.path,
    )


def find_name_column(table: Table, sequence: int) -> int:
    """Find a column of names in a table that holds the sequences: by its own name, or the first of different texts."""
    places = [place for place in range(len(table.columns)) if place != sequence]
    for place in places:
        if table.columns[place].lower() in ID_NAMES:
            return place
    for place in places:
        cells = table.cells(place)
        if all(cells) and len(set(cells)) == len(cells) and not is_numeric(cells):
            return place
    return -1


def find_set_column(table: Table, name: str | None) -> int:
    """Find the column of the sets; -1 without one. A column that is not named by the user must hold sets."""
    if name is not None:
        return table.find_column(name)
    for place, column in enumerate(table.columns):
        if column.lower() in SET_NAMES:
            cells = [cell.lower() for cell in table.cells(place)]
            if sum(cell in SETS for cell in cells) * 2 > sum(cell not in DROPPED_SETS for cell in cells):
                return place
    return -1


def _note_unread_sets(table: Table, columns: _Columns) -> list[str]:
    """Note a column that has the name of a column of sets and is not read as one."""
    return [
        f"column {name!r} is not read as sets, because most of its cells are none of {', '.join(SETS)}"
        for place, name in enumerate(table.columns)
        if columns.set < 0 and name.lower() in SET_NAMES and place not in (*columns, *columns.targets)
    ]


def _note_unread_folds(table: Table, columns: _Columns) -> list[str]:
    """Note a column of folds in a table without sets, such as that of `esm2kit split --folds`."""
    return [
        f"column {name!r} is not read; esm2kit benchmark --folds {name} takes the folds from it"
        for place, name in enumerate(table.columns)
        if columns.set < 0
        and name.lower() in FOLD_NAMES
        and place not in (*columns, *columns.targets)
        and is_numeric(table.cells(place))
    ]


def _find_target_column(
    table: Table,
    columns: _Columns,
    records: Sequence[Record],
    matches: Matches,
    others: AbstractSet[int] = frozenset(),
) -> int:
    """Find the column of the targets.

    Returns:
        Its place.

    Raises:
        InputError: there is none, or several columns may be it.
    """
    # neither the numbers of the rows nor those of the residues are measured
    lengths = [str(len(records[place].sequence)) for place in matches.records if place >= 0]
    used = {columns.id, columns.set, columns.validation, columns.sequence} | others
    used |= {place for place, column in enumerate(table.columns) if column.lower() in FOLD_NAMES}
    rows = [row for row, record in enumerate(matches.records) if record >= 0] or range(len(table.rows))
    free = []
    for place in range(len(table.columns)):
        cells = [table.rows[row][place] for row in rows]
        values = {cell for cell in cells if cell.lower() not in MISSING}
        computed = cells in ([str(row) for row in rows], [str(row + 1) for row in rows], lengths)
        if place not in used and len(values) > 1 and not computed:
            free.append((place, cells, len(values)))
    numeric = [place for place, cells, _ in free if is_numeric(cells)]
    repeated = [place for place, cells, num_values in free if 2 * num_values <= len(cells)]
    for found in (numeric, repeated, [place for place, _, _ in free]):
        named = [place for place in found if split_unit(table.columns[place])[0].lower() in TARGET_NAMES]
        if len(found) == 1 or len(named) == 1:
            return (named if len(named) == 1 else found)[0]
        if found:
            listed = ", ".join(repr(table.columns[place]) for place in found)
            raise InputError(
                f"{table.path}: each of the columns {listed} may be the target. Choose with --target.",
                code="labels.which-target",
                allowed=tuple(table.columns[place] for place in found),
                path=table.path,
            )
    raise InputError(
        f"{table.path}: no column can be taken as the target: the columns {', '.join(map(repr, table.columns))} are "
        "names, sets, sequences, row numbers, lengths or a single value. Choose one with --target.",
        code="labels.no-target",
        path=table.path,
    )


def _read_sequences(table: Table, columns: _Columns) -> tuple[list[Record], Matches]:
    """Read the sequences of a table: a record per protein, and the record of each row; -1 without a sequence."""
    place_of: dict[str, int] = {}
    records: list[Record] = []
    rows = []
    for number, row in enumerate(table.rows):
        name = (row[columns.id] if columns.id >= 0 else "") or f"Sequence{number}"
        if not row[columns.sequence]:
            rows.append(-1)
            continue
        sequence = check_sequence(name, row[columns.sequence], Source(table.path))
        place = place_of.setdefault(name, len(records))
        if place == len(records):
            records.append(Record(name, name, sequence))
        elif records[place].sequence != sequence:
            raise InputError(
                f"{table.path}: {name!r} has two different sequences. Give each protein a name of its own, or choose "
                "the column of the names with --id.",
                code="labels.two-sequences",
                record=name,
                path=table.path,
            )
        rows.append(place)
    return records, Matches(rows, Counter(), [])


def _compare_sequences(table: Table, columns: _Columns, records: list[Record], matches: Matches) -> None:
    """Raise InputError if a sequence in the table is not that of the FASTA."""
    for row, place in zip(table.rows, matches.records, strict=True):
        sequence = "".join(row[columns.sequence].split()).upper().removesuffix("*")
        if place >= 0 and sequence and sequence != records[place].sequence:
            raise InputError(
                f"{table.path}: the sequence of {row[columns.id]!r} differs from that of {records[place].id!r} in the "
                "FASTA. Correct it, remove the column, or omit --fasta.",
                code="labels.other-sequence",
                record=row[columns.id],
                path=table.path,
            )


def _join(
    table: Table,
    records: list[Record],
    matches: Matches,
    columns: _Columns,
    fasta: Path | None,
    target_type: TargetType | None,
) -> tuple[list[TaskRecord], list[str]]:
    """Join the rows with the records.

    Returns:
        One record per protein with a value, in the order of the records, and notes.

    Raises:
        InputError: two rows of a protein differ, or nothing is left.
    """
    source, several = Source(table.path), len(columns.targets) > 1
    name = ", ".join(table.columns[place] for place in columns.targets)
    found = [read_cells(table, place, target_type) for place in columns.targets]
    numeric, commas = (
        all(column.numeric for column in found),
        next((column.commas for column in found if column.commas), ""),
    )
    cells = [CELL_SEPARATOR.join(cells) for cells in zip(*(column.cells for column in found), strict=True)]
    missing = {"", CELL_SEPARATOR * (len(found) - 1)}
    separator = find_row_separator(cells) if target_type == "multilabel" else ""
    joined: dict[int, tuple[str, str]] = {}
    empty, unmatched, dropped = [], [], 0
    ids = Counter(record.id for record in records)
    for row, place, cell in zip(table.rows, matches.records, cells, strict=True):
        label = row[columns.id] if columns.id >= 0 else records[place].id if place >= 0 else ""
        if place < 0:
            unmatched.append(label)
            continue
        if cell in missing:
            empty.append(label or records[place].id)
            continue
        chosen: str | None = UNASSIGNED
        if columns.set >= 0:
            mark = row[columns.validation] if columns.validation >= 0 else ""
            chosen = parse_set(label, row[columns.set], mark, source)
        if chosen is None:
            dropped += 1
            continue
        before = joined.setdefault(place, (cell, chosen))
        if target_type == "multilabel" and not several and before[0] != cell and before[1] == chosen:
            joined[place] = (join_label_sets(before[0], cell, separator), chosen)
        elif before != (cell, chosen):
            what, values = ("target", (before[0], cell)) if before[0] != cell else ("set", (before[1], chosen))
            raise InputError(
                f"{table.path}: {label!r} has two rows with different values of the {what} ({values[0]!r} and "
                f"{values[1]!r}). Keep one row per protein, such as the mean of replicates, or set target_type to "
                "multilabel if a protein has several labels.",
                code="labels.repeated",
                record=label,
                found=values,
                path=table.path,
            )
    if not joined:
        raise InputError(
            f"{table.path}: no protein has a value in column {name!r}.",
            code="labels.empty",
            column=name,
            path=table.path,
        )
    texts = {cell for cell, _ in joined.values()}
    if (
        not (numeric or several or target_type == "multilabel")
        and 2 < len(texts) == len(joined)
        and not any(_is_per_residue(cell, records[place]) for place, (cell, _) in joined.items())
    ):
        raise InputError(
            f"{table.path}: column {name!r} has a different text for each protein, such as {min(texts)!r}: these are "
            "neither classes nor numbers. Choose another column with --target.",
            code="labels.no-classes",
            column=name,
            path=table.path,
        )
    rows = []
    for place in sorted(joined):
        record, (cell, chosen) = records[place], joined[place]
        row_id = record.id if ids[record.id] == 1 else record.description
        values = tuple(cell.split(CELL_SEPARATOR)) if several else ()
        rows.append(TaskRecord(row_id, record.sequence, cell, chosen, None, values))
    unit = "" if several else split_unit(name)[1]
    named = ", ".join(repr(table.columns[place]) for place in columns.targets)
    parts = [f"{table.path.name}: "]
    parts[0] += f"id column {table.columns[columns.id]!r}, " if columns.id >= 0 else "no id column, "
    parts[0] += f"{'targets' if several else 'target'} {named}{f' in {unit}' if unit and numeric else ''}"
    parts += [*table.notes, *([commas] if commas else [])]
    origin = "of the table" if fasta is None else f"of {Path(fasta).name}"
    how = [f"{count} {rule}" for rule, count in matches.rules.items() if rule != "exactly"]
    few = "only " if 2 * len(joined) < min(len(records), len(table.rows)) else ""
    counts = [f"{few}{len(joined):,} of {format_count(len(records), 'protein')} {origin} joined"]
    counts[0] += f" ({', '.join(how)})" if how else ""
    matched = set(matches.records)
    absent = [record.id for place, record in enumerate(records) if place not in matched]
    groups = (
        (absent, "protein", "without a row"),
        (unmatched, "row", "without a protein"),
        (empty, "row", "without a value"),
        (matches.ambiguous, "name", "of several sequences"),
    )
    counts += [
        f"{format_count(len(group), noun)} {text} ({_list_first(group)})" for group, noun, text in groups if group
    ]
    if dropped:
        counts.append(f"{format_count(dropped, 'row')} without a set")
    return rows, [", ".join(parts) + "; " + "; ".join(counts)]


def _is_per_residue(cell: str, record: Record) -> bool:
    """Whether a text has, or lists, one label for each residue of a protein."""
    return len(split_residue_labels(cell, len(record.sequence))) == len(record.sequence)


class Cells(NamedTuple):
    """The cells of a column of targets, empty where a value is missing, and how they were read."""

    cells: list[str]
    numeric: bool
    commas: str


def read_cells(table: Table, place: int, target_type: TargetType | None) -> Cells:
    """Read a column of targets: numbers in one notation, missing values as empty cells."""
    cells, commas = table.cells(place), ""
    numeric = target_type not in ("class", "multilabel") and is_numeric(cells)
    missing = list_missing(cells, numeric)
    if numeric:
        cells, commas = parse_numbers(cells, table, table.columns[place])
    return Cells(["" if cell.lower() in missing else cell for cell in cells], numeric, commas)


def _list_first(names: Sequence[str]) -> str:
    shown = ", ".join(name or "''" for name in names[:EXAMPLES])
    return shown + (", ..." if len(names) > EXAMPLES else "")
