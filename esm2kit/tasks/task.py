"""What a labelled task is: its level, target, metric, labels and splits."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["residue", "protein"]
Target = Literal["class", "value"]

LICENCE = "AFL-3.0 (FLIP's splits)"
# FLIP's semaphore: green compares models; orange overestimates or repeats another split; red is obsolete.
TrafficLight = Literal["green", "orange", "red"]


@dataclass(frozen=True)
class Split:
    """One way to divide a task's proteins.

    Args:
        train: proteins to fit on, validation ones not counted; None where this project has not counted them.
        validation: proteins to select and stop on.
        test: proteins that are scored once.
        light: FLIP's traffic light for the split.
        note: what a reader of a score must know.
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
        name: FLIP's name, or the user's folder.
        level: one target a residue, or one a protein.
        target: a class or a value.
        metric: the headline metric; every other one is reported too.
        labels: the classes in order, empty for a value.
        splits: name -> Split.
        default_split: the one the esm2nv readme uses.
        files: beside `<split>.fasta`, what a residue task needs.
        folder: FLIP's folder on the server, where it is not the task's name.
        unit: of a value.
        binary_labels: names of the bits of an integer class, lowest first; each is scored as a label of its own.
        aliases: other spellings of a label -> label.
        variants: every protein is a variant of one wild type, so that nearest neighbours make sense.
        citation: of the data.
        licence: of the split files.
        note: what a reader of a score must know.
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
    aliases: tuple[tuple[str, str], ...] = ()
    variants: bool = False
    citation: str = ""
    licence: str = LICENCE
    note: str = ""

    @property
    def num_outputs(self) -> int:
        """Numbers a probe puts out per protein or residue."""
        if self.target == "value":
            return 1
        return len(self.binary_labels) or len(self.labels)

    def label_index(self) -> dict[str, int]:
        """Every accepted spelling of a label -> its class."""
        index = {label: place for place, label in enumerate(self.labels)}
        return index | {alias: index[label] for alias, label in self.aliases}
