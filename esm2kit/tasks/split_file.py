"""Write the sets of a task that were chosen here, as a task file that can be used again."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from esm2kit.core.files import atomic_path
from esm2kit.tasks.label_sets import format_label_set
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

SPLIT_FILE = "split.csv"


def write_split(data: TaskData, out_dir: Path) -> Path | None:
    """Write `split.csv` with the columns id, set, target and sequence, if the sets are not those of the task's files.

    Several values have their own columns instead of `target`; the labels of a multi-label task are in `target`,
    separated by semicolons, with [] for a protein without a label.

    Args:
        data: the task.
        out_dir: folder of the file.

    Returns:
        The path, or None if nothing is written.
    """
    if not data.split_method:
        return None
    path = out_dir / SPLIT_FILE
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = data.targets.T.tolist() if data.task.columns else [_format_targets(data)]
        names = ["id", "set", *(data.task.columns or ["target"]), "sequence"]
        cells = [data.ids, data.sets, *columns, data.sequences]
        if data.pairs is not None:
            names = ["protein_a", "protein_b", *names[1:-1], "sequence_a", "sequence_b"]
            cells = [data.pairs.first_ids, data.pairs.second_ids, *cells[1:], data.pairs.second]
        table.writerow(names)
        table.writerows(zip(*cells, strict=True))
    logger.info("wrote the sets to %s (%s)", path, data.split_method)
    return path


def _format_targets(data: TaskData) -> Iterator[str]:
    """Yield the target of each protein as `tasks.files` reads it; of residues a list with nan where none is scored."""
    if data.task.is_multilabel:
        yield from (format_label_set(present_L, data.task.binary_labels) or "[]" for present_L in data.targets)
        return
    for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        targets, scored = data.targets[start:stop], data.scored[start:stop]
        names = [data.task.labels[index] if data.task.labels else repr(float(index)) for index in targets]
        if data.task.level == "protein":
            yield names[0]
        elif data.task.labels:
            yield (
                "[" + ", ".join(f"'{name}'" if used else "nan" for name, used in zip(names, scored, strict=True)) + "]"
            )
        else:
            yield ";".join(name if used else "nan" for name, used in zip(names, scored, strict=True))
