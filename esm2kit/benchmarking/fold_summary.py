"""The part of report.json that describes a cross-validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Fold:
    """One fold of one repeat.

    Args:
        repeat: Number of the repeat, from 1.
        name: Name of the fold: its number from 1, or the entry of its column.
        test: Number of its proteins, which are predicted by a probe that was trained without them.
        train: Number of proteins of the other folds on which that probe was trained.
        validation: Number of proteins of the other folds on which its settings were chosen.
        selected: What was chosen there, such as the layer; empty if it is part of the rows.
    """

    repeat: int
    name: str
    test: int
    train: int
    validation: int
    selected: str = ""


@dataclass(frozen=True)
class FoldSummary:
    """A cross-validation.

    Args:
        num_folds: Number of folds.
        repeats: How often the proteins were divided.
        method: How the folds and the groups were chosen.
        num_groups: Number of groups; no group is in two folds.
        folds: All folds, repeat by repeat.
        widening: Factor by which the bootstrap intervals over groups are widened, because the training sets of the
            folds overlap.
        table_sha256: SHA-256 of predictions.csv.
        expansion: Factor by which they are also expanded for few groups. 1 in reports of earlier versions.
    """

    num_folds: int
    repeats: int
    method: str
    num_groups: int
    folds: Sequence[Fold]
    widening: float
    table_sha256: str = ""
    expansion: float = 1.0

    @classmethod
    def parse(cls, found: Mapping[str, Any] | None) -> Self | None:
        """Build the summary from a report.json; None for a report without folds."""
        return None if found is None else cls(**found | {"folds": [Fold(**fold) for fold in found["folds"]]})
