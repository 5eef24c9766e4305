"""The learning-rate schedule: linear warm-up and decay."""

import math
from typing import Literal

Decay = Literal["linear", "cosine", "constant"]


def compute_lr(
    peak: float, update: int, warmup: int, start: float, end: float, decay: Decay = "linear", final_share: float = 0.0
) -> float:
    """Compute the learning rate of an update: linear warm-up to the peak, decay, then constant.

    Args:
        peak: Highest learning rate; with 1 the result is a share of the peak.
        update: Number of the update, counted from 1.
        warmup: Updates of warm-up; the last of them has the peak rate.
        start: The last update with the peak rate.
        end: The update at which the decay ends; the rate is constant from there.
        decay: Shape of the decay between `start` and `end`; `constant` stays at the peak.
        final_share: Rate at the end, as a share of the peak.

    Returns:
        The learning rate.
    """
    if update <= warmup:
        return peak * update / warmup
    if decay == "constant":
        return peak
    done = min(1.0, (update - start) / max(1.0, end - start))
    if decay == "linear":
        return peak * (1 - (1 - final_share) * done)
    return peak * (final_share + (1 - final_share) * (1 + math.cos(math.pi * done)) / 2)
