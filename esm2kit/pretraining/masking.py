"""Randomness as arithmetic: keys of (seed, epoch, index), and the BERT mask drawn from one.

Nothing here holds a state, so a sample does not depend on the worker, the rank or what was drawn before it. The hash is
splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), which passes BigCrush on a plain counter.
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
    uniform_T = random_uniforms(key, tokens_T.size)
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
