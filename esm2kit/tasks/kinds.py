"""The kinds of tables that other projects publish, recognised by their columns, and the sets and folds they bring.

KINDS is the list, in the order in which a table is compared with it: the first kind whose columns the table has, and
whose column of sequences has proteins, is that of the table. `docs/howto/own-data.md` shows the same list.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.files import SETS, is_test_set, parse_attributes, read_records
from esm2kit.tasks.sources import ENDINGS, Source, find_source, find_split_names, open_text, parse_split_name
from esm2kit.tasks.tables import Table, parse_table, read_first_rows, read_table
from esm2kit.tasks.wild_types import add_sequences

SEQUENCE = re.compile(f"[{RESIDUE_LETTERS}]+\\*?", re.IGNORECASE)
FEWEST_LETTERS = 8  # in a column of sequences
# Lines that are enough to recognise a table.
PEEKED_LINES = 50
FOLD = re.compile(r"\d{1,3}(\.0)?")
SET_COLUMN = "set"
SHARD = re.compile(r"-\d{5}-of-(\d{5})$")  # of a file of a data set on the Hugging Face hub


@dataclass(frozen=True)
class TableKind:
    """A kind of table.

    Args:
        name: with an article, for the line that tells how a file is read.
        source: where it is described, and the state that was read.
        sequence: column of the sequences; empty for a kind that is not read.
        target: column of the targets.
        id: column of the names; empty without one. It may be absent.
        set: column of the sets; empty if the kind has none.
        folds: start of the names of columns of folds; empty if the kind has none.
        others: further columns by which the kind is recognised.
        variants: whether all proteins are variants of one wild type.
        unread: why the kind is not read, and what to do; empty if it is.
    """

    name: str
    source: str
    sequence: str = ""
    target: str = ""
    id: str = ""
    set: str = ""
    folds: str = ""
    others: tuple[str, ...] = ()
    variants: bool = False
    unread: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a table of this kind has."""
        return tuple(filter(None, (self.sequence, self.target, self.set, *self.others)))

    def list_folds(self, table: Table) -> list[str]:
        """List the columns of folds of a table."""
        return [name for name in table.columns if self.folds and name.startswith(self.folds)]


FLIP_SOURCE = "github.com/J-SNACKKB/FLIP, commit 62cace8: collect_splits/rhomax.py, baselines/utils.py"
GYM_SOURCE = "github.com/OATML-Markslab/ProteinGym, commit bb68524: README.md, reference_files"
TDC_SOURCE = "github.com/mims-harvard/TDC: tdc/single_pred, tdc/multi_pred/bi_pred_dataset.py (get_data)"
TDC_PROTEINS = ("Antibody", "Antigen", "Protein", "Peptide", "Target", "Epitope")
TDC_TARGET = "Y"
# read by `tasks.pair_files` where both proteins have names too, as TDC writes them
TDC_PAIRS = (
    ("Antibody", "Antigen"), ("Protein1", "Protein2"), ("Peptide", "MHC"), ("TCR", "Epitope"),
)  # fmt: skip
TDC_MOLECULES = ("Drug", "Drug1", "Reactant", "Reaction", "GuideSeq", "miRNA", "drug_molecule")
MOLECULES = "its column {} has molecules or nucleotides, which a protein language model does not read. {}"

KINDS = (
    TableKind("a FLIP table", FLIP_SOURCE, "sequence", "target", "id", "set"),
    TableKind(
        "a ProteinGym assay", GYM_SOURCE, "mutated_sequence", "DMS_score", "mutant", folds="fold_", variants=True,
    ),
    TableKind(
        "a ProteinGym assay without sequences", GYM_SOURCE, others=("mutant", "DMS_score"),
        unread="It has no column mutated_sequence. Copy ProteinGym's reference file DMS_substitutions.csv, which has "
        "the wild types, into its folder, or score the variants with `esm2kit score`.",
    ),
    TableKind("ProteinGym's clinical variants", GYM_SOURCE, "mutated_sequence", "DMS_bin_score"),
    TableKind(
        "ProteinGym's reference file", GYM_SOURCE, others=("DMS_id", "DMS_filename", "target_seq"),
        unread="It lists the assays and has no measurements. Pass the file of one assay, as named in DMS_filename.",
    ),
    TableKind(
        "a SaprotHub table", "github.com/westlake-repl/SaprotHub: columns protein, label and stage",
        "protein", "label", set="stage",
    ),
    *(
        TableKind(
            f"a TDC table of {name}", TDC_SOURCE, others=(name, "Y"),
            unread=MOLECULES.format(name, "Pass a table whose proteins have a column of their own."),
        )
        for name in TDC_MOLECULES
    ),
    *(
        TableKind(
            "a TDC table of pairs", TDC_SOURCE, others=(*pair, "Y"),
            unread=f"A target belongs to {pair[0]} and {pair[1]} together. Write the columns sequence_a, sequence_b "
            "and target for pairs of proteins, or keep one of the two columns if the other never changes.",
        )
        for pair in (*TDC_PAIRS, ("Sequence", "Protein Target"))
    ),
    *(TableKind("a TDC table", TDC_SOURCE, name, "Y", f"{name}_ID", others=(f"{name}_ID",)) for name in TDC_PROTEINS),
    TableKind("a TDC table", TDC_SOURCE, "X", "Y", "ID"),
    TableKind(
        "a table with the columns seq and label", "data sets on the Hugging Face hub, such as Bo1015/fold_prediction",
        "seq", "label",
    ),
)  # fmt: skip
NATIVE = KINDS[0]  # read by `tasks.files`

