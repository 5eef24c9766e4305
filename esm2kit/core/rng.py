"""Counter-based random numbers: keys, uniforms and permutations as pure functions of integers, in O(1) memory."""

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, rounded to odd: its multiples are spread evenly over 64 bits
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PERMUTATION_STREAM = 2
_ROUNDS = 8


def mix(value: Integers) -> Integers:
    """Apply splitmix64's finalizer, a bijection of 64-bit words.

    Args:
        value: An int in [0, 2^64), or a uint64 array.

    Returns:
        The mixed word, or an array of the same shape.
    """
    if isinstance(value, np.ndarray):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
        return value ^ (value >> np.uint64(31))
    value &= WORD
    value = ((value ^ (value >> 30)) * _MIX_1) & WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & WORD
    return value ^ (value >> 31)


def stream_key(seed: int, epoch: int, index: int, stream: int) -> int:
    """Compute a 64-bit key from four integers; changing any of them gives an unrelated key.

    Args:
        seed: The seed of the run.
        epoch: Pass over the clusters, from 0.
        index: The sample within the epoch (a cluster).
        stream: The purpose of the random numbers, so that two uses of one sample share none.

    Returns:
        A word in [0, 2^64).
    """
    key = GOLDEN
    for part in (seed, epoch, index, stream):
        key = mix(key + int(part))
    return key


def random_below(key: int, bound: int) -> int:
    """Compute a random integer in [0, bound) from a key, by Lemire's multiplication.

    Args:
        key: A `stream_key`.
        bound: Upper end, not included.

    Returns:
        An integer; all are equally likely to within bound / 2^64.
    """
    return (key * bound) >> 64


def random_uniforms(key: int, n: int) -> np.ndarray:
    """Compute the first n uniform random numbers of a key's stream.

    Args:
        key: A `stream_key`.
        n: How many numbers.

    Returns:
        (n,) float64 in [0, 1), multiples of 2^-53.
    """
    counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
    return (mix(counter) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, epoch: int, positions: int | np.ndarray, n: int) -> int | np.ndarray:
    """Look up positions of a seeded random permutation of range(n), in O(1) memory.

    Args:
        seed: The seed of the run.
        epoch: Each epoch has its own permutation.
        positions: An int or an integer array of values in [0, n).
        n: Size of the permutation.

    Returns:
        The elements at these positions: an int for an int, an int64 array of the same shape for an array.

    Raises:
        IndexError: A position is outside range(n).

    Source:
        A Feistel network (Luby and Rackoff, 1988) over the smallest power of two that is at least n, with cycle walking
        (Black and Rogaway, 2002): a value outside range(n) passes through the network again, on average fewer than two
        passes per value.
    """
    scalar = not isinstance(positions, np.ndarray)
    lowest, highest = (positions, positions) if scalar else (positions.min(initial=0), positions.max(initial=0))
    if lowest < 0 or (highest >= n and (scalar or positions.size)):
        raise IndexError(f"position {highest if lowest >= 0 else lowest} outside range({n})")
    bits = max(n - 1, 1).bit_length()
    key = stream_key(seed, epoch, n, _PERMUTATION_STREAM)
    keys = [(key + step * GOLDEN) & WORD for step in range(_ROUNDS)]
    if scalar:
        value = _feistel(positions, keys, bits)
        while value >= n:
            value = _feistel(value, keys, bits)
        return value
    values = _feistel(positions.astype(np.uint64).ravel(), keys, bits)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, bits)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(positions.shape)


def _feistel(value: Integers, keys: list[int], bits: int) -> Integers:
    """Pass a value through the Feistel network, a bijection of [0, 2^bits); `bits` may be odd."""
    word = np.uint64 if isinstance(value, np.ndarray) else int
    low_bits, high_bits = bits // 2, bits - bits // 2
    high, low = value >> word(low_bits), value & word((1 << low_bits) - 1)
    for key in keys:
        # the halves swap places, and with them their widths
        high, low = low, high ^ (mix(low ^ word(key)) & word((1 << high_bits) - 1))
        low_bits, high_bits = high_bits, low_bits
    return (high << word(low_bits)) | low
