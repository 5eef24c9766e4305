"""Find the files of a custom task, and infer from them what is predicted."""

from pathlib import Path
from typing import Any, get_args

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.tasks.files import ENDINGS, Source, TaskRecord, find_split_names, parse_split_name
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.labels import has_decimal_comma, is_integer, is_number
from esm2kit.tasks.metrics import CLASS_METRICS, VALUE_METRICS
from esm2kit.tasks.task import Split, Target, Task

# Integer targets with at most this many distinct values are treated as classes.
MAX_INTEGER_CLASSES = 20


def find_custom_task(task: str, split: str | None, data_dir: Path) -> tuple[Path, str, Path | None]:
    """Find the files of a custom task.

    Args:
        task: name or path of its folder, or of the file of one split.
        split: name of the split. None selects the only one.
        data_dir: folder that contains the task folders.

    Returns:
        The folder, the name of the split, and the split's file if `task` is one.

    Raises:
        InputError: the task or the split does not exist, or the split must be specified.
    """
    named = (f"{task}{ending}" for ending in ("", *ENDINGS))
    for path in (*(data_dir / name for name in named), Path(task)):
        if path.is_file():
            only = parse_split_name(path.name)
            if only is None:
                raise InputError(
                    f"{path} must end in one of {', '.join(ENDINGS)}. Save a table as CSV.",
                    code="task.not-a-split",
                    path=path,
                )
            if split not in (None, only):
                raise InputError(
                    f"{path} is the file of split {only!r}, not of {split!r}. Omit split, or specify the folder.",
                    code="task.one-split",
                    split=split,
                    found=only,
                    path=path,
                )
            return path.parent, only, path
        if path.is_dir():
            names = find_split_names(path)
            if not names:
                files = sorted(file.name for file in path.iterdir())
                found = f"has no split, only {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"
                raise InputError(
                    f"{path} {found if files else 'is empty'}. Add a .csv table, or a .fasta with SET= in its headers.",
                    code="task.no-split",
                    path=path,
                )
            if split is None and len(names) > 1:
                raise InputError(
                    f"{path} has {len(names)} splits ({', '.join(names)}). Choose one, such as --split {names[0]}.",
                    code="task.which-split",
                    allowed=tuple(names),
                    path=path,
                )
            return path, split or names[0], None
    paths = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
    custom = [path.name if path.is_dir() else parse_split_name(path.name) for path in paths]
    custom = [name for name in dict.fromkeys(custom) if name]
    known = [*custom, *(name for name in TASKS if name not in custom)]
    place = f"data_dir '{data_dir}'" + ("" if data_dir.is_dir() else ", which is not a folder")
    raise InputError(
        f"unknown task {task!r}: it is neither a FLIP task nor a file or folder here or in {place}; "
        f"{suggest_name(task, known)}",
        code="task.unknown",
        name=task,
        nearest=find_closest(task, known),
    )


def infer_task(
    name: str,
    split: str,
    rows: list[TaskRecord],
    sources: dict[str, Source],
    target: Target | None,
    declared: dict[str, Any],
) -> Task:
    """Infer a custom task from its records.

    It is a residue task if the labels are in a file of their own, if most targets contain semicolons, or if most have
    one character per residue.

    Args:
        name: of the task.
        split: name of the split.
        rows: records of the split.
        sources: files that were read.
        target: "class" or "value". None uses tasks.yaml, or infers it from the targets.
        declared: the task's entry in tasks.yaml.

    Returns:
        The task.

    Raises:
        InputError: a target is missing, or tasks.yaml has an invalid value.
    """
    source = sources["split"]
    for row in rows:
        if row.target is None:
            fix = "Add TARGET= to its header, or provide a sequences.fasta in the same folder"
            fix = "Fill in the cell, or remove the row" if source.is_table else fix
            raise InputError(
                f"{source}: record {row.id!r} has no target. {fix}.",
                code="task.no-target",
                record=row.id,
                path=source.path,
            )
    texts = [row.target or "" for row in rows]
    # The majority decides, so that a record with an invalid target raises an error later and does not change the task.
    separated = 2 * sum(";" in text for text in texts) > len(rows)
    fitting = sum(len(text) == len(row.sequence) and text.isalnum() for text, row in zip(texts, rows, strict=True))
    lettered = "sequences" in sources or 2 * fitting > len(rows)
    if separated or lettered:
        level, kind = "residue", "value" if separated else "class"
        found = {letter for text in texts for letter in text}
    else:
        level, found = "protein", set(texts)
        kind = target or declared.get("target") or _infer_protein_target(rows, texts, source)
    if kind not in get_args(Target):
        raise InputError(
            f"task {name}: target must be class or value, found {kind!r}",
            code="task.target-kind",
            task=name,
            found=kind,
        )
    known, metric = (VALUE_METRICS, "spearman") if kind == "value" else (CLASS_METRICS, "accuracy")
    metric = declared.get("metric", metric)
    if metric not in known:
        raise InputError(
            f"task {name}: metric {metric!r} is not available for a {kind}; {suggest_name(str(metric), known)}",
            code="task.metric",
            task=name,
            found=metric,
            allowed=known,
        )
    labels = ()
    if kind == "class":
        numbers = all(map(is_number, found))
        in_order = sorted(found, key=lambda label: (float(label) if numbers else 0.0, label))  # 2 comes before 10
        labels = tuple(str(label) for label in declared.get("classes", in_order))
    notes = [
        declared.get("description", ""),
        "the target is computed, not measured" if declared.get("computed") else "",
    ]
    return Task(
        name=name,
        level=level,
        target=kind,
        metric=metric,
        splits={split: Split()},
        default_split=split,
        labels=labels,
        unit=declared.get("unit", ""),
        citation=declared.get("source", ""),
        licence=declared.get("licence", "not specified"),
        note="; ".join(note.strip().rstrip(".") for note in notes if note),
    )


def _infer_protein_target(rows: list[TaskRecord], texts: list[str], source: Source) -> Target:
    """Infer the target from the majority: among numbers, a text is an error and not a class.

    Returns:
        "class" or "value".

    Raises:
        InputError: a target is nan, or is not a number although most targets are.
    """
    for row, text in zip(rows, texts, strict=True):
        if text.lower() == "nan":  # an empty cell of a table, not a class
            raise InputError(
                f"{source}: record {row.id!r} has the target {text!r}. Correct it, or remove the record.",
                code="task.target",
                record=row.id,
                found=text,
                path=source.path,
            )
    numeric = [is_number(text) or has_decimal_comma(text) for text in texts]
    if 2 * sum(numeric) <= len(rows):
        return "class"
    for row, text, fits in zip(rows, texts, numeric, strict=True):
        if not fits:
            found = f"target {text!r} of record {row.id!r} is not a number, but {sum(numeric)} others are"
            raise InputError(
                f"{source}: {found}. Correct it, remove the record, or set target to class.",
                code="task.target",
                record=row.id,
                found=text,
                path=source.path,
            )
    few = len(set(texts)) <= MAX_INTEGER_CLASSES
    return "class" if few and all(map(is_integer, texts)) else "value"
