"""Data loaders of all training stages: worker processes, pinned memory, and copies that do not wait for a GPU."""

import signal
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esm2kit.core.processes import STOP_SIGNALS, exit_with_parent
from esm2kit.training.memory import TrainingData


class PackedData(TrainingData):
    """Base class of the data of a stage, whose items are the batches of an update, or one batch of a validation.

    A batch is a NamedTuple; its tensors are copied to the device, and its other fields stay as they are.

    Args:
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def make_loader(self, batches: Dataset, order: range) -> DataLoader:
        """Build a loader of the items in the given order, which do not depend on the number of workers.

        Args:
            batches: The items.
            order: Their numbers.

        Returns:
            A loader. For a CUDA GPU its tensors are in pinned memory, which the GPU copies while this process goes on.
        """
        device = getattr(self.trainer.strategy, "root_device", torch.device("cpu"))
        return DataLoader(
            batches,
            batch_size=None,  # an item already holds the batches of one update
            sampler=order,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=init_data_worker,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy the tensors of a batch, or of a list of micro-batches, without waiting for a GPU."""
        if isinstance(batch, list):
            return [self.transfer_batch_to_device(each, device, dataloader_idx) for each in batch]
        tensors = {name: each for name, each in batch._asdict().items() if isinstance(each, Tensor)}
        return batch._replace(**{name: each.to(device, non_blocking=True) for name, each in tensors.items()})


def init_data_worker(worker: int) -> None:
    """Ignore stop signals, so that the trainer can finish and save its update; exit when the trainer does."""
    exit_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
