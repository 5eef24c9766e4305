"""The part of report.json that describes how the layer and the pooling were chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class SweepPoint:
    """One layer with one pooling, scored on validation.

    Args:
        layer: Number of the layer; 0 is the token embedding.
        pooling: mean, max, bos, mean+max or attention; "none" if the probe reads one vector per residue.
        probe: Probe that was fitted.
        value: Validation score, the mean over seeds; None if it is undefined.
        low: Lower end of the 95% bootstrap interval over validation proteins; None without one.
        high: Upper end of the interval.
        is_distinct: Whether the chosen one is better in the 95% interval of the paired difference.
    """

    layer: int
    pooling: str
    probe: str
    value: float | None
    low: float | None
    high: float | None
    is_distinct: bool


@dataclass(frozen=True)
class LayerSweep:
    """The choice of the layer and the pooling on validation.

    Args:
        metric: Metric of the choice.
        proteins: Number of validation proteins.
        points: All layers and poolings, in the order in which they were given.
        chosen: Place of the chosen one in `points`.
        sentence: The result in words.
    """

    metric: str
    proteins: int
    points: Sequence[SweepPoint]
    chosen: int
    sentence: str

    @property
    def best(self) -> SweepPoint:
        """The chosen point."""
        return self.points[self.chosen]

    @classmethod
    def parse(cls, found: Mapping[str, Any] | None) -> Self | None:
        """Build the summary from a report.json; None for a report without a sweep."""
        return None if found is None else cls(**found | {"points": [SweepPoint(**point) for point in found["points"]]})


def describe_place(layer: int, pooling: str) -> str:
    """Describe a layer and a pooling, such as `layer 3, max`."""
    return f"layer {layer}" if pooling == "none" else f"layer {layer}, {pooling}"
