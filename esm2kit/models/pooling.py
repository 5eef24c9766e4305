"""From the rows of packed sequences to what a head or a file is given: means, BOS vectors or residues."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reads = Literal["mean", "bos", "residues"]


def pool(rows_TD: Tensor, reads: Reads) -> Tensor:
    """Pool one protein's representations.

    Args:
        rows_TD: BOS first, then the residues; without EOS.
        reads: the mean over the residues, the vector of BOS, or every residue's vector.

    Returns:
        (D,), or (residues, D) for residues.
    """
    if reads == "bos":
        return rows_TD[0]
    return rows_TD[1:].mean(0) if reads == "mean" else rows_TD[1:]


def rows_read(hidden_ND: Tensor, num_tokens: Sequence[int], reads: Reads) -> tuple[Tensor, list[int]]:
    """Pool every protein of a packed batch; returns the rows, and how many of them each protein has."""
    pooled = [pool(rows_TD[:-1], reads) for rows_TD in hidden_ND.split(list(num_tokens))]
    if reads == "residues":
        return torch.cat(pooled), [tokens - 2 for tokens in num_tokens]
    return torch.stack(pooled), [1] * len(pooled)
