"""Batches of sequences: micro-batches of equal size, and batches within a token budget."""

from collections.abc import Sequence


def deal(num_tokens: Sequence[int], hands: int) -> list[list[int]]:
    """Deal samples into equally many hands of equal size and nearly equal tokens.

    Largest first, back and forth (1 2 3 3 2 1 ...): no hand can wait long for another. A pure function of the sizes.

    Args:
        num_tokens: tokens of each sample; a multiple of `hands` of them.
        hands: micro-batches to make.
    Returns: positions of each hand's samples, longest first, so that equals stand together.
    """
    order = sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for turn, start in enumerate(range(0, len(order), hands)):
        row = order[start : start + hands]
        for hand, position in zip(dealt, reversed(row) if turn % 2 else row, strict=True):
            hand.append(position)
    return dealt
