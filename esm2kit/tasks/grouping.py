"""Choose the groups and the folds of a task for cross-validation."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.fasta import Record, is_fasta_name
from esm2kit.sequences.similarity import describe_limit, group_by_identity
from esm2kit.tasks.files import parse_attributes, read_records
from esm2kit.tasks.folds import assign_folds, name_groups
from esm2kit.tasks.matching import RecordMatcher
from esm2kit.tasks.sources import Source
from esm2kit.tasks.split import find_unique, separate_groups
from esm2kit.tasks.tables import MISSING, read_table
from esm2kit.tasks.task import CLUSTER, SplitBy
from esm2kit.tasks.task_data import TaskData, stratify

# Of the training proteins, one in INNER_FOLDS is for validation, which chooses the settings of a probe.
INNER_FOLDS = 5


class FoldPlan(NamedTuple):
    """The folds of a task's proteins.

    Args:
        group_P: (P,) number of the group of each protein. No group is in two folds.
        fold_RP: (R, P) fold of each protein in each repeat, from 0.
        names: name of each fold, such as the entries of a column.
        method: how groups and folds were chosen, as words of a sentence.
        notes: what a reader of the scores must know.
        column: column of the folds; empty if they were chosen here.
    """

    group_P: np.ndarray
    fold_RP: np.ndarray
    names: tuple[str, ...]
    method: str
    notes: tuple[str, ...] = ()
    column: str = ""

    @property
    def num_folds(self) -> int:
        """Number of folds."""
        return len(self.names)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.group_P.max()) + 1


def plan_folds(
    data: TaskData,
    folds: int | str,
    repeats: int = 1,
    group_by: str | None = None,
    source: Path | None = None,
    id: str | None = None,
    split_by: SplitBy = "auto",
    identity: float = 0.5,
    seed: int = 0,
) -> FoldPlan:
    """Choose the folds of a task.

    Args:
        data: the task.
        folds: number of folds, or the column that has them.
        repeats: how often the proteins are divided; each repeat has a seed of its own.
        group_by: "cluster" for groups of similar sequences, or the column of the groups. Pairs with a common protein,
            or with proteins of one group, are one group. None is cluster, unless
            `split_by` is random, or is auto and there are too few clusters, as for the variants of one protein: then
            groups are equal sequences.
        source: file of the columns. None is that of the task.
        id: column of the names of the proteins.
        split_by: how groups are chosen without `group_by`.
        identity: share of equal residues from which sequences are similar.
        seed: of the folds.

    Returns:
        The folds.

    Raises:
        InputError: there are too few groups, a protein has no group or fold, a group of the column is in two folds, or
            a class is in a single group.
    """
    source = source or next(iter(data.files.values()))
    by_column = isinstance(folds, str)
    if data.pairs is not None and (by_column or group_by not in (None, CLUSTER)):
        raise InputError(
            f"{source}: folds and groups of pairs of proteins are not read from a column. Set folds to a number; pairs "
            "with a common protein are in one fold.",
            code="pairs.option",
            path=source,
        )
    if group_by not in (None, CLUSTER):
        group_P, method, notes = _read_groups(data, source, group_by, id)
    else:
        need = "identity" if group_by == CLUSTER else split_by
        group_P, method, notes = _find_groups(data, None if by_column else folds, need, identity, seed)
    if by_column:
        named_P = read_task_column(data, source, folds, id)
        names, fold_P = np.unique(named_P, return_inverse=True)
        if len(names) < 2:
            raise InputError(
                f"{source}: column {folds!r} has a single fold, {names[0]!r}. Choose another column, or a number of "
                "folds.",
                code="folds.single",
                column=folds,
                path=source,
            )
        shared = find_shared_groups(group_P, fold_P)
        if shared.size and group_by is not None:
            members = np.flatnonzero(group_P == shared[0])
            what = "cluster" if group_by == CLUSTER else f"group of column {group_by!r}"
            raise InputError(
                f"{source}: proteins of one {what} are in different folds of column {folds!r}, "
                f"such as {data.ids[members[0]]!r} and "
                f"{data.ids[members[np.flatnonzero(fold_P[members] != fold_P[members[0]])[0]]]!r}. Correct one of the "
                "columns, or set folds to a number.",
                code="folds.shared-group",
                groups=int(shared.size),
                path=source,
            )
        if shared.size:
            groups = format_count(int(group_P.max()) + 1, "group")
            verb = "is" if shared.size == 1 else "are"
            notes.append(
                f"{shared.size} of {groups} ({method}) {verb} in several folds of column {folds}, so the scores are "
                "too high for other proteins; set folds to a number for folds without shared groups"
            )
            group_P = _merge_shared(data, fold_P)
            method = "equal sequences"
        fold_RP, described = fold_P[None], f"folds of column {folds}"
    else:
        names = np.array([str(number + 1) for number in range(folds)])
        _check_pairs(data, group_P, method, folds, seed)
        fold_RP = np.stack([_divide(data, group_P, folds, seed + repeat) for repeat in range(repeats)])
        described = f"{folds} folds of whole groups"
    _check_classes(data, group_P, fold_RP)
    column, method = folds if isinstance(folds, str) else "", f"{described}; groups: {method}"
    return FoldPlan(group_P, fold_RP, tuple(map(str, names)), method, tuple(notes), column)


def find_shared_groups(group_P: np.ndarray, fold_P: np.ndarray) -> np.ndarray:
    """Return the groups that are in several folds."""
    pairs = np.unique(np.stack([group_P, fold_P]), axis=1)
    groups, counts = np.unique(pairs[0], return_counts=True)
    return groups[counts > 1]


def _merge_shared(data: TaskData, fold_P: np.ndarray) -> np.ndarray:
    """Return groups of equal sequences within each fold."""
    keys = [f"{fold} {sequence}" for fold, sequence in zip(fold_P.tolist(), data.sequences, strict=True)]
    return np.unique(keys, return_inverse=True)[1]


def _divide(data: TaskData, group_P: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Return the fold of each protein (P,), with its share of each stratum of labels in each fold."""
    keys = [f"{sequence} {name}" for sequence, name in zip(data.sequences, data.ids, strict=True)]
    return assign_folds(name_groups(group_P, keys), num_folds, seed, stratify(data))


