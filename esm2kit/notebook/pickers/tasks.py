"""Pickers for tasks, splits and FASTA files."""

import contextlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Self

import ipywidgets
import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path, portable_name
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions
from esm2kit.sequences.fasta import is_fasta_name, read_fasta
from esm2kit.tasks.data import load_labels, load_task
from esm2kit.tasks.download import is_downloaded
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.kinds import list_splits
from esm2kit.tasks.published import PUBLISHED
from esm2kit.tasks.task import Split, Task
from esm2kit.tasks.task_data import TaskData

MAX_RESIDUES = 1022
CHECKED_RECORDS = 20_000
LIGHTS = {
    "green": ("#2e7d32", "suited for comparing models"),
    "orange": ("#b26a00", "overestimates performance, or repeats another split; not suited for comparing models"),
    "red": ("#b3261e", "obsolete; not suited for comparing models"),
}


class TaskChoice(NamedTuple):
    """A task and one of its splits, or a table of measurements.

    Args:
        task: name of the task; that of a table is its file and the column of the targets.
        split: its split; empty for the default.
        settings: parameters of the dataclasses of stages that read a task.
    """

    task: str
    split: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, task: str, data_dir: Path | str) -> Self:
        """Choose the default split of a task in data_dir."""
        return cls(task, "", {"task": task, "data_dir": expand_path(data_dir)})

    def folder_name(self, *more: str) -> str:
        """Name a folder after the task, its split and further words."""
        return "_".join(portable_name(part) for part in (self.task, self.split, *more) if part)


def task_picker(
    task: str,
    split: str,
    data_dir: Path | str,
    fasta: str = "",
    labels: str = "",
    id: str = "",
    target: str = "",
) -> View:
    """Choose a task and a split: parameters `task` and `split`; or a table of measurements, if `labels` is given.

    Args:
        task: a FLIP task or a folder in data_dir.
        split: split of the task; empty for its default.
        data_dir: folder of task folders.
        fasta: sequences of the proteins in labels; empty: a column of the table.
        labels: table of measurements to use instead of a task; empty: the task.
        id: column of the ids; empty: found by itself.
        target: column of the targets; empty: found by itself.

    Returns:
        A view whose value is a TaskChoice.
    """
    if labels:
        return _labels_picker(fasta, labels, id, target)
    folder = expand_path(data_dir)
    own = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name not in TASKS)
    names = [*own, *TASKS] if task in (*own, *TASKS) else [task, *own, *TASKS]
    options = [(f"{name} ({_find_place(name, folder)})", name) for name in names]
    tasks = ipywidgets.Select(
        options=options, value=task, rows=min(len(names), 16), description="Task", style=LABEL, layout=WIDE
    )
    splits = ipywidgets.Dropdown(description="Split", style=LABEL, layout=WIDE)

    def update_splits(name: str, chosen: str) -> None:
        options = [("the default", ""), *((_format_split(name, each), each) for each in _list_splits(name, folder))]
        if chosen not in [value for _, value in options]:
            options.append((f"{chosen} (unknown)", chosen))
        splits.options = options
        splits.value = chosen

    update_splits(task, split)
    tasks.observe(lambda change: update_splits(change["new"], ""), "value")
    return View({"task": tasks, "split": splits}, lambda given: _resolve_task(given["task"], given["split"], folder))


def _labels_picker(fasta: str, labels: str, id: str, target: str) -> View:
    """Choose a table of measurements: parameters `fasta`, `labels`, `id` and `target`."""
    texts = (
        ("fasta", fasta, "FASTA file", "a column of the table has the sequences"),
        ("labels", labels, "Table", "CSV, TSV or Excel"),
        ("id", id, "Column of ids", "the column that names most records of the FASTA file"),
        ("target", target, "Column of targets", "the only column of numbers"),
    )
    controls = {
        name: ipywidgets.Text(
            value=value, description=label, placeholder=empty, style=LABEL, layout=WIDE, continuous_update=False
        )
        for name, value, label, empty in texts
    }
    return View(controls, _resolve_labels)


