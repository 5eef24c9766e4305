"""A task of the user's own: where its files lie, and what they say is predicted."""

from pathlib import Path
from typing import Any, get_args

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.tasks.files import ENDINGS, Source, TaskRecord, find_split_names, parse_split_name
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.labels import has_decimal_comma, is_integer, is_number
from esm2kit.tasks.metrics import CLASS_METRICS, VALUE_METRICS
from esm2kit.tasks.task import Split, Target, Task

# Integer targets with at most this many distinct values are taken for classes.
MAX_INTEGER_CLASSES = 20


def find_custom_task(task: str, split: str | None, data_dir: Path) -> tuple[Path, str, Path | None]:
    """Folder and split of a user's task, and the split's file if that was named."""
    named = (f"{task}{ending}" for ending in ("", *ENDINGS))
    for path in (*(data_dir / name for name in named), Path(task)):
        if path.is_file():
            only = parse_split_name(path.name)
            if only is None:
                found = f"it ends in none of {', '.join(ENDINGS)}; save a table as CSV"
                raise InputError(f"{path} is no split's file: {found}", code="task.not-a-split", path=path)
            if split not in (None, only):
                raise InputError(
                    f"{path} is one split, {only!r}; leave split out, or name the folder",
                    code="task.one-split",
                    split=split,
                    found=only,
                    path=path,
                )
            return path.parent, only, path
        if path.is_dir():
            names = find_split_names(path)
            if not names:
                there = sorted(file.name for file in path.iterdir())
                shown = (
                    f"no split, only {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else "nothing"
                )
                raise InputError(
                    f"{path} holds {shown}: a split is a table saved as .csv, or a .fasta whose headers have SET=",
                    code="task.no-split",
                    path=path,
                )
            if split is None and len(names) > 1:
                found = f"{path} holds {len(names)} splits ({', '.join(names)})"
                raise InputError(
                    f"{found}: name one, as in --split {names[0]}",
                    code="task.which-split",
                    allowed=tuple(names),
                    path=path,
                )
            return path, split or names[0], None
    there = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
    own = [path.name if path.is_dir() else parse_split_name(path.name) for path in there]
    own = [name for name in dict.fromkeys(own) if name]
    known = [*own, *(name for name in TASKS if name not in own)]
    place = f"data_dir {data_dir}" + ("" if data_dir.is_dir() else ", which is no folder")
    raise InputError(
        f"unknown task {task!r}, and nothing of that name lies here or in {place}: {suggest_name(task, known)}",
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
    """What a user's files say they hold: labels of residues if they come apart from the sequences, or one a residue."""
    source = sources["split"]
    for row in rows:
        if row.target is None:
            lacks = "no TARGET= and no sequences.fasta is beside it"
            lacks = "an empty target; fill it in, or drop the row" if source.is_table else lacks
            raise InputError(
                f"{source}: record {row.id!r} has {lacks}", code="task.no-target", record=row.id, path=source.path
            )
    texts = [row.target or "" for row in rows]
    # What most rows are: a row whose labels are too few, too many or no numbers is an error later, and does not decide.
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
            f"task {name}: target {kind!r} is neither class nor value", code="task.target-kind", task=name, found=kind
        )
    known, metric = (VALUE_METRICS, "spearman") if kind == "value" else (CLASS_METRICS, "accuracy")
    metric = declared.get("metric", metric)
    if metric not in known:
        raise InputError(
            f"task {name}: metric {metric!r} does not score a {kind}; {suggest_name(str(metric), known)}",
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
        licence=declared.get("licence", "the user's own"),
        note="; ".join(note.strip().rstrip(".") for note in notes if note),
    )


def _infer_protein_target(rows: list[TaskRecord], texts: list[str], source: Source) -> Target:
    """Class or value, by what most targets are: a text among numbers does not make classes of them."""
    for row, text in zip(rows, texts, strict=True):
        if text.lower() == "nan":  # a table's blank cell, and no class of its own
            raise InputError(
                f"{source}: record {row.id!r} has the target {text!r}; drop the record or fix it",
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
            found = f"record {row.id!r} has the target {text!r}, which is no number, as {sum(numeric)} others are"
            raise InputError(
                f"{source}: {found}; fix or drop it, or set target to class",
                code="task.target",
                record=row.id,
                found=text,
                path=source.path,
            )
    few = len(set(texts)) <= MAX_INTEGER_CLASSES
    return "class" if few and all(map(is_integer, texts)) else "value"
