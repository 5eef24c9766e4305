"""Token budgets: each sequence once, the longest first, and no batch over the budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esm2kit.sequences.batching import split_by_tokens, split_within_budget


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
