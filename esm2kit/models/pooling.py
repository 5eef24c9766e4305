"""From the rows of packed sequences to what a head or a file is given: means, BOS vectors or residues."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reads = Literal["mean", "bos", "residues"]


def rows_read(hidden_ND: Tensor, num_tokens: Sequence[int], reads: Reads) -> tuple[Tensor, list[int]]:
    """What a head is given of a packed batch, and how many rows each protein has of it."""
    stretches = hidden_ND.split(list(num_tokens))
    if reads == "bos":
        return torch.stack([rows[0] for rows in stretches]), [1] * len(stretches)
    if reads == "mean":
        return torch.stack([rows[1:-1].mean(0) for rows in stretches]), [1] * len(stretches)
    return torch.cat([rows[1:-1] for rows in stretches]), [tokens - 2 for tokens in num_tokens]
