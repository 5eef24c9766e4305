"""Parameters of the stages that read a labelled task. This module does not import torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from esm2kit.core.config import FREE, inherit_help
from esm2kit.core.errors import InputError, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.tasks.task import Level, SplitBy, Target, TargetType

# Between the names of columns; a comma in brackets belongs to a unit.
COMMA = re.compile(r",(?![^()\[\]]*[)\]])")
FASTA_SUFFIXES = (".fasta", ".fa", ".faa", ".fas", ".gz", ".zst")


@dataclass(frozen=True)
class TaskConfig:
    """Labelled proteins; each stage that reads a task adds its own fields.

    A stage's docstring inherits the entries below for all fields that it does not document itself.

    Args:
        task: FLIP task, or the name or path of your own task: a folder or file in one of FLIP's formats, or as
            ProteinGym, biotrainer, TDC and others publish them.
        split: Split of the task; of a file with several, its test set or its column of folds. Default: FLIP's default
            split, or the only one.
        data_dir: Folder of the task data, arranged as <data_dir>/<task>/<file>.
        download: Download a FLIP task that is missing from data_dir.
        fasta: Sequences of the proteins in labels. Default: a column of labels holds them.
        labels: Table of your measurements instead of a task: CSV, TSV or Excel (file.xlsx:Sheet chooses a sheet).
        id: Column of labels with the names of the proteins. Default: the column that names most records of fasta.
        target: Column of the targets, or several separated by commas. Default: the only column of numbers of labels;
            the column target of a task.
        set: Column of labels with train, validation or test, or with the numbers of folds. Default: a column with such
            a name, or sets as split_by describes.
        target_type: Type of the targets: class, value or multilabel (several classes per protein, as nucleus;cytoplasm,
            as one row per class, or as columns of 0 and 1). Default: inferred from the labels. Set it for your own task
            if several are possible.
        level: What one target belongs to: a protein or a residue. Default: inferred from the targets and the lengths
            of the sequences. Set it for your own task if both are possible.
        split_by: How proteins without a set are divided. identity keeps similar sequences in one set, random only
            equal ones. auto is identity, or random where identity leaves too few proteins in a set.
        identity: Share of equal residues from which two sequences are similar.
        split_seed: Seed of this division.
    """

    task: str = "secondary_structure"
    split: str | None = None
    data_dir: Path = field(default=Path("flip"), metadata=FREE)
    download: bool = field(default=True, metadata=FREE)
    fasta: Path | None = field(default=None, metadata=FREE)
    labels: Path | None = field(default=None, metadata=FREE)
    id: str | None = None
    target: str | list[str] | None = None
    set: str | None = None
    target_type: TargetType | None = None
    level: Level | None = None
    split_by: SplitBy = "auto"
    identity: float = 0.5
    split_seed: int = 0

    option_groups = OptionGroups(
        usual="task fasta labels target",
        data="id set target_type level split split_by identity split_seed data_dir download",
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherit_help(cls, TaskConfig)


def check_task(config: TaskConfig) -> None:
    """Check the parameters of a task, and read `target` class or value as the type of the targets.

    Args:
        config: A new instance, whose fields are replaced.

    Raises:
        InputError: a parameter is not valid.
    """
    check_range(config, "identity", above=0, at_most=1)
    _check_labels(config)
    names = COMMA.split(config.target) if isinstance(config.target, str) else config.target
    names = names and [name.strip() for name in names if name.strip()]
    if names == []:
        raise InputError("target is an empty list. Name a column, or omit target.", code="option.target")
    if names and len(names) == 1 and names[0] in get_args(Target) and config.target_type is config.labels is None:
        object.__setattr__(config, "target_type", names[0])
        names = None
    object.__setattr__(config, "target", names)


def _check_labels(config: TaskConfig) -> None:
    """Check that parameters of a table of labels and of a task are not mixed; take a FASTA that is given as the task.

    Raises:
        InputError: they are mixed.
    """
    named = config.task != TaskConfig.task
    if config.labels is None:
        given = next((name for name in ("fasta", "id", "set") if getattr(config, name) is not None), None)
        if given is not None:
            raise InputError(
                f"{given} {str(getattr(config, given))!r} is given without labels. Pass the table of your measurements "
                "as labels; a task has its own sequences.",
                code="option.labels",
                option=given,
            )
        return
    if named and config.fasta is None and Path(config.task).suffix.lower() in FASTA_SUFFIXES:
        object.__setattr__(config, "fasta", Path(config.task))
        object.__setattr__(config, "task", TaskConfig.task)
        named = False
    if named or config.split is not None:
        found = f"task {config.task!r}" if named else f"split {config.split!r}"
        fix = "Omit one of them" if named else "Name the column of the sets as set"
        raise InputError(
            f"labels '{config.labels}' and {found} are given. {fix}.",
            code="option.task-and-labels",
            found=config.task if named else config.split,
        )
