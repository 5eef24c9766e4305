"""From a preprocessed folder to packed micro-batches, each a pure function of (seed, consumed samples).

One item of the training set is one update's share of the global batch: the micro-batches this data-parallel rank works
through. So the state of the data is one number, and neither workers nor ranks nor restarts can change a sample.
"""

import signal
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esm2kit.core.processes import STOP_SIGNALS, exit_with_parent
from esm2kit.core.rng import permutation, stream_key
from esm2kit.pretraining.masking import mask_tokens
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.batching import split_by_tokens, split_micro_batches
from esm2kit.sequences.clusters import draw_sample
from esm2kit.sequences.store import SequenceStore
from esm2kit.training.layout import BatchLayout
from esm2kit.training.parallel import data_parallel_rank

VALIDATION_STREAM = 101


class MicroBatch(NamedTuple):
    """Packed, masked sequences: what one forward pass sees.

    tokens_N: input token ids; num_tokens: tokens of each sequence; rows_M, targets_M: which rows are predicted, and
    what they were; store_rows: rows of the store, to name a sequence when something goes wrong.
    """

    tokens_N: Tensor
    num_tokens: list[int]
    rows_M: Tensor
    targets_M: Tensor
    store_rows: list[int]

    @property
    def label_weight(self) -> float:
        """What the loss is divided by: the number of masked tokens."""
        return len(self.targets_M)


class Masking(NamedTuple):
    """Share of residues to predict, and what becomes of them: <mask>, another residue, or left as they are."""

    mask_prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1


BERT = Masking()


class Sample(NamedTuple):
    """One sequence's window before masking."""

    row: int
    start: int
    stop: int
    mask_key: int


def collate(samples: Sequence[Sample], store: SequenceStore, masking: Masking) -> MicroBatch:
    """Cut, encode, mask and pack samples into one micro-batch."""
    inputs, rows, targets, counts, offset = [], [], [], [], 0
    for sample in samples:
        tokens_T = np.empty(sample.stop - sample.start + 2, dtype=np.uint8)
        tokens_T[0], tokens_T[-1] = BOS_IDX, EOS_IDX
        tokens_T[1:-1] = encode(store.residues(sample.row)[sample.start : sample.stop])
        masked_T, selected_T = mask_tokens(tokens_T, sample.mask_key, *masking)
        selected = np.flatnonzero(selected_T)
        inputs.append(masked_T)
        rows.append(selected + offset)
        targets.append(tokens_T[selected])
        counts.append(len(tokens_T))
        offset += len(tokens_T)
    pack = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (inputs, rows, targets)]
    return MicroBatch(pack[0], counts, pack[1], pack[2], [sample.row for sample in samples])


class ResidueCounts:
    """A store's residues by row, looked up one at a time: nothing grows with the training set."""

    def __init__(self, store: SequenceStore) -> None:
        self.store = store

    def __getitem__(self, row: int) -> int:
        return len(self.store.residues(row))


class GlobalBatches(Dataset):
    """Update number -> this rank's micro-batches of that update's global batch."""

    def __init__(
        self,
        dataset: TrainingSet,
        layout: BatchLayout,
        rank: int,
        seed: int,
        max_steps: int,
        max_residues: int,
        masking: Masking,
    ) -> None:
        self.store, self.index = dataset.train, dataset.clusters
        self.num_residues = ResidueCounts(self.store)
        self.layout, self.rank, self.seed = layout, rank, seed
        self.max_steps, self.max_residues, self.masking = max_steps, max_residues, masking

    def __len__(self) -> int:
        return self.max_steps

    def samples(self, step: int) -> list[Sample]:
        """The global batch of an update, in drawing order: the next `global_batch_size` clusters of endless epochs."""
        size, clusters = self.layout.global_batch_size, self.index.num_clusters
        drawn = []
        for consumed in range(step * size, (step + 1) * size):
            epoch, position = divmod(consumed, clusters)
            cluster = permutation(self.seed, epoch, position, clusters)
            picked = draw_sample(self.seed, epoch, cluster, self.index, self.num_residues, self.max_residues)
            drawn.append(Sample(picked.row, picked.start, picked.stop, picked.mask_key))
        return drawn

    def __getitem__(self, step: int) -> list[MicroBatch]:
        samples = self.samples(step)
        micro_batches = self.layout.accumulate_grad_batches * self.layout.data_parallel_size
        split = split_micro_batches([sample.stop - sample.start for sample in samples], micro_batches)
        mine = split[self.rank :: self.layout.data_parallel_size]
        return [collate([samples[position] for position in part], self.store, self.masking) for part in mine]


