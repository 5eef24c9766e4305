"""Split sequences into micro-batches of equal size, or into batches within a token budget."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np


def bucket_size(num_rows: int) -> int:
    """Return the multiple to round up to, which leaves 32 different sizes between consecutive powers of two."""
    return 1 << max(0, num_rows.bit_length() - 6)


def split_micro_batches(num_tokens: Sequence[int], count: int) -> list[list[int]]:
    """Split samples into micro-batches of equal size and nearly equal token count.

    Samples are assigned in order of decreasing size, back and forth (1 2 3 3 2 1 ...), so that devices wait little for
    each other. The result is a pure function of the sizes.

    Args:
        num_tokens: Tokens per sample; the number of samples is a multiple of `count`.
        count: Number of micro-batches.

    Returns:
        Positions of the samples of each micro-batch, the longest first.
    """
    order = sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    for turn, start in enumerate(range(0, len(order), count)):
        row = order[start : start + count]
        for micro_batch, position in zip(micro_batches, reversed(row) if turn % 2 else row, strict=True):
            micro_batch.append(position)
    return micro_batches


def split_within_tokens(num_tokens: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """Split samples into micro-batches within a token budget, as few as possible and with nearly equal token counts.

    Samples are assigned in order of decreasing size, each to the micro-batch with the fewest tokens. If one does not
    fit there, the split begins again with more micro-batches. The result is a pure function of the sizes.

    Args:
        num_tokens: Tokens per sample; the number of samples is a multiple of `ranks`.
        budget: Maximum tokens per micro-batch; a longer sample is a micro-batch of its own.
        ranks: The number of micro-batches is a multiple of this, so that all ranks get the same number of them.

    Returns:
        Positions of the samples of each micro-batch, the longest first. No micro-batch is empty. The micro-batches
        are in order of decreasing size, so that ranks that take every `ranks`-th one wait little for each other.
    """
    order = sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))
    per_rank = math.ceil(math.ceil(sum(num_tokens) / budget) / ranks)
    while True:
        # with one sample per micro-batch everything fits, and fewer micro-batches than samples are never empty
        count = min(per_rank * ranks, len(order))
        micro_batches: list[list[int]] = [[] for _ in range(count)]
        smallest = [(0, number) for number in range(count)]  # a heap of (tokens, micro-batch)
        for position in order:
            tokens, number = smallest[0]
            if tokens and tokens + num_tokens[position] > budget:
                break
            micro_batches[number].append(position)
            heapq.heapreplace(smallest, (tokens + num_tokens[position], number))
        else:
            sizes = {number: tokens for tokens, number in smallest}
            return [micro_batches[number] for number in sorted(sizes, key=lambda number: (-sizes[number], number))]
        per_rank += max(1, per_rank // 50)  # steps of 2%, because thousands of micro-batches would take long one by one


def split_by_tokens(num_tokens: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Split sequences into batches within a token budget, the longest first; a pure function of the sizes.

    Args:
        num_tokens: Tokens per sequence.
        budget: Maximum tokens per batch; a longer sequence is a batch of its own.

    Returns:
        Positions of the sequences of each batch.
    """
    sizes = np.asarray(num_tokens)
    order = np.argsort(-sizes, kind="stable")
    return [order[part] for part in split_within_budget(sizes[order], budget)]


def split_within_budget(sizes: np.ndarray, budget: int) -> list[slice]:
    """Split a list into consecutive parts whose sizes sum to at most the budget.

    Args:
        sizes: (N,) size per item.
        budget: Maximum sum per part; a larger item is a part of its own.

    Returns:
        One slice per part.
    """
    parts, start, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place > start and total + size > budget:
            parts.append(slice(start, place))
            start, total = place, 0
        total += size
    return [*parts, slice(start, len(sizes))] if len(sizes) else parts


def group_batches(batches: Iterable[Any], count_tokens: Callable[[Any], int], enough: int) -> Iterator[list[Any]]:
    """Group consecutive batches.

    Args:
        batches: Batches of any kind; read as they are needed.
        count_tokens: Returns the tokens of a batch.
        enough: Tokens at which a group is complete; 0 for groups of one batch.

    Yields:
        The batches of a group.
    """
    group, tokens = [], 0
    for batch in batches:
        group.append(batch)
        tokens += count_tokens(batch)
        if tokens >= enough:
            yield group
            group, tokens = [], 0
    if group:
        yield group