# Other kinds of files and folders, by a file name or a suffix: why they are not read, and what to do.
LMDB = (
    "is an LMDB database, as TAPE, PEER and SaprotHub publish. Write its records as a CSV with the columns sequence, "
    "target and set (train, validation or test), and pass that"
)
UNREAD_FILES = {
    "data.mdb": LMDB, ".mdb": LMDB, ".lmdb": LMDB,
    ".json": "is JSON. Write its records as a CSV with the columns sequence, target and set, and pass that",
    ".jsonl": "is JSON. Write its records as a CSV with the columns sequence, target and set, and pass that",
    ".pkl": "is a Python pickle, which may execute code. Save the table as CSV, and pass that",
    ".pickle": "is a Python pickle, which may execute code. Save the table as CSV, and pass that",
}  # fmt: skip


def check_readable(path: Path) -> None:
    """Check that a file or folder is not of a kind that is not read.

    Args:
        path: of a task.

    Raises:
        InputError: it is; the message says what to do.
    """
    inside = path / "data.mdb" if path.is_dir() else path
    reason = UNREAD_FILES.get(inside.name.lower()) if inside.is_file() else None
    if reason is None and path.is_file():
        reason = next((UNREAD_FILES[end] for end in UNREAD_FILES if path.name.lower().endswith(end)), None)
    if reason is not None:
        raise InputError(f"{path} {reason}.", code="task.unread-kind", path=path)


def find_kind(table: Table) -> TableKind | None:
    """Find the kind of a table.

    Args:
        table: its columns and at least its first rows.

    Returns:
        The first kind of KINDS that it is; None for a table of another kind.

    Raises:
        InputError: the kind is not read; the message says what to do.
    """
    for kind in KINDS:
        if not set(kind.columns) <= set(table.columns):
            continue
        others = set(table.columns) - set(kind.columns)
        if kind.unread and kind.source == TDC_SOURCE and NATIVE.sequence in map(str.lower, others):
            continue  # a table of the user, whose sequences are next to a molecule
        if kind.unread:
            raise InputError(
                f"{table.path} is {kind.name}. {kind.unread[:1].upper()}{kind.unread[1:]}",
                code="task.unread-kind",
                kind=kind.name,
                path=table.path,
            )
        cells = [cell for cell in table.cells(table.columns.index(kind.sequence)) if cell]
        if has_sequences(cells):
            return kind
        if kind is not NATIVE and cells and all(cell[0] + cell[-1] == "[]" for cell in cells):
            raise InputError(
                f"{table.path} is {kind.name}, and a cell of its column {kind.sequence} lists several chains. Write "
                "one sequence per cell, such as one of the chains, or join them with a linker.",
                code="task.several-chains",
                kind=kind.name,
                path=table.path,
            )
    return None


def has_sequences(cells: Sequence[str]) -> bool:
    """Return whether at least nine tenths of the cells are amino-acid sequences, with enough different letters."""
    joined = ["".join(cell.split()) for cell in cells]
    few = len(set("".join(joined).upper())) < FEWEST_LETTERS  # such as the labels H, E and C of residues
    return not few and 10 * sum(SEQUENCE.fullmatch(cell) is not None for cell in joined) >= 9 * len(joined)


def peek_kind(path: Path) -> TableKind | None:
    """Find the kind of a table from its first lines.

    Args:
        path: of a text table.

    Returns:
        Its kind; None for another table, or for text that is not a table.

    Raises:
        InputError: the kind is not read.
    """
    table = peek_table(path)
    return None if table is None else find_kind(add_sequences(table))


def peek_table(path: Path, member: str | None = None) -> Table | None:
    """Read the first lines of a table, or of a member of a zip archive; None for a file that is not a table."""
    try:
        if is_parquet(path):
            return read_first_rows(path, PEEKED_LINES)
        with open_text(Source(path, member)) as text:
            lines = [line for line, _ in zip(text, range(PEEKED_LINES), strict=False)]
        return parse_table("".join(lines), path)
    except InputError:
        return None


