"""Pack the records of a split into the arrays of a task: classes, values or several targets, and what is scored."""

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.tasks.files import TaskRecord
from esm2kit.tasks.label_sets import pack_columns
from esm2kit.tasks.labels import parse_mask, parse_number, parse_residue_targets
from esm2kit.tasks.sources import Source
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData


def pack_targets(task: Task, split: str, rows: list[TaskRecord], sources: dict[str, Source]) -> tuple[TaskData, int]:
    """Pack the targets of records into arrays.

    Args:
        task: the task.
        split: name of the split.
        rows: its records.
        sources: files that they were read from, with "split".

    Returns:
        The task, and the number of residues without a measurement.

    Raises:
        InputError: there is no record, or a target is missing or invalid.
    """
    source = sources["split"]
    if not rows:
        raise InputError(f"{source}: no record belongs to a set", code="task.no-records", path=source.path)
    if task.has_columns:
        packed_PC = pack_columns(task, rows, source)
        return _build_data(task, split, rows, packed_PC, np.ones(len(rows), dtype=bool), sources), 0
    index = task.label_index()
    letters = {ord(label): place for label, place in index.items() if len(label) == 1}
    table = np.full(max(letters, default=0) + 2, -1, dtype=np.int64)
    table[list(letters)] = list(letters.values())
    targets, scored, unmeasured = [], [], 0
    for row in rows:
        if row.target is None:
            raise InputError(
                f"{source}: record {row.id!r} has no target", code="task.no-target", record=row.id, path=source.path
            )
        if task.level == "residue":
            values, measured = parse_residue_targets(task, row, table, source)
            targets.append(values)
            scored.append(parse_mask(row, source) & measured)
            unmeasured += int((~measured).sum())
        elif task.target == "value":
            targets.append([parse_number(row, row.target, source)])
            scored.append([True])
        else:
            spelling = row.target if row.target in index else row.target.replace(" ", "_").replace(".", "_")
            if spelling not in index:
                raise InputError(
                    f"{source}: record {row.id!r} has the unknown label {row.target!r}. "
                    f"Use one of {', '.join(task.labels)}.",
                    code="task.label",
                    record=row.id,
                    found=row.target,
                    known=task.labels,
                )
            targets.append([index[spelling]])
            scored.append([True])
    dtype = np.float64 if task.target == "value" else np.int64
    packed_N = np.concatenate(targets).astype(dtype)
    return _build_data(task, split, rows, packed_N, np.concatenate(scored).astype(bool), sources), unmeasured


def _build_data(
    task: Task,
    split: str,
    rows: list[TaskRecord],
    targets: np.ndarray,
    scored: np.ndarray,
    sources: dict[str, Source],
) -> TaskData:
    return TaskData(
        task=task,
        split=split,
        ids=[row.id for row in rows],
        sequences=[row.sequence for row in rows],
        sets=np.array([row.set for row in rows]),
        targets=targets,
        scored=scored,
        files={name: found.path for name, found in sources.items()},
    )
