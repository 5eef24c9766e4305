"""Find the files of a custom task, and infer from them what is predicted."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.sequences.pipes import is_pipe
from esm2kit.tasks.files import TaskRecord
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.kinds import SET_COLUMN, check_readable, find_set_files, list_inner_splits, list_splits
from esm2kit.tasks.label_metrics import LABEL_METRICS
from esm2kit.tasks.label_sets import infer_column_type, read_label_sets
from esm2kit.tasks.labels import UNMEASURED, has_comma, is_integer, is_number, split_residue_labels
from esm2kit.tasks.metrics import CLASS_METRICS, VALUE_METRICS
from esm2kit.tasks.sources import ENDINGS, Source, find_source, parse_split_name
from esm2kit.tasks.task import Level, Split, Target, TargetType, Task

# Integer targets with at most this many distinct values are treated as classes.
MAX_INTEGER_CLASSES = 20
# Alphabets of residue labels have fewer letters, such as the 20 states of 3Di.
MAX_LABEL_LETTERS = 25
MAX_SHOWN = 20  # splits in a message
SPLITS_FOLDER = "splits"  # of a data set of FLIP2
# Integers of more digits are not measurements.
MEASUREMENT = re.compile(r"[+-]?(0|[1-9]\d{0,14})", re.ASCII)
# Digits in groups of three: 1 500, 1'500, 1_500.
GROUPED = r"\d{1,3}(?:[ '’_]\d{3})+(?:[.,]\d*)?"
# A number with a sign before it, or an uncertainty or a unit after it: <0.5, −1.5, 19%, 60.11C, 5 uM, 1.5 ± 0.2.
QUANTITY = re.compile(
    rf"[<>~=≤≥±]?\s*[+−–-]?({GROUPED}|\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?"
    r"(\s*(±|\+/?-)\s*\d+[.,]?\d*)?\s*[^\d\s.,;]{0,8}",
    re.ASCII,
)


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
    if is_pipe(task):
        raise InputError(
            f"the task {task!r} is a pipe, but the file of a task is read several times. Save it "
            "first, as in `zcat my.csv.gz > my.csv`, and pass the file.",
            code="task.pipe",
            path=Path(task),
        )
    named = (f"{task}{ending}" for ending in ("", *ENDINGS))
    for path in (*(data_dir / name for name in named), Path(task)):
        check_readable(path)
        if path.is_file():
            only = parse_split_name(path.name)
            if only is None:
                raise InputError(
                    f"{path} must end in one of {', '.join(ENDINGS)}. Save a table as CSV.",
                    code="task.not-a-split",
                    path=path,
                )
            if split not in (None, only):
                _check_inner_split(path, only, split)
            return path.parent, split or only, path
        if path.is_dir():
            path = _find_splits_folder(path)
            names = list_splits(path)
            if split is None and len(names) > 1 and find_set_files(path):
                return path, SET_COLUMN, path
            if not names:
                for inside in sorted(path.iterdir()):
                    check_readable(inside)
                files = sorted(file.name for file in path.iterdir())
                found = f"has no split, only {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"
                raise InputError(
                    f"{path} {found if files else 'is empty'}. Add a .csv table, or a .fasta with SET= in its headers.",
                    code="task.no-split",
                    path=path,
                )
            if split is None and len(names) > 1:
                shown = ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")
                raise InputError(
                    f"{path} has {len(names)} splits ({shown}). Choose one, such as --split {names[0]}.",
                    code="task.which-split",
                    allowed=tuple(names),
                    path=path,
                )
            if len(names) == 1 and split not in (None, names[0]):  # one of several test sets, or columns of folds
                source = find_source(path, tuple(f"{names[0]}{ending}" for ending in ENDINGS))
                if source is not None and source.member is None:
                    _check_inner_split(source.path, names[0], split)
                    return path, split, source.path
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


def _check_inner_split(path: Path, only: str, split: str) -> None:
    """Raise InputError if a file is not that of the split and has no test set or column of folds of that name."""
    inner = list_inner_splits(path)
    if split not in inner:
        fix = f"choose one of {', '.join(inner)}" if inner else "specify the folder"
        raise InputError(
            f"{path} is the file of split {only!r}, not of {split!r}. Omit split, or {fix}.",
            code="task.one-split",
            split=split,
            found=only,
            allowed=tuple(inner),
            path=path,
        )


def _find_splits_folder(path: Path) -> Path:
    """Return the folder of a task's splits: FLIP2 has one named splits for each data set."""
    inner = path / SPLITS_FOLDER
    return inner if inner.is_dir() and not list_splits(path) else path