def _read_groups(data: TaskData, source: Path, column: str, id: str | None) -> tuple[np.ndarray, str, list[str]]:
    """Read the groups of a column: the number of each protein's (P,), what they are, and notes."""
    group_P = np.unique(read_task_column(data, source, column, id), return_inverse=True)[1]
    apart, notes = find_shared_groups(find_unique(data.sequences)[1], group_P), []
    if apart.size:
        notes.append(
            f"{format_count(apart.size, 'sequence')} of several proteins are in different groups of column {column}, "
            "so equal sequences may be in different folds"
        )
    return group_P, f"column {column}", notes


def _find_groups(
    data: TaskData, num_folds: int | None, split_by: SplitBy, identity: float, seed: int
) -> tuple[np.ndarray, str, list[str]]:
    """Group proteins by similarity, or by equal sequences: the number of each group (P,), what they are, and notes."""
    unique, place_PX = _list_sequences(data)
    joined = "" if data.pairs is None else "pairs connected through "
    sequence_P = connect_pairs(place_PX)
    if split_by == "random":
        return sequence_P, f"{joined}equal sequences", []
    try:
        found = group_by_identity(unique, identity)
        # whatever the folds, so that repeats have the same groups
        _, check = separate_groups(found, np.arange(len(unique)), lambda numbers: numbers)
        group_P = connect_pairs(found.numbers[place_PX])
        reason = "" if split_by == "identity" or num_folds is None else _find_shortage(data, group_P, num_folds, seed)
        if not reason:
            return group_P, f"{joined}{found.method}", describe_limit(check)
        reason = f"the {joined}{found.method} ({int(group_P.max()) + 1}) leave {reason}"
    except InputError as error:
        if split_by == "identity":
            raise
        reason = str(error).partition(". ")[0]
    note = f"similar sequences may be in different folds, because {reason}; set group_by to cluster to prevent it"
    return sequence_P, f"{joined}equal sequences", [note]


