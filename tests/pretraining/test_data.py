"""The training stream: one order of samples, whoever prepares it."""

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


def same(one: list[list[MicroBatch]], other: list[list[MicroBatch]]) -> bool:
    if len(one) != len(other):
        return False
    pairs = [pair for ours, theirs in zip(one, other, strict=True) for pair in zip(ours, theirs, strict=True)]
    return all(
        left.num_tokens == right.num_tokens
        and left.store_rows == right.store_rows
        and all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("tokens_N", "rows_M", "targets_M"))
        for left, right in pairs
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores, on purpose
def test_any_number_of_workers_and_any_start_give_the_same_batches(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm2kit.pretraining.data.data_parallel_rank", lambda strategy: (0, 1))
    alone = stream(dataset, num_workers=0)
    assert same(stream(dataset, num_workers=4, first_step=3), alone[3:])
    assert not same(alone[1:], alone[:-1])
