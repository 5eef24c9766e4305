"""Pool representations of packed sequences to one vector per protein, or to residue vectors."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from esm2kit.models.packing import to_device

Pooling = Literal["mean", "max", "bos", "mean+max", "residues"]


def pool(rows_TD: Tensor, pooling: Pooling) -> Tensor:
    """Pool one protein's representations.

    Args:
        rows_TD: BOS, then the residues, without EOS.
        pooling: the mean or the maximum of the residues in each dimension, both one after the other, the BOS vector,
            or all residue vectors.

    Returns:
        (D,), (2 D,) for "mean+max", or (residues, D) for "residues".
    """
    if pooling == "bos":
        return rows_TD[0]
    if pooling == "mean+max":
        return torch.cat([pool(rows_TD, "mean"), pool(rows_TD, "max")])
    if pooling == "max":
        return rows_TD[1:].amax(0)
    return rows_TD[1:].mean(0) if pooling == "mean" else rows_TD[1:]


def pool_packed(hidden_ND: Tensor, num_tokens: Sequence[int], pooling: Pooling) -> Tensor:
    """Pool every protein of a packed batch with few kernels, on any device.

    Means are summed in float32 residue by residue, so they do not depend on the other proteins of the batch.

    Args:
        hidden_ND: concatenated representations of all sequences, each with BOS and EOS.
        num_tokens: tokens per sequence, with BOS and EOS.
        pooling: as for `pool`.

    Returns:
        (B, D) means, maxima or (B, 2 D) both in float32, (B, D) BOS vectors, or (all residues, D) residue vectors.
    """
    if pooling == "mean+max":
        return torch.cat([pool_packed(hidden_ND, num_tokens, part) for part in ("mean", "max")], dim=1)
    device, ends_B = hidden_ND.device, torch.tensor(num_tokens).cumsum(0)
    starts_B = ends_B - torch.tensor(num_tokens)
    if pooling in ("mean", "max"):
        if device.type == "mps":  # which lacks segment_reduce
            return torch.stack([pool(rows_TD[:-1].float(), pooling) for rows_TD in hidden_ND.split(list(num_tokens))])
        # three segments per sequence: BOS, residues, EOS
        lengths_S = torch.tensor([part for tokens in num_tokens for part in (1, tokens - 2, 1)])
        lengths_S = to_device(lengths_S, device)
        return torch.segment_reduce(hidden_ND.float(), pooling, lengths=lengths_S, axis=0, unsafe=True)[1::3]
    if pooling == "bos":
        return hidden_ND[to_device(starts_B, device)]
    # rows are chosen on the CPU: a mask on the device would make the CPU wait for its number of rows
    inside_N = torch.ones(len(hidden_ND), dtype=torch.bool)
    inside_N[starts_B] = inside_N[ends_B - 1] = False
    return hidden_ND[to_device(inside_N.nonzero()[:, 0], device)]


def pool_rows(hidden_ND: Tensor, num_tokens: Sequence[int], pooling: Pooling) -> tuple[Tensor, list[int]]:
    """Pool every protein of a packed batch, one after the other.

    Args:
        hidden_ND: as for `pool_packed`.
        num_tokens: as for `pool_packed`.
        pooling: as for `pool`.

    Returns:
        The pooled rows of all proteins, (rows, D), and the number of rows per protein.
    """
    pooled = [pool(rows_TD[:-1], pooling) for rows_TD in hidden_ND.split(list(num_tokens))]
    if pooling == "residues":
        return torch.cat(pooled), [tokens - 2 for tokens in num_tokens]
    return torch.stack(pooled), [1] * len(pooled)