def _list_sequences(data: TaskData) -> tuple[list[str], np.ndarray]:
    """Return the different sequences, and (P, 1) the place of each protein, or (P, 2) of both proteins of each pair."""
    if data.pairs is None:
        unique, place_P = find_unique(data.sequences)
        return unique, place_P[:, None]
    unique, place_N = find_unique([*data.sequences, *data.pairs.second])
    return unique, place_N.reshape(2, -1).T


def connect_pairs(number_PX: np.ndarray) -> np.ndarray:
    """Number the groups of records, so that records with a common protein are in one group.

    Args:
        number_PX: (P, 1) number of each protein, or (P, 2) of both proteins of each pair.

    Returns:
        (P,) numbers: those of the proteins, or of the connected components of the pairs.
    """
    label_N = np.arange(int(number_PX.max()) + 1)
    if number_PX.shape[1] == 2:
        edges = coo_matrix((np.ones(len(number_PX)), tuple(number_PX.T)), shape=(len(label_N), len(label_N)))
        label_N = connected_components(edges, directed=False)[1]
    return np.unique(label_N[number_PX[:, 0]], return_inverse=True)[1]


def _check_pairs(data: TaskData, group_P: np.ndarray, method: str, num_folds: int, seed: int) -> None:
    """Check that connected pairs do not fill most of the folds."""
    if data.pairs is None or not _find_shortage(data, group_P, num_folds, seed):
        return
    largest = int(np.bincount(group_P).max())
    raise InputError(
        f"{largest} of {format_count(len(group_P), 'pair')} are one group ({method}), so {num_folds} folds without "
        "common proteins are not possible. Choose fewer folds, or omit --folds: with --split_by identity the proteins "
        "are divided, and pairs of proteins in different sets are left out.",
        code="folds.pairs-connected",
        pairs=len(group_P),
        largest=largest,
        folds=num_folds,
    )


def _find_shortage(data: TaskData, group_P: np.ndarray, num_folds: int, seed: int) -> str:
    """Describe the smallest fold if it has fewer than half of its share of the proteins; empty otherwise."""
    share = len(group_P) / num_folds
    if int(group_P.max()) + 1 < num_folds:
        return f"fewer groups than {num_folds} folds"
    smallest = int(np.bincount(_divide(data, group_P, num_folds, seed)).min())
    noun = "protein" if data.pairs is None else "pair"
    return f"{format_count(smallest, noun)} in a fold instead of {share:.0f}" if smallest < share / 2 else ""


def _list_members(data: TaskData) -> dict[tuple[str, str], np.ndarray]:
    """Return the proteins (P,) of each class or label, or with a value in each of several columns; none for others."""
    task, members = data.task, {}
    if task.is_multilabel:
        members = {("label", name): y_P > 0 for name, y_P in zip(task.binary_labels, data.targets.T, strict=True)}
    elif task.columns:
        known_PC = np.isfinite(data.targets)
        members = {("column", name): y_P for name, y_P in zip(task.columns, known_PC.T, strict=True)}
    elif task.target == "class" and task.labels:
        protein_N, classes_N = data.protein_of_target[data.scored], data.targets[data.scored]
        for place, label in enumerate(task.labels):
            member_P = np.zeros(len(data.ids), dtype=bool)
            member_P[protein_N[classes_N == place]] = True
            members["class", label] = member_P
    return {name: member_P for name, member_P in members.items() if member_P.any()}


def _check_classes(data: TaskData, group_P: np.ndarray, fold_RP: np.ndarray) -> None:
    """Check that each class, label or column is in at least two folds, so that every fold has a probe that knows it."""
    for (kind, name), member_P in _list_members(data).items():
        proteins = np.flatnonzero(member_P)
        for fold_P in fold_RP:
            if len(np.unique(fold_P[proteins])) < 2:
                groups = len(np.unique(group_P[proteins]))
                raise InputError(
                    f"{kind} {name!r} ({format_count(len(proteins), 'protein')} in {format_count(groups, 'group')}) "
                    "is in one fold only, so no probe that was trained on other folds can predict it. Add proteins of "
                    "it from other groups, or merge or remove it.",
                    code="folds.class-in-one-fold",
                    label=name,
                    proteins=len(proteins),
                    groups=groups,
                )


