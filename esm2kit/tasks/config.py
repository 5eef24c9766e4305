"""Parameters of the stages that read a labelled task. This module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from esm2kit.core.config import FREE, inherit_help
from esm2kit.core.errors import InputError, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.tasks.task import Level, SplitBy, Target


@dataclass(frozen=True)
class TaskConfig:
    """Labelled proteins; each stage that reads a task adds its own fields.

    A stage's docstring inherits the entries below for all fields that it does not document itself.

    Args:
        task: FLIP task, or the name or path of your own task (a folder or file in one of FLIP's formats).
        split: Split of the task. Default: FLIP's default split.
        data_dir: Folder of the task data, arranged as <data_dir>/<task>/<file>.
        download: Download a FLIP task that is missing from data_dir.
        target: Column of the targets in your own task's table. Default: the column target.
        target_type: Type of the targets: class or value. Default: inferred from the labels. Set it for your own task
            if both are possible.
        level: What one target belongs to: a protein or a residue. Default: inferred from the targets and the lengths
            of the sequences. Set it for your own task if both are possible.
        split_by: How proteins without a set are divided. identity keeps similar sequences in one set, random only
            equal ones. auto is identity, or random where identity leaves too few proteins in a set.
        identity: Share of equal residues from which two sequences are similar.
    """

    task: str = "secondary_structure"
    split: str | None = None
    data_dir: Path = field(default=Path("flip"), metadata=FREE)
    download: bool = field(default=True, metadata=FREE)
    target: str | list[str] | None = None
    target_type: Target | None = None
    level: Level | None = None
    split_by: SplitBy = "auto"
    identity: float = 0.5

    option_groups = OptionGroups(
        usual="task", data="split target target_type level split_by identity data_dir download"
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
    names = [config.target] if isinstance(config.target, str) else config.target
    if names == []:
        raise InputError("target is an empty list. Name a column, or omit target.", code="option.target")
    if names and len(names) == 1 and names[0] in get_args(Target) and config.target_type is None:
        object.__setattr__(config, "target_type", names[0])
        names = None
    object.__setattr__(config, "target", names)
