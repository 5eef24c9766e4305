"""Standardise values in float64, whatever their size and offset: molar constants of 1e-9, counts of 1e12."""

from typing import NamedTuple, Self

import numpy as np

from esm2kit.core.errors import InputError

FLOAT32_ROUNDING, FLOAT32_LARGEST = 2.0**-24, 2.0**60  # losses square the values, and the largest power is 2**127
LARGEST_ROUNDING = 1e-3  # rounding errors of values, relative to their standard deviation


def find_exponent(values: np.ndarray) -> int:
    """Return the smallest e for which no absolute value exceeds 2**e; 0 if all values are 0.

    `np.ldexp(values, -e)` is exact, so that sums and squares of the result neither overflow nor underflow.
    """
    largest = float(np.abs(values).max(initial=0.0))
    return int(np.frexp(largest)[1]) if np.isfinite(largest) else 0


class TargetScale(NamedTuple):
    """Centre and spread of the training values.

    Args:
        centre: mean of the training values; 0 leaves the offset as it is.
        spread: standard deviation of the training values; 1 leaves the size as it is. 0 if they are all equal: every
            prediction is then this value.
    """

    centre: float = 0.0
    spread: float = 1.0

    @classmethod
    def from_values(cls, values_N: np.ndarray) -> Self:
        """Compute the mean and standard deviation of values, without overflow."""
        values_N = np.asarray(values_N, dtype=np.float64)
        if (values_N == values_N[0]).all():
            return cls(float(values_N[0]), 0.0)
        exponent = find_exponent(values_N)
        scaled_N = np.ldexp(values_N, -exponent)
        return cls(float(np.ldexp(scaled_N.mean(), exponent)), float(np.ldexp(scaled_N.std(), exponent)))

    def standardise(self, values_N: np.ndarray) -> np.ndarray:
        """Convert values to (value - centre) / spread in float64; 0 if the spread is 0."""
        values_N = np.asarray(values_N, dtype=np.float64)
        return (values_N - self.centre) / self.spread if self.spread else np.zeros_like(values_N)

    def restore(self, standardised_N: np.ndarray) -> np.ndarray:
        """Convert standardised values to the unit of the target in float64, the inverse of `standardise`."""
        return np.asarray(standardised_N, dtype=np.float64) * self.spread + self.centre


UNSCALED = TargetScale()


def choose_scale(train_N: np.ndarray, scale_targets: bool) -> TargetScale:
    """Return the scale of the training values, or the identity for a protocol that trains on raw values.

    Args:
        train_N: (N,) training values.
        scale_targets: whether to standardise the values.

    Returns:
        The scale.

    Raises:
        InputError: the values are not scaled, and float32, in which models are trained, cannot represent them.
    """
    scale = TargetScale.from_values(train_N)
    if scale_targets:
        return scale
    check_float32(scale, "Choose preset esm2kit, which standardises them, or transform all targets")
    return TargetScale()


def check_float32(scale: TargetScale, remedy: str) -> None:
    """Check that float32 can represent values of a scale.

    Args:
        scale: mean and standard deviation of the values.
        remedy: what to do otherwise, for the message.

    Raises:
        InputError: the values or their squares overflow or underflow, or their differences are lost in rounding.
    """
    size = max(abs(scale.centre), scale.spread)
    lost = abs(scale.centre) * FLOAT32_ROUNDING > LARGEST_ROUNDING * scale.spread
    if scale.spread and (lost or not 1 / FLOAT32_LARGEST < size < FLOAT32_LARGEST):
        raise InputError(
            f"values with mean {scale.centre:.4g} and standard deviation {scale.spread:.4g} cannot be represented in "
            f"float32. {remedy}.",
            code="task.float32",
            mean=scale.centre,
            deviation=scale.spread,
        )