def hold_out(data: TaskData, plan: FoldPlan, repeat: int, fold: int, seed: int = 0) -> TaskData:
    """Make a fold the test set, and a fifth of the other proteins, in whole groups, the validation set.

    Args:
        data: the task.
        plan: its folds.
        repeat: number of the repeat.
        fold: number of the fold.
        seed: of the choice of the validation set.

    Returns:
        The task with these sets. Every class of the other folds is in train.

    Raises:
        InputError: no validation set can be chosen.
    """
    fold_P = plan.fold_RP[repeat]
    fit = np.flatnonzero(fold_P != fold)
    sets = np.full(len(fold_P), "test", dtype="U10")
    sets[fit] = choose_validation(data, fit, plan.group_P[fit], seed + repeat)
    return replace(data, sets=sets)


def choose_validation(data: TaskData, rows: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Divide proteins into train and validation, in whole groups.

    Args:
        data: the task.
        rows: (F,) the proteins.
        groups: (F,) their groups.
        seed: of the choice.

    Returns:
        (F,) "train" or "validation".

    Raises:
        InputError: the proteins are of a single group, or every validation set would have a class that train lacks.
    """
    keys = [f"{data.sequences[row]} {data.ids[row]}" for row in rows.tolist()]
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise InputError(
            f"the {format_count(len(rows), 'protein')} of the other folds are one group, so none can be held out for "
            "validation. Choose finer groups.",
            code="folds.no-validation",
            groups=num_groups,
        )
    num_inner = min(INNER_FOLDS, num_groups)
    inner_F = assign_folds(name_groups(groups, keys), num_inner, seed, stratify(data)[rows])
    if data.targets.ndim > 1:
        held_F = _choose_inner_fold(data, rows, inner_F)
    elif data.task.target == "class":
        tried = (_keep_classes_in_train(data, rows, groups, inner_F == number) for number in range(num_inner))
        held_F = next((held_F for held_F in tried if held_F.any()), np.zeros(len(rows), dtype=bool))
    else:
        held_F = inner_F == 0
    if not held_F.any():
        raise InputError(
            f"the {format_count(num_groups, 'group')} of the other folds leave no protein for validation, because each "
            "class must be in train. Choose finer groups, or add proteins.",
            code="folds.no-validation",
            groups=num_groups,
        )
    return np.where(held_F, "validation", "train")


def _keep_classes_in_train(data: TaskData, rows: np.ndarray, groups: np.ndarray, held_F: np.ndarray) -> np.ndarray:
    """Return which proteins (F,) remain for validation after the groups with a class that train lacks are in train."""
    place_P = np.full(len(data.ids), -1)
    place_P[rows] = np.arange(len(rows))
    place_N = place_P[data.protein_of_target]  # of each class; -1 in the fold that is tested
    known_N = data.scored & (place_N >= 0)
    place_N, classes_N = place_N[known_N], data.targets[known_N]
    held_N = held_F[place_N]
    unseen_N = np.isin(classes_N, np.setdiff1d(classes_N[held_N], classes_N[~held_N]))
    return held_F & ~np.isin(groups, groups[place_N[unseen_N]])


def _choose_inner_fold(data: TaskData, rows: np.ndarray, inner_F: np.ndarray) -> np.ndarray:
    """Choose the first inner fold that can be validation for several targets.

    Args:
        data: the task.
        rows: (F,) the proteins.
        inner_F: (F,) the inner fold of each.

    Returns:
        (F,) which proteins are validation: train has each label, and both sets have a value in each column.

    Raises:
        InputError: there is no such fold.
    """
    members = {name: member_P[rows] for name, member_P in _list_members(data).items()}
    for number in range(int(inner_F.max()) + 1):
        held_F = inner_F == number
        if data.task.is_multilabel:
            absent = [name for name, own_F in members.items() if own_F.any() and not own_F[~held_F].any()]
        else:
            absent = [name for name, own_F in members.items() if not (own_F[held_F].any() and own_F[~held_F].any())]
        if not absent:
            return held_F
    count, (kind, name) = int(members[absent[0]].sum()), absent[0]
    raise InputError(
        f"{kind} {name!r}: the {format_count(count, 'protein')} in the other folds of a fold cannot be divided into "
        "train and validation. Add proteins of it from other groups, choose more folds, or remove it.",
        code="folds.few-values",
        target=name,
        proteins=count,
    )


def read_task_column(data: TaskData, source: Path, name: str, id: str | None = None) -> np.ndarray:
    """Read a column of a task's table, or a field of the headers of its FASTA, for each protein.

    Args:
        data: the task.
        source: the file.
        name: column or field.
        id: column of the names of the proteins. None finds it, or the column of the sequences.

    Returns:
        (P,) texts.

    Raises:
        InputError: the file is a zip archive, there is no such column, a protein has no entry, or it has two
            different ones.
    """
    if source.suffix.lower() == ".zip":
        raise InputError(
            f"{source} is a zip archive, from which the column {name!r} is not read. Unzip it, and pass the table.",
            code="folds.zipped",
            column=name,
            path=source,
        )
    if is_fasta_name(source.name):
        entries = _read_fields(data, Source(source), name)
    else:
        entries = _read_cells(data, source, name, id)
    found: list[str] = []
    for row, (protein, entry) in enumerate(zip(data.ids, entries, strict=True)):
        if not entry or {text.lower() for text in entry} <= MISSING:
            raise InputError(
                f"{source}: protein {protein!r} has no entry in column {name!r}. Fill in the cell, or remove the "
                "protein.",
                code="folds.no-entry",
                record=protein,
                column=name,
                path=source,
            )
        if len(entry) > 1:
            raise InputError(
                f"{source}: protein {protein!r}, or another one of its sequence, has several entries in column "
                f"{name!r}, such as {sorted(entry)[0]!r} and {sorted(entry)[1]!r}. Correct one of them.",
                code="folds.two-entries",
                record=data.ids[row],
                column=name,
                path=source,
            )
        found.append(next(iter(entry)))
    return np.array(found)


def _read_fields(data: TaskData, source: Source, name: str) -> list[set[str]]:
    """Read a field of the headers of a FASTA: its entries for each protein."""
    entries: dict[str, set[str]] = {}
    fields: dict[str, None] = {}
    for header, _ in read_records(source):
        row_id, attributes = parse_attributes(header, source)
        fields |= dict.fromkeys(attributes)
        if attributes.get(name.upper()):
            entries.setdefault(row_id, set()).add(attributes[name.upper()])
    if name.upper() not in fields:
        raise InputError(
            f"{source}: no header has the field {name.upper()}=; the fields are {', '.join(fields) or 'none'}. Write "
            "the names of fields in capital letters, or choose another one.",
            code="folds.no-field",
            field=name.upper(),
            path=source.path,
        )
    return [entries.get(protein, set()) for protein in data.ids]


def _read_cells(data: TaskData, source: Path, name: str, id: str | None) -> list[set[str]]:
    """Read a column of a table: its entries for each protein, found by name or else by sequence."""
    table = read_table(source)
    cells = table.cells(table.find_column(name))
    pairs = dict.fromkeys(zip(data.ids, data.sequences, strict=True))
    records = [Record(name, name, sequence) for name, sequence in pairs]
    places = range(len(table.columns)) if id is None else [table.find_column(id)]
    matcher = RecordMatcher(records)
    matched = [matcher.match(table.cells(place)).records for place in places]
    best = max(matched, key=lambda rows: len(set(rows) - {-1}))
    entries: dict[str, set[str]] = {}
    if len(set(best) - {-1}) == len(records):
        for row, cell in zip(best, cells, strict=True):
            if row >= 0:
                entries.setdefault(records[row].id, set()).add(cell)
        return [entries.get(protein, set()) for protein in data.ids]
    wanted = set(data.sequences)
    for place in range(len(table.columns)):
        sequences = ["".join(cell.split()).upper().removesuffix("*") for cell in table.cells(place)]
        if wanted <= set(sequences):
            for sequence, cell in zip(sequences, cells, strict=True):
                entries.setdefault(sequence, set()).add(cell)
            return [entries[sequence] for sequence in data.sequences]
    raise InputError(
        f"{source}: the rows cannot be assigned to the proteins of the task, to read the column {name!r}. Add a column "
        "id with the names of the proteins.",
        code="folds.no-id",
        column=name,
        path=source,
    )