class Inferred(NamedTuple):
    """A custom task, and notes on what was inferred where another reading is possible."""

    task: Task
    notes: tuple[str, ...]


def infer_task(
    name: str,
    split: str,
    rows: list[TaskRecord],
    sources: dict[str, Source],
    target_type: TargetType | None,
    level: Level | None,
    declared: dict[str, Any],
    columns: tuple[str, ...] = (),
) -> Inferred:
    """Infer a custom task from its records.

    Args:
        name: of the task.
        split: name of the split.
        rows: records of the split.
        sources: files that were read; "sequences" if the bodies of the split's FASTA are labels.
        target_type: "class", "value" or "multilabel". None uses tasks.yaml, or infers it from the targets.
        level: "protein" or "residue". None uses tasks.yaml, or infers it as `_infer_level` describes.
        declared: the task's entry in tasks.yaml.
        columns: names of the columns of several targets; empty for one target.

    Returns:
        The task and notes.

    Raises:
        InputError: a target is missing, the level is ambiguous, or tasks.yaml has an invalid value.
    """
    source = sources["split"]
    kind, level = target_type or declared.get("target"), level or declared.get("level")
    for row in rows:
        if row.target is None and not columns:
            fix = "Add TARGET= to its header, or provide a sequences.fasta in the same folder"
            fix = "Fill in the cell, or remove the row" if source.is_table else fix
            raise InputError(
                f"{source}: record {row.id!r} has no target. {fix}.",
                code="task.no-target",
                record=row.id,
                path=source.path,
            )
    notes: list[str] = []
    for option, found, allowed in (("level", level, get_args(Level)), ("target", kind, get_args(TargetType))):
        if found is not None and found not in allowed:
            raise InputError(
                f"task {name}: {option} must be {' or '.join(allowed)}, found {found!r}",
                code="task.kind",
                name=option,
                task=name,
                found=found,
            )
    if columns or kind == "multilabel":
        return _infer_several(name, split, rows, source, kind, level, declared, columns)
    level = level or _infer_level(rows, "sequences" in sources, source, notes)
    if level == "protein" and kind is None and read_label_sets(rows, source, chosen=False):
        return _infer_several(name, split, rows, source, kind, level, declared, columns)
    texts = [row.target or "" for row in rows]
    if level == "residue":
        split_texts = [split_residue_labels(text, len(row.sequence)) for text, row in zip(texts, rows, strict=True)]
        kind = kind or _infer_residue_target(split_texts, texts, notes)
        found = {label for labels in split_texts for label in labels}
        found -= {label for label in found if len(label) > 1 and label.lower() in UNMEASURED}
    else:
        kind = kind or _infer_protein_target(rows, texts, source, notes)
        found = set(texts)
    known, default = (VALUE_METRICS, "spearman") if kind == "value" else (CLASS_METRICS, "accuracy")
    metric = _choose_metric(name, kind, declared, known, default)
    labels = ()
    if kind == "class":
        numbers = all(map(is_number, found))
        in_order = sorted(found, key=lambda label: (float(label) if numbers else 0.0, label))  # 2 comes before 10
        labels = tuple(str(label) for label in declared.get("classes", in_order))
        if level == "protein":
            _check_appearance(labels)
            notes += _find_alike(labels)
    task = _build_task(name, split, level, kind, metric, declared)
    return Inferred(replace(task, labels=labels), tuple(notes))


def _choose_metric(name: str, kind: str, declared: dict[str, Any], known: Sequence[str], default: str) -> str:
    """Return the metric that tasks.yaml declares, or the default one."""
    metric = declared.get("metric", default)
    if metric not in known:
        raise InputError(
            f"task {name}: metric {metric!r} is not available for a {kind}; {suggest_name(str(metric), known)}",
            code="task.metric",
            task=name,
            found=metric,
            allowed=known,
        )
    return metric


def _build_task(name: str, split: str, level: Level, kind: Target, metric: str, declared: dict[str, Any]) -> Task:
    """Build a custom task without its labels."""
    descriptions = [
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
        unit=declared.get("unit", ""),
        citation=declared.get("source", ""),
        licence=declared.get("licence", "not specified"),
        note="; ".join(note.strip().rstrip(".") for note in descriptions if note),
    )


