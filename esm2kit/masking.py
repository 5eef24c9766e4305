"""Randomness as arithmetic: keys of (seed, epoch, index), and the BERT mask drawn from one.

Nothing here holds a state, so a sample does not depend on the worker, the rank or what was drawn before it. The hash is
splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), which passes BigCrush on a plain counter.
"""

from typing import TypeVar

import numpy as np

from esm2kit.alphabet import BOS_IDX, EOS_IDX, FIRST_STANDARD_IDX, MASK_IDX, NUM_STANDARD, PAD_IDX

Integers = TypeVar("Integers", int, np.ndarray)

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: its multiples are spread evenly over 64 bits
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: Integers) -> Integers:
    """splitmix64's finaliser, a bijection of 64-bit words; an int, or a uint64 array element by element."""
    if isinstance(value, np.ndarray):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
        return value ^ (value >> np.uint64(31))
    value &= WORD
    value = ((value ^ (value >> 30)) * _MIX_1) & WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & WORD
    return value ^ (value >> 31)


def stream_key(seed: int, epoch: int, index: int, stream: int) -> int:
    """A 64-bit key of four integers; changing any one of them gives an unrelated key.

    Args:
        seed: the run's seed.
        epoch: pass over the clusters, from 0.
        index: which sample of the epoch (a cluster).
        stream: which use of it, so that two uses of one sample share no random number.
    Returns: a word in [0, 2^64).
    """
    key = GOLDEN
    for part in (seed, epoch, index, stream):
        key = mix(key + int(part))
    return key


def below(key: int, bound: int) -> int:
    """A key's integer in [0, bound), each equally likely to within bound / 2^64 (Lemire's multiplication)."""
    return (key * bound) >> 64


def uniforms(key: int, n: int) -> np.ndarray:
    """The first n uniform numbers of a key's stream.

    Args:
        key: a `stream_key`.
        n: how many.
    Returns: (n,) float64 in [0, 1), multiples of 2^-53.
    """
    counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
    return (mix(counter) >> np.uint64(11)) * 2.0**-53


def mask_tokens(
    tokens_T: np.ndarray,
    key: int,
    mask_prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption of one sequence, a pure function of its tokens and a key.

    Each residue is selected on its own with probability `mask_prob`; a selected one becomes `<mask>`, a random standard
    residue (its own letter among them), or stays. BOS, EOS and padding are never selected.

    Args:
        tokens_T: (T,) uint8 token ids, BOS and EOS included.
        key: a `stream_key`, such as `Draw.mask_key`.
        mask_prob: share of residues to be predicted.
        mask_share: of those, the share that becomes `<mask>`.
        random_share: of those, the share that becomes a random one of the 20 standard residues.
    Returns: the corrupted (T,) uint8 tokens, and (T,) bool: which ones the loss is taken on.
    Source: Lin et al. 2023 (ESM-2), supplement A.2.2: 15%, of these 80 / 10 / 10.
    """
    uniform_T = uniforms(key, tokens_T.size)
    special_T = (tokens_T == BOS_IDX) | (tokens_T == EOS_IDX) | (tokens_T == PAD_IDX)
    selected_T = (uniform_T < mask_prob) & ~special_T
    positions = np.flatnonzero(selected_T)
    # given that it lies below mask_prob, the number is uniform there: it also decides what happens, and which residue
    share = uniform_T[positions] / mask_prob
    inputs_T = tokens_T.copy()
    inputs_T[positions[share < mask_share]] = MASK_IDX
    swapped = (share >= mask_share) & (share < mask_share + random_share)
    if swapped.any():
        residue = ((share[swapped] - mask_share) / random_share * NUM_STANDARD).astype(np.uint8)
        inputs_T[positions[swapped]] = FIRST_STANDARD_IDX + np.minimum(residue, NUM_STANDARD - 1)
    return inputs_T, selected_T
