"""Definition of a labelled task: its level, target, metric, labels and splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["residue", "protein"]
Target = Literal["class", "value"]
TargetType = Literal["class", "value", "multilabel"]  # as the user sets it
PairFeatures = Literal["symmetric", "concat"]  # how the vectors of two proteins are combined
CLUSTER = "cluster"  # the value of group_by for groups of similar sequences
SplitBy = Literal["auto", "identity", "random"]

LICENCE = "AFL-3.0 (FLIP's splits)"
# FLIP's rating: green is suitable for comparing models; orange overestimates or duplicates a split; red is obsolete.
TrafficLight = Literal["green", "orange", "red"]


@dataclass(frozen=True)
class Split:
    """One way to divide a task's proteins.

    Args:
        train: number of train proteins without the validation proteins. None if it was not counted.
        validation: number of proteins for model selection and early stopping.
        test: number of test proteins.
        light: FLIP's traffic light for the split.
        note: what a reader needs to know to interpret a score.
    """

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    light: TrafficLight = "green"
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One benchmark task.

    Args:
        name: FLIP's name, or the name of the custom task's folder.
        level: one target per residue, or one per protein.
        target: class or value.
        metric: main metric; the others are reported as well.
        splits: name -> Split.
        default_split: the split that the esm2nv readme uses.
        labels: classes in order; empty for values.
        files: files that a residue task needs in addition to `<split>.fasta`.
        folder: name of the folder on FLIP's server if it is not the task's name.
        unit: of the values.
        binary_labels: names of labels that are present or absent, each of which is scored. Together with `labels` they
            are the bits of an integer class, lowest first; without `labels` a protein has any number of them.
        columns: names of the columns of a task with several values per protein; empty for one value.
        aliases: pairs of another spelling and its label.
        variants: whether all proteins are variants of one wild type, so that a nearest-neighbour baseline makes sense.
        citation: of the data.
        licence: of the split files.
        note: what a reader needs to know to interpret a score.
    """

    name: str
    level: Level
    target: Target
    metric: str
    splits: dict[str, Split]
    default_split: str
    labels: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folder: str = ""
    unit: str = ""
    binary_labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    variants: bool = False
    citation: str = ""
    licence: str = LICENCE
    note: str = ""

    @property
    def num_outputs(self) -> int:
        """Number of outputs of a probe per protein or residue."""
        if self.target == "value":
            return len(self.columns) or 1
        return len(self.binary_labels) or len(self.labels)

    @property
    def is_multilabel(self) -> bool:
        """Whether a protein has any number of labels: targets are (P, L) 0 or 1, predictions are probabilities."""
        return bool(self.binary_labels) and not self.labels

    @property
    def has_columns(self) -> bool:
        """Whether a protein has several targets, so that arrays of targets and predictions have a last axis of them."""
        return self.is_multilabel or bool(self.columns)

    def label_index(self) -> dict[str, int]:
        """Map each accepted spelling of a label to its class."""
        index = {label: place for place, label in enumerate(self.labels)}
        return index | {alias: index[label] for alias, label in self.aliases}


def describe_task(task: Task) -> dict[str, Any]:
    """Return the fields of a task that predictions require, as metadata of a trained model."""
    names = ("name", "level", "target", "metric", "labels", "binary_labels", "columns", "unit")
    return {name: getattr(task, name) for name in names}


def read_task(described: Mapping[str, Any]) -> Task:
    """Build a task without splits from what `describe_task` returned."""
    lists = {name: tuple(described.get(name, ())) for name in ("labels", "binary_labels", "columns")}
    return Task(**dict(described) | lists, splits={}, default_split="")