def is_parquet(path: Path) -> bool:
    """Return whether a file has the name of a Parquet table."""
    return path.name.endswith(".parquet")


def list_splits(folder: Path) -> list[str]:
    """List the splits of a folder: those of `find_split_names`, without tables with tabs that are of no known kind.

    Args:
        folder: of the task.

    Returns:
        Their names, sorted.

    Raises:
        InputError: a zip archive is damaged.
    """
    names = find_split_names(folder)
    chosen = {name: find_source(folder, tuple(f"{name}{ending}" for ending in ENDINGS)) for name in names}
    return [name for name, source in chosen.items() if not (source and _is_side_table(source))]


def _is_side_table(source: Source) -> bool:
    """Whether a file is a table with tabs, such as labels for a FASTA next to it, and of no known kind."""
    if source.member or not source.path.name.removesuffix(".gz").endswith((".tsv", ".tab")):
        return False
    try:
        return peek_kind(source.path) is None
    except InputError:
        return False


def list_test_sets(path: Path) -> list[str]:
    """List the test sets of a FASTA file or of a FLIP table, as they are written and in their order.

    Args:
        path: of the file.

    Returns:
        Their names.

    Raises:
        InputError: the file is invalid.
    """
    source = Source(path)
    if source.is_table:
        table = read_table(path)
        places = [place for place, name in enumerate(table.columns) if name.lower() == SET_COLUMN]
        names = table.cells(places[0]) if places else []
    else:
        names = [parse_attributes(header, source)[1].get("SET", "") for header, _ in read_records(source)]
    return [name for name in dict.fromkeys(names) if is_test_set(name)]


def list_inner_splits(path: Path) -> list[str]:
    """List the splits that one file has: its columns of folds, or its test sets if there are several.

    Args:
        path: of the file.

    Returns:
        Their names; empty for a file with one split.

    Raises:
        InputError: the file is invalid, or of a kind that is not read.
    """
    table = peek_table(path) if Source(path).is_table else None
    kind = None if table is None else find_kind(add_sequences(table))
    if kind is not None and kind is not NATIVE:
        return kind.list_folds(table)
    found = list_test_sets(path)
    return found if len(found) > 1 else []


class TaskTable(NamedTuple):
    """A table of a task that another project published: its file or folder, and the chosen column of the sets."""

    path: Path
    set_column: str


def find_task_table(folder: Path, split: str, file: Path | None) -> TaskTable | None:
    """Find out whether a split is a table of another project.

    Args:
        folder: of the task.
        split: name of the split, or the chosen column of folds.
        file: of the split, or a folder with a file per set. None selects the one of that name in the folder.

    Returns:
        The table; None for FLIP's and biotrainer's own formats.

    Raises:
        InputError: it is of a kind that is not read.
    """
    if file is not None and file.is_dir():
        return TaskTable(file, SET_COLUMN)
    source = Source(file) if file else find_source(folder, tuple(f"{split}{ending}" for ending in ENDINGS))
    if source is None or not source.is_table:
        return None
    if source.member:
        _check_member(source)
        return None
    kind = peek_kind(source.path)
    if is_parquet(source.path) and kind is NATIVE:
        return TaskTable(source.path, SET_COLUMN)
    if kind in (None, NATIVE) and not is_parquet(source.path):  # these are read as text
        return None
    return TaskTable(source.path, "" if split == parse_split_name(source.path.name) else split)


def _check_member(source: Source) -> None:
    """Raise InputError for a table of another project in a zip archive, where only FLIP's tables are read."""
    table = peek_table(source.path, source.member)
    kind = None if table is None else find_kind(table)
    if kind not in (None, NATIVE):
        raise InputError(
            f"{source.path}: {source.member} is {kind.name} in a zip archive. Unzip the archive, and pass the file.",
            code="task.zipped",
            kind=kind.name,
            path=source.path,
        )


def find_set_files(folder: Path) -> dict[str, list[Path]]:
    """Find the files of the sets of a task that has files per set, such as train.csv, valid.csv and test.csv.

    Args:
        folder: of the task.

    Returns:
        Set ("train", "validation" or "test") -> tables, several for train-00000-of-00002.parquet and so on; empty if
        other tables are in the folder, train or test is missing, or a table has a column of sets.
    """
    found: dict[str, list[Path]] = {name: [] for name in ("train", "validation", "test")}
    for path in sorted(folder.iterdir()):
        if path.is_file() and Source(path).is_table:
            name = SHARD.sub("", parse_split_name(path.name) or "").lower()
            name = "train" if name == "train_val" else SETS.get(name, "")
            if not name:
                return {}
            found[name].append(path)
    if not (found["train"] and found["test"]) or not all(map(_is_complete, found.values())):
        return {}
    tables = [peek_table(path) for paths in found.values() for path in paths]
    if any(table is None or SET_COLUMN in map(str.lower, table.columns) for table in tables):
        return {}
    return {name: paths for name, paths in found.items() if paths}


