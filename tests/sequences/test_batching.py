"""Token budgets: each sequence once, the longest first, and no batch over the budget."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esm2kit.sequences.batching import split_by_tokens, split_within_budget, split_within_tokens


@given(num_tokens=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 700))
def test_batches_hold_each_sequence_once_and_as_many_as_fit(num_tokens, budget) -> None:
    batches = split_by_tokens(num_tokens, budget)
    order = [position for batch in batches for position in batch.tolist()]
    assert order == sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))
    sizes = np.array(num_tokens, dtype=int)
    assert all(len(batch) == 1 or sizes[batch].sum() <= budget for batch in batches)
    following = [int(sizes[batch[0]]) for batch in batches[1:]]
    assert all(sizes[batch].sum() + size > budget for batch, size in zip(batches, following, strict=False))


def test_split_within_budget_preserves_the_order() -> None:
    assert split_within_budget(np.array([3, 3, 9, 1, 2]), 6) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert split_within_budget(np.array([], dtype=int), 6) == []


@given(
    num_tokens=st.lists(st.integers(1, 300), min_size=12, max_size=12),
    budget=st.integers(1, 700),
    ranks=st.sampled_from([1, 2, 3, 4]),
)
def test_micro_batches_hold_each_sample_once_within_the_budget(num_tokens, budget, ranks) -> None:
    micro_batches = split_within_tokens(num_tokens, budget, ranks)
    assert sorted(position for part in micro_batches for position in part) == list(range(12))
    assert len(micro_batches) % ranks == 0
    sizes = [sum(num_tokens[position] for position in part) for part in micro_batches]
    assert min(map(len, micro_batches)) >= 1, "a rank without a sample could not run its forward pass"
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, micro_batches, strict=True))
    assert sizes == sorted(sizes, reverse=True)


def test_micro_batches_within_a_budget_are_few_and_even() -> None:
    """With a mean of thousands of tokens the largest and the smallest micro-batch differ by less than 1%."""
    tokens = np.random.default_rng(0).lognormal(5.5, 0.7, 512).astype(int).clip(20, 1024).tolist()
    for ranks in (1, 2, 4):
        micro_batches = split_within_tokens(tokens, 16_384, ranks)
        assert len(micro_batches) == math.ceil(sum(tokens) / 16_384 / ranks) * ranks
        sizes = [sum(tokens[position] for position in part) for part in micro_batches]
        assert max(sizes) - min(sizes) < 0.01 * max(sizes)
    assert len(split_within_tokens([700] * 2000, 1024, 2)) == 2000, "no two of these fit together"
