"""BERT masking as a pure function of a sequence and a random key.

There is no random state, so a mask does not depend on the worker, the rank or earlier samples. The keys come from
splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), which passes BigCrush on a plain counter.
"""

import numpy as np

from esm2kit.core.rng import random_uniforms
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, FIRST_STANDARD_IDX, MASK_IDX, NUM_STANDARD, PAD_IDX


def mask_tokens(
    tokens_T: np.ndarray,
    key: int,
    mask_prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask one sequence as BERT does, as a pure function of its tokens and a key.

    Each residue is selected independently with probability `mask_prob`. A selected residue is replaced with `<mask>` or
    with a random standard residue (possibly the same one), or stays unchanged. BOS, EOS and padding are never selected.

    Args:
        tokens_T: (T,) uint8 token ids, including BOS and EOS.
        key: A key from `stream_key`, such as the `mask_key` of a sample.
        mask_prob: Share of residues to predict.
        mask_share: Share of those that are replaced with `<mask>`.
        random_share: Share of those that are replaced with one of the 20 standard residues.

    Returns:
        The masked (T,) uint8 token ids, and a (T,) boolean array that is True at the residues to predict.

    Source:
        Lin et al. 2023 (ESM-2), supplement A.2.2: 15% of the residues, of which 80% / 10% / 10%.
    """
    uniform_T = random_uniforms(key, tokens_T.size)
    special_T = (tokens_T == BOS_IDX) | (tokens_T == EOS_IDX) | (tokens_T == PAD_IDX)
    selected_T = (uniform_T < mask_prob) & ~special_T
    positions = np.flatnonzero(selected_T)
    # below mask_prob the number is uniform, so it also decides the replacement and the random residue
    share = uniform_T[positions] / mask_prob
    inputs_T = tokens_T.copy()
    inputs_T[positions[share < mask_share]] = MASK_IDX
    swapped = (share >= mask_share) & (share < mask_share + random_share)
    if swapped.any():
        residue = ((share[swapped] - mask_share) / random_share * NUM_STANDARD).astype(np.uint8)
        inputs_T[positions[swapped]] = FIRST_STANDARD_IDX + np.minimum(residue, NUM_STANDARD - 1)
    return inputs_T, selected_T
