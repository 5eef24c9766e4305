"""Standardise values in float64, whatever their size and offset: molar constants of 1e-9, counts of 1e12."""

from typing import Any, NamedTuple, Self

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

    For several targets both are tuples with one entry per target.
    """

    centre: float | tuple[float, ...] = 0.0
    spread: float | tuple[float, ...] = 1.0

    @classmethod
    def from_values(cls, values_N: np.ndarray) -> Self:
        """Compute the mean and standard deviation of values (N,), or of the measured values of columns (N, C)."""
        values_N = np.asarray(values_N, dtype=np.float64)
        if values_N.ndim == 2:
            columns = [cls.from_values(column_N[~np.isnan(column_N)]) for column_N in values_N.T]
            return cls(tuple(scale.centre for scale in columns), tuple(scale.spread for scale in columns))
        if (values_N == values_N[0]).all():
            return cls(float(values_N[0]), 0.0)
        exponent = find_exponent(values_N)
        scaled_N = np.ldexp(values_N, -exponent)
        return cls(float(np.ldexp(scaled_N.mean(), exponent)), float(np.ldexp(scaled_N.std(), exponent)))

    @classmethod
    def from_stored(cls, centre: Any, spread: Any) -> Self:
        """Build a scale from the numbers, or lists of numbers, in the metadata of a model."""
        return cls(*(tuple(ends) if isinstance(ends, list) else ends for ends in (centre, spread)))

    @property
    def columns(self) -> "list[TargetScale]":
        """The scales of the single targets."""
        if isinstance(self.centre, tuple):
            return [TargetScale(*ends) for ends in zip(self.centre, self.spread, strict=True)]
        return [self]

    def standardise(self, values_N: np.ndarray) -> np.ndarray:
        """Convert values to (value - centre) / spread in float64; 0 if the spread is 0."""
        values_N = np.asarray(values_N, dtype=np.float64)
        spread, zeros_N = np.asarray(self.spread), np.where(np.isnan(values_N), np.nan, 0.0)
        return np.where(spread > 0, (values_N - self.centre) / np.where(spread > 0, spread, 1.0), zeros_N)

    def restore(self, standardised_N: np.ndarray) -> np.ndarray:
        """Convert standardised values to the unit of the target in float64, the inverse of `standardise`."""
        return np.asarray(standardised_N, dtype=np.float64) * np.asarray(self.spread) + np.asarray(self.centre)


UNSCALED = TargetScale()


def choose_scale(train_N: np.ndarray, scale_targets: bool) -> TargetScale:
    """Return the scale of the training values, or the identity for a protocol that trains on raw values.

    Args:
        train_N: (N,) training values, or (N, C) with nan where a value is missing.
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
    for centre, spread in scale.columns:
        size = max(abs(centre), spread)
        lost = abs(centre) * FLOAT32_ROUNDING > LARGEST_ROUNDING * spread
        if spread and (lost or not 1 / FLOAT32_LARGEST < size < FLOAT32_LARGEST):
            raise InputError(
                f"values with mean {centre:.4g} and standard deviation {spread:.4g} cannot be represented in float32. "
                f"{remedy}.",
                code="task.float32",
                mean=centre,
                deviation=spread,
            )
