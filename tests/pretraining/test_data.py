"""The order of training samples does not depend on the processes that prepare them."""

import types
from pathlib import Path

import pytest
import torch

from esm2kit.pretraining.data import MicroBatch, PretrainingData
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.training.layout import BatchLayout


def stream(dataset: Path, num_workers: int, first_step: int = 0) -> list[list[MicroBatch]]:
    layout = BatchLayout.of(global_batch_size=6, accumulate_grad_batches=2)
    data = PretrainingData(
        TrainingSet.open(dataset), layout, seed=3, max_steps=12, first_step=first_step, num_workers=num_workers
    )
    data.trainer = types.SimpleNamespace(strategy=None)
    return list(data.train_dataloader())


def are_equal(first: list[list[MicroBatch]], second: list[list[MicroBatch]]) -> bool:
    if len(first) != len(second):
        return False
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in zip(one, other, strict=True)]
    return all(
        left.num_tokens == right.num_tokens
        and left.store_rows == right.store_rows
        and all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("tokens_N", "rows_M", "targets_M"))
        for left, right in pairs
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
def test_any_number_of_workers_and_any_start_give_the_same_batches(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm2kit.pretraining.data.data_parallel_rank", lambda strategy: (0, 1))
    expected = stream(dataset, num_workers=0)
    assert are_equal(stream(dataset, num_workers=4, first_step=3), expected[3:])
    assert not are_equal(expected[1:], expected[:-1])