def _is_complete(paths: Sequence[Path]) -> bool:
    """Whether the files of a set are one file, or all of its shards."""
    shards = [SHARD.search(parse_split_name(path.name) or "") for path in paths]
    return len(paths) < 2 or all(shard and int(shard[1]) == len(paths) for shard in shards)


def read_set_files(files: dict[str, list[Path]]) -> Table:
    """Read the tables of the sets of a task as one table with the column `set`.

    Args:
        files: as `find_set_files` returns them.

    Returns:
        The table. Its path is that of the folder.

    Raises:
        InputError: a table is invalid, or has other columns than the first one.
    """
    tables = [(name, read_table(path)) for name, paths in files.items() for path in paths]
    first = tables[0][1]
    for _, table in tables:
        if table.columns != first.columns:
            raise InputError(
                f"{table.path} has the columns {', '.join(table.columns)}, and {first.path} has "
                f"{', '.join(first.columns)}. Give the tables of all sets the same columns.",
                code="task.other-columns",
                found=table.columns,
                expected=first.columns,
                path=table.path,
            )
    rows = [[*row, name] for name, table in tables for row in table.rows]
    named = ", ".join(table.path.name for _, table in tables)
    notes = [f"sets from {named}", *(note for _, table in tables for note in table.notes)]
    columns = [*first.columns, SET_COLUMN]
    return Table(first.path.parent, columns, rows, first.separator, tuple(dict.fromkeys(notes)))


def read_table_or_sets(path: Path) -> Table:
    """Read a table, or the files of the sets of a folder, such as train.csv and test.csv, as one table."""
    set_files = find_set_files(path) if path.is_dir() else {}
    return read_set_files(set_files) if set_files else read_table(path)


def read_folds_as_sets(table: Table, column: str) -> Table:
    """Write a column of fold numbers as sets: the highest fold is test, the one below it validation, the others train.

    Args:
        table: the table.
        column: its name. A column of other texts is not changed.

    Returns:
        The table, with a note.

    Raises:
        InputError: there are fewer than three folds.
    """
    place = table.find_column(column)
    cells = table.cells(place)
    if not all(FOLD.fullmatch(cell) for cell in cells):
        return table
    folds = sorted({int(float(cell)) for cell in cells})
    if len(folds) < 3:
        raise InputError(
            f"{table.path}: column {column!r} has {format_count(len(folds), 'fold')}. A split into train, validation "
            "and test requires three; choose another column.",
            code="task.few-folds",
            column=column,
            found=len(folds),
            path=table.path,
        )
    sets = dict.fromkeys(folds, "train") | {folds[-2]: "validation", folds[-1]: "test"}
    rows = [[*row[:place], sets[int(float(row[place]))], *row[place + 1 :]] for row in table.rows]
    note = f"sets from {column}: fold {folds[-1]} is test, fold {folds[-2]} validation"
    return table._replace(rows=rows, notes=(*table.notes, note))


def describe_kind(kind: TableKind, table: Table, target: str, set_column: str) -> str:
    """Describe in one line how a table of a kind is read.

    Args:
        kind: of the table.
        table: the table.
        target: column of the targets that is read.
        set_column: column of the sets that is read; empty without one.

    Returns:
        The line.
    """
    line = f"{table.path.name}: read as {kind.name}: sequences from {kind.sequence}, targets from {target}"
    told = any(note.startswith("sets from ") for note in table.notes)
    return line if told or not set_column else f"{line}, sets from {set_column}"


def describe_own_format(source: Source, has_label_bodies: bool, target: str | None) -> str:
    """Describe in one line how a file in FLIP's or biotrainer's own formats is read.

    Args:
        source: the file.
        has_label_bodies: whether the bodies of a FASTA are labels, and the sequences are in another file.
        target: column or header field of the targets; None is the one named target.

    Returns:
        The line.
    """
    if source.is_table:
        return f"{source.path.name}: read as {NATIVE.name}: sequences from sequence, targets from {target or 'target'}"
    if has_label_bodies:
        return f"{source.path.name}: read as FLIP's residue labels: sequences from sequences.fasta"
    return f"{source.path.name}: read as a biotrainer FASTA: targets from {(target or 'TARGET').upper()}, sets from SET"
