"""The learning rate over a run: warm-up, decay, and what is left at its end."""

import math
from typing import Literal

Decay = Literal["linear", "cosine", "constant"]


def compute_lr(
    peak: float, update: int, warmup: int, start: float, end: float, decay: Decay = "linear", floor: float = 0.0
) -> float:
    """Learning rate of an update: linear warm-up, the peak, decay, flat.

    Args:
        peak: highest learning rate; 1 gives shares of it.
        update: counted from 1.
        warmup: updates of warm-up; the last one is at the peak.
        start: the last update at the peak.
        end: the update at which the decay arrives at `floor`; flat from there.
        decay: the shape between the two; constant stays at the peak.
        floor: share of the peak at the end.
    """
    if update <= warmup:
        return peak * update / warmup
    if decay == "constant":
        return peak
    done = min(1.0, (update - start) / max(1.0, end - start))
    if decay == "linear":
        return peak * (1 - (1 - floor) * done)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