def _infer_several(
    name: str,
    split: str,
    rows: list[TaskRecord],
    source: Source,
    target_type: TargetType | None,
    level: Level | None,
    declared: dict[str, Any],
    columns: tuple[str, ...],
) -> Inferred:
    """Infer a task with several targets per protein: labels in one text, columns of 0 and 1, or columns of values."""
    if level == "residue":
        raise InputError(
            f"{source}: several targets belong to a protein, but level is residue. Omit level, or name one column.",
            code="task.several-residue-targets",
            path=source.path,
        )
    if columns:
        kind, note = infer_column_type(rows, columns, target_type, source)
    else:
        found = read_label_sets(rows, source, chosen=target_type is not None)
        kind, note = "class", found.note
    known, default = (VALUE_METRICS, "spearman") if kind == "value" else (LABEL_METRICS, "macro_f1")
    metric = _choose_metric(name, kind, declared, known, default)
    task = _build_task(name, split, "protein", kind, metric, declared)
    if kind == "value":
        return Inferred(replace(task, columns=columns, unit=""), (note,))
    labels = columns or tuple(str(label) for label in declared.get("classes", found.labels))
    _check_appearance(labels)
    return Inferred(replace(task, binary_labels=labels), (note, *_find_alike(labels)))


def _infer_level(rows: list[TaskRecord], in_bodies: bool, source: Source, notes: list[str]) -> Level:
    """Infer whether the targets are one per residue or one per protein.

    One per residue is possible if most targets have as many characters, or listed labels, as their sequence has
    residues. That alone is no evidence: `positive` is as long as a peptide of eight residues. If one class or number
    per protein is possible as well, the evidence for residues is that the lengths vary and match, or that there are
    few different labels for the length.

    Args:
        rows: records of the split.
        in_bodies: whether the targets are the bodies of a FASTA, which is the form of residue labels.
        source: the file, for the message.
        notes: a note is added if both are possible.

    Returns:
        The level.

    Raises:
        InputError: both are possible, and nothing speaks for one of them.
    """
    texts = [row.target or "" for row in rows]
    pieces = [split_residue_labels(text, len(row.sequence)) for text, row in zip(texts, rows, strict=True)]
    fitting = [
        labels
        for labels, text, row in zip(pieces, texts, rows, strict=True)
        if len(labels) == len(row.sequence) and (text.isdigit() or not is_number(text))
    ]
    if 2 * len(fitting) <= len(rows):
        return "residue" if in_bodies else "protein"
    found = {label for labels in fitting for label in labels}
    varied = 10 * len(fitting) >= 9 * len(rows) and len({len(labels) for labels in fitting}) > 1
    few = 2 * len(found) <= min(map(len, fitting))
    train = {text for row, text in zip(rows, texts, strict=True) if row.set == "train"}
    others = [text for row, text in zip(rows, texts, strict=True) if row.set != "train"]
    repeated = 2 * sum(text in train for text in others) > len(others)
    measured = 2 * sum(MEASUREMENT.fullmatch(text) is not None for text in texts) > len(texts)
    example = f"such as {texts[0]!r}" if len(texts[0]) < 40 else f"such as {texts[0][:40]!r}..."
    if not repeated and not measured:
        lettered = varied or in_bodies or not all(isinstance(labels, str) for labels in fitting)
        return "residue" if lettered or len(found) <= MAX_LABEL_LETTERS else "protein"
    if varied or few:
        notes.append(
            f"the targets, {example}, are read as one label per residue; set level to protein if they are one target "
            "per protein"
        )
        return "residue"
    if measured or in_bodies:
        raise InputError(
            f"{source}: the targets, {example}, are as long as the sequences and may be one label per residue or one "
            "target per protein. Set level to residue or protein.",
            code="task.level",
            found=texts[0],
            path=source.path,
        )
    notes.append(
        f"the targets, {example}, are as long as the sequences and are read as one class per protein; set level to "
        "residue if they are one label per residue"
    )
    return "protein"


def _infer_residue_target(labels: list[Sequence[str]], texts: list[str], notes: list[str]) -> Target:
    """Infer the target of a residue task; listed numbers are values, except few different integers.

    Args:
        labels: of each record; a text has one character per residue.
        texts: the targets before they were split. Semicolons separate values.
        notes: a note is added if the numbers may be values or classes.

    Returns:
        "class" or "value".
    """
    listed = [items for items in labels if not isinstance(items, str)]
    if 2 * len(listed) <= len(labels):
        return "class"
    counts = Counter(item for items in listed for item in items if item.lower() not in UNMEASURED)
    numeric = sum(count for item, count in counts.items() if is_number(item) or has_comma(item))
    if 2 * numeric <= counts.total():
        return "class"
    separated = 2 * sum(";" in text for text in texts) > len(texts)
    return _choose_for_numbers(set(counts), not separated, notes)