def _resolve_labels(given: dict[str, str]) -> tuple[TaskChoice, str]:
    settings = {name: Path(given[name]).expanduser() if given[name] else None for name in ("fasta", "labels")}
    settings |= {name: given[name] or None for name in ("id", "target")}
    if settings["labels"] is None:
        raise InputError("the table of measurements has no name: enter the path of a CSV, TSV or Excel file",
                         code="option.labels", option="labels")  # fmt: skip
    paths = [path for path in (settings["fasta"], settings["labels"]) if path]
    changed = tuple(path.stat().st_mtime_ns for path in paths if path.exists())
    data = _load_table(*settings.values(), changed)
    sizes = Split(data.sizes["train"], data.sizes["validation"], data.sizes["test"])
    where = " and ".join(path.name for path in paths)
    return TaskChoice(data.task.name, "", settings), _format_task_card(
        data.task, data.split, sizes, list(data.notes), where
    )


@lru_cache(maxsize=8)
def _load_table(
    fasta: Path | None, labels: Path, id: str | None, target: str | None, changed: tuple[int, ...]
) -> TaskData:
    with _silenced("esm2kit.tasks.data", "esm2kit.tasks.labels_table"):  # the card shows these notes
        return load_labels(labels, fasta, id, target)


@contextlib.contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Disable loggers for a while."""
    logs = [logging.getLogger(name) for name in names]
    before = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled


def _find_place(task: str, folder: Path) -> str:
    if task in TASKS:
        return "FLIP, on disk" if is_downloaded(task, folder) else "FLIP, a download"
    return "in this folder" if (folder / task).exists() else "not found"


def _list_splits(task: str, folder: Path) -> list[str]:
    if task in TASKS:
        return list(TASKS[task].splits)
    try:
        return list_splits(folder / task) if (folder / task).is_dir() else []
    except InputError:
        return []  # a damaged zip: the card shows the error


def _format_split(task: str, split: str) -> str:
    if task not in TASKS:
        return split
    spec = TASKS[task].splits[split]
    test = "" if spec.test is None else f", {spec.test:,} test proteins"
    return f"{split} ({spec.light}{test})"


def _resolve_task(task: str, split: str, folder: Path) -> tuple[TaskChoice, str]:
    if task in TASKS:
        spec = TASKS[task]
        name = split or spec.default_split
        if name not in spec.splits:
            raise InputError(
                f"task {task} has no split {name!r}: choose one of {', '.join(spec.splits)}",
                code="task.no-split",
                task=task,
                split=name,
            )
        sizes, notes = spec.splits[name], [spec.note, spec.splits[name].note]
        where = "on disk" if is_downloaded(task, folder) else f"not in {folder} yet: the benchmark downloads them"
    else:
        path = folder / task
        changed = tuple(file.stat().st_mtime_ns for file in (path, *path.glob("*")) if file.exists())
        spec, name, sizes, notes = _load_local_task(task, split, folder, changed)
        where = "on disk"
    settings = {"task": task, "split": split or None, "data_dir": folder}
    return TaskChoice(task, split, settings), _format_task_card(spec, name, sizes, notes, where)


@lru_cache(maxsize=32)
def _load_local_task(
    task: str, split: str, folder: Path, changed: tuple[int, ...]
) -> tuple[Task, str, Split, list[str]]:
    with _silenced("esm2kit.tasks.data"):  # the card shows these notes
        data = load_task(task, split or None, folder)
    counted = Split(data.sizes["train"], data.sizes["validation"], data.sizes["test"])
    return data.task, data.split, counted, list(data.notes)


def _format_task_card(spec: Task, split: str, sizes: Split, notes: list[str], where: str) -> str:
    counts = ", ".join(
        f"{name} {'unknown' if size is None else f'{size:,}'}"
        for name, size in (("train", sizes.train), ("validation", sizes.validation), ("test", sizes.test))
    )
    target = f"{len(spec.labels)} classes" if spec.labels else f"a value{f' ({spec.unit})' if spec.unit else ''}"
    if spec.has_columns:
        target = f"{spec.num_outputs} {'labels' if spec.is_multilabel else 'values'}"
    published = [item for item in PUBLISHED if (item.task, item.split, item.metric) == (spec.name, split, spec.metric)]
    scores = "; ".join(f"{escape(item.model)} {item.value:g}" for item in published)
    return format_definitions(
        {
            "split": f"{escape(split)} {format_traffic_light(sizes.light) if spec.name in TASKS else ''}",
            "predicts": f"{target} per {spec.level}, scored by {spec.metric}",
            "proteins": counts,
            "files": escape(where),
            "published": f"{spec.metric}: {scores}" if scores else None,
            "notes": "; ".join(escape(note.rstrip(".").replace(".;", ";")) for note in notes if note) or None,
            "cite": escape(spec.citation) or None,
        }
    )


def format_traffic_light(name: str) -> str:
    """Format a traffic light of FLIP as a coloured dot, its name and its meaning.

    Args:
        name: green, orange or red.

    Returns:
        HTML.
    """
    colour, meaning = LIGHTS[name]
    dot = f'<span aria-hidden="true" style="display:inline-block;width:.8em;height:.8em;border-radius:50%;background:{colour}"></span>'  # noqa: E501
    return f"{dot} {name}: {meaning}"


def file_picker(path: str, name: str = "fasta", label: str = "FASTA file") -> View:
    """Choose a FASTA file; the file is read immediately.

    Args:
        path: the file; the other FASTA files of its folder are offered for completion.
        name: name of the parameter.
        label: label of the field.

    Returns:
        A view whose value is the path.
    """
    folder = expand_path(path).parent
    known = sorted(str(file) for file in folder.glob("*") if is_fasta_name(file.name))
    field = ipywidgets.Combobox(
        value=path,
        options=known,
        description=label,
        style=LABEL,
        layout=WIDE,
        continuous_update=False,
        placeholder="a path, relative to the folder of this notebook",
    )
    return View({name: field}, lambda given: _resolve_file(given[name]))


def _resolve_file(text: str) -> tuple[Path, str]:
    path = expand_path(text)
    if not text or not path.exists():
        near = path.parent if path.parent.is_dir() else None
        found = sorted(file.name for file in near.iterdir() if is_fasta_name(file.name)) if near else []
        hint = f"{path.parent} has {', '.join(found[:5]) or 'no FASTA files'}" if near else f"nor does {path.parent}"
        raise InputError(f"{text or 'the empty path'} does not exist; {hint}", code="fasta.absent", path=text)
    if path.is_dir():
        raise InputError(f"{path} is a folder: choose a FASTA file in it", code="fasta.folder", path=str(path))
    stat = path.stat()
    num_residues, complete = _read_lengths(path, stat.st_size, stat.st_mtime_ns)
    longer = int((num_residues > MAX_RESIDUES).sum())
    counted = f"{len(num_residues):,}" + ("" if complete else f" checked, of more ({stat.st_size / 1e6:,.0f} MB)")
    spread = f"{num_residues.min():,} to {num_residues.max():,}, median {np.median(num_residues):,.0f}"
    given = Path(text).expanduser()
    rows = {
        "path": escape(text) + ("" if given.is_absolute() else ", relative to the folder of this notebook"),
        "records": counted,
        "residues": spread,
        "longer than a window": f"{longer:,} with over {MAX_RESIDUES:,} residues",
    }
    return path, format_definitions(rows)


@lru_cache(maxsize=16)
def _read_lengths(path: Path, size: int, changed: int) -> tuple[np.ndarray, bool]:
    """Lengths of the first records, and whether these are all. A bad record raises the same error as in a stage."""
    lengths, complete = [], True
    for record in read_fasta(path):
        if len(lengths) == CHECKED_RECORDS:
            complete = False
            break
        lengths.append(len(record.sequence))
    return np.array(lengths), complete