class ValidationBatches(Dataset):
    """UniRef50 representatives under masks that never change, in batches of a token budget a rank, which share each."""

    def __init__(
        self,
        store: SequenceStore,
        rank: int,
        ranks: int,
        seed: int,
        max_residues: int,
        tokens_per_batch: int,
        masking: Masking,
    ) -> None:
        self.store, self.masking = store, masking
        whole = store.num_residues
        num_residues = np.minimum(whole, max_residues)
        # long representatives are cut to their middle: the same residues at every validation of every run
        starts = (whole - num_residues) // 2

        def sample(row: int) -> Sample:
            start = int(starts[row])
            return Sample(row, start, start + int(num_residues[row]), stream_key(seed, 0, row, VALIDATION_STREAM))

        batches = split_by_tokens(num_residues + 2, tokens_per_batch * ranks)
        self.batches = [[sample(row) for row in batch.tolist()] for batch in batches]
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> MicroBatch:
        batch = self.batches[index]
        mine = batch[self.rank :: self.ranks]
        if mine:
            return collate(mine, self.store, self.masking)
        # a sharded model's ranks must run as many forward passes as each other: run one, and score nothing
        idle = collate(batch[:1], self.store, self.masking)
        return idle._replace(rows_M=idle.rows_M[:0], targets_M=idle.targets_M[:0])


class PretrainingData(LightningDataModule):
    """Lightning's view on the two sets above.

    Args:
        dataset: what `esm2kit preprocess` made.
        layout: how the global batch divides.
        seed: of order, members, crops and masks.
        max_steps: updates in all.
        first_step: updates done before; the next one to serve.
        max_residues: longest window, without BOS and EOS.
        tokens_per_validation_batch: token budget of a rank's validation batch.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        masking: what is hidden from the model in training.
        validation_masking: what is hidden from it in validation.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        layout: BatchLayout,
        seed: int,
        max_steps: int,
        first_step: int = 0,
        max_residues: int = 1022,
        tokens_per_validation_batch: int = 4096,
        num_workers: int = 0,
        masking: Masking = BERT,
        validation_masking: Masking = BERT,
    ) -> None:
        super().__init__()
        self.dataset, self.layout, self.seed = dataset, layout, seed
        self.max_steps, self.first_step, self.max_residues = max_steps, first_step, max_residues
        self.tokens_per_validation_batch, self.num_workers = tokens_per_validation_batch, num_workers
        self.masking, self.validation_masking = masking, validation_masking

    def train_dataloader(self) -> DataLoader:
        rank, _ = data_parallel_rank(self.trainer.strategy)
        batches = GlobalBatches(
            self.dataset, self.layout, rank, self.seed, self.max_steps, self.max_residues, self.masking
        )
        return self._loader(batches, range(self.first_step, self.max_steps))

    def val_dataloader(self) -> DataLoader:
        rank, ranks = data_parallel_rank(self.trainer.strategy)
        batches = ValidationBatches(
            self.dataset.valid,
            rank,
            ranks,
            self.seed,
            self.max_residues,
            self.tokens_per_validation_batch,
            self.validation_masking,
        )
        return self._loader(batches, range(len(batches)))

    def _loader(self, batches: Dataset, order: range) -> DataLoader:
        # batch_size None: an item already is a batch; a range as sampler keeps order and start in plain sight
        return DataLoader(
            batches,
            batch_size=None,
            sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=init_data_worker,
        )


def init_data_worker(worker: int) -> None:
    """Stop with the trainer, not before it: a signal to the whole group leaves it an update to finish and to save."""
    exit_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