def _choose_for_numbers(found: set[str], may_be_classes: bool, notes: list[str]) -> Target:
    """Choose between classes and values for numbers, and add a note if the other is possible."""
    if may_be_classes and len(found) <= MAX_INTEGER_CLASSES and all(map(is_integer, found)):
        notes.append(f"{len(found)} distinct integer targets are treated as classes; set target_type to value if not")
        return "class"
    if all(is_number(text) and float(text).is_integer() for text in found):
        notes.append(
            f"{len(found)} distinct integer targets are treated as values; set target_type to class if they are classes"
        )
    return "value"


def _infer_protein_target(rows: list[TaskRecord], texts: list[str], source: Source, notes: list[str]) -> Target:
    """Infer the target from the majority: among numbers, a text is an error and not a class.

    Returns:
        "class" or "value".

    Raises:
        InputError: a target is nan, has several labels, or is not a number although most targets are.
    """
    whole = set(texts)
    for row, text in zip(rows, texts, strict=True):
        if text.lower() == "nan":  # an empty cell of a table, not a class
            raise InputError(
                f"{source}: record {row.id!r} has the target {text!r}. Correct it, or remove the record.",
                code="task.target",
                record=row.id,
                found=text,
                path=source.path,
            )
        if _has_several_labels(text, whole):
            raise InputError(
                f"{source}: record {row.id!r} has the target {text!r}, which is neither one label nor one label for "
                f"each of its {len(row.sequence)} residues. Set target_type to multilabel if it lists several labels, "
                "or to class if each text is a class of its own.",
                code="task.several-labels",
                record=row.id,
                found=text,
                path=source.path,
            )
    numeric = [is_number(text) or has_comma(text) for text in texts]
    if 2 * sum(numeric) <= len(rows):
        _check_units(rows, texts, source)
        return "class"
    for row, text, fits in zip(rows, texts, numeric, strict=True):
        if not fits:
            found = f"target {text!r} of record {row.id!r} is not a number, but {sum(numeric)} others are"
            raise InputError(
                f"{source}: {found}. Correct it, remove the record, or set target_type to class.",
                code="task.target",
                record=row.id,
                found=text,
                path=source.path,
            )
    return _choose_for_numbers(whole, True, notes)


def _has_several_labels(text: str, whole: set[str]) -> bool:
    """Whether a target of a protein lists labels: by its separators, or because the other records have its parts."""
    if is_number(text) or has_comma(text):
        return False
    if any(letter in text for letter in ";|") or (text[:1] == "[" and text[-1:] == "]"):
        return True
    parts = [part.strip() for part in re.split(r"[,/+&]|\s", text) if part.strip()]
    return len(parts) > 1 and whole.issuperset(parts)


def _check_units(rows: list[TaskRecord], texts: list[str], source: Source) -> None:
    """Raise InputError if most targets are numbers with a unit or a sign, such as 19% or <0.5, and not classes."""
    plain = [unicodedata.normalize("NFKC", text) for text in texts]  # blanks and digits of other widths
    quantities = [text for text in plain if QUANTITY.fullmatch(text)]
    measured = len(set(quantities)) > MAX_INTEGER_CLASSES or any(
        set(text) & set("%°<>~±−–.,") or re.search(GROUPED, text) for text in quantities
    )
    if 2 * len(quantities) > len(texts) and measured:
        row = next(
            row
            for row, text, form in zip(rows, texts, plain, strict=True)
            if QUANTITY.fullmatch(form) and not is_number(text)
        )
        raise InputError(
            f"{source}: target {row.target!r} of record {row.id!r} is a number with a unit or a sign. Write digits, a "
            "decimal point and '-' only, or set target_type to class.",
            code="task.unit",
            record=row.id,
            found=row.target,
            path=source.path,
        )


def _find_alike(labels: tuple[str, ...]) -> list[str]:
    """Note the first two labels that differ only in spelling, such as Low and low, or 1 and 1.0."""
    seen: dict[str, str] = {}
    for label in labels:
        key = str(float(label)) if is_number(label) else re.sub(r"[\s_-]+", " ", label).casefold()
        if seen.setdefault(key, label) != label:
            return [f"the labels {seen[key]!r} and {label!r} are separate classes; correct them if they are the same"]
    return []


def _check_appearance(labels: tuple[str, ...]) -> None:
    """Raise InputError if two labels look the same and differ in invisible characters or in their Unicode form."""
    seen: dict[str, str] = {}
    for label in labels:
        visible = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
        other = seen.setdefault(" ".join(visible.split()), label)
        if other != label:
            raise InputError(
                f"the labels {other!a} and {label!a} look the same and would be two classes. Write them alike.",
                code="task.alike",
                labels=(other, label),
            )
