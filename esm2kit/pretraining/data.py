"""Packed micro-batches from a preprocessed dataset, as a pure function of the seed and the number of consumed samples.

Each item of the training set holds this data-parallel rank's micro-batches for one update. The state of the data is one
number, so samples do not depend on the number of workers or ranks, or on restarts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esm2kit.core.rng import permutation, stream_key
from esm2kit.pretraining.masking import mask_tokens
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.batching import split_by_tokens
from esm2kit.sequences.clusters import draw_sample
from esm2kit.sequences.store import SequenceStore
from esm2kit.training.data import PackedData
from esm2kit.training.layout import BatchLayout
from esm2kit.training.parallel import data_parallel_rank

VALIDATION_STREAM = 101


class MicroBatch(NamedTuple):
    """Packed, masked sequences for one forward pass.

    Args:
        tokens_N: (N,) input token ids of all sequences, one after the other.
        num_tokens: Number of tokens per sequence; the sum is N.
        rows_M: (M,) positions in `tokens_N` to predict.
        targets_M: (M,) original token ids at these positions.
        store_rows: Row of each sequence in the store, for error messages.
    """

    tokens_N: Tensor
    num_tokens: list[int]
    rows_M: Tensor
    targets_M: Tensor
    store_rows: list[int]

    @property
    def label_weight(self) -> float:
        """The number of masked tokens, by which the summed loss is divided."""
        return len(self.targets_M)


class Masking(NamedTuple):
    """Shares of masking.

    Args:
        mask_prob: Share of residues to predict.
        mask_share: Share of those that are replaced with `<mask>`.
        random_share: Share of those that are replaced with a random residue; the rest stays unchanged.
    """

    mask_prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1


BERT = Masking()


class Sample(NamedTuple):
    """A window of one sequence, before masking.

    Args:
        row: Row of the sequence in the store.
        start: First residue of the window, from 0.
        stop: First residue after the window.
        mask_key: Random key of the mask.
    """

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
    """Number of residues by row of a store, read on demand, so memory does not grow with the training set."""

    def __init__(self, store: SequenceStore) -> None:
        self.store = store

    def __getitem__(self, row: int) -> int:
        return len(self.store.residues(row))


class GlobalBatches(Dataset):
    """Maps an update's number to this rank's micro-batches of its global batch.

    Args:
        dataset: The training set.
        layout: The batch layout.
        rank: Data-parallel rank.
        seed: Random seed of sample order, cluster members, crops and masks.
        max_steps: Total number of updates.
        max_residues: Longest window in residues.
        masking: Shares of masking.
    """

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
        """List the samples of an update's global batch: the next `global_batch_size` clusters of endless epochs."""
        size, clusters = self.layout.global_batch_size, self.index.num_clusters
        samples = []
        for consumed in range(step * size, (step + 1) * size):
            epoch, position = divmod(consumed, clusters)
            cluster = permutation(self.seed, epoch, position, clusters)
            chosen = draw_sample(self.seed, epoch, cluster, self.index, self.num_residues, self.max_residues)
            samples.append(Sample(chosen.row, chosen.start, chosen.stop, chosen.mask_key))
        return samples

    def __getitem__(self, step: int) -> list[MicroBatch]:
        samples = self.samples(step)
        split = self.layout.split([sample.stop - sample.start + 2 for sample in samples], self.rank)
        return [collate([samples[position] for position in part], self.store, self.masking) for part in split]


class ValidationBatches(Dataset):
    """Validation sequences with fixed masks, in batches that the ranks share.

    Args:
        store: The validation sequences.
        rank: Data-parallel rank.
        ranks: Number of data-parallel ranks.
        seed: Random seed of the masks.
        max_residues: Longest window in residues.
        tokens_per_batch: Token budget per batch and rank.
        masking: Shares of masking.
    """

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
        full_lengths = store.num_residues
        num_residues = np.minimum(full_lengths, max_residues)
        # long sequences are cropped to their middle, so that every validation scores the same residues
        starts = (full_lengths - num_residues) // 2

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
        own = batch[self.rank :: self.ranks]
        if own:
            return collate(own, self.store, self.masking)
        # all ranks of a sharded model must run the same number of forward passes; this one scores nothing
        idle = collate(batch[:1], self.store, self.masking)
        return idle._replace(rows_M=idle.rows_M[:0], targets_M=idle.targets_M[:0])


class PretrainingData(PackedData):
    """The data loaders of training and validation.

    Args:
        dataset: The training set.
        layout: The batch layout.
        seed: Random seed of sample order, cluster members, crops and masks.
        max_steps: Total number of updates.
        first_step: Updates made before, and so the number of the next update.
        max_residues: Longest window in residues, without BOS and EOS.
        tokens_per_validation_batch: Token budget per validation batch and rank.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        masking: Shares of masking in training.
        validation_masking: Shares of masking in validation.
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
        super().__init__(num_workers)
        self.dataset, self.layout, self.seed = dataset, layout, seed
        self.max_steps, self.first_step, self.max_residues = max_steps, first_step, max_residues
        self.tokens_per_validation_batch = tokens_per_validation_batch
        self.masking, self.validation_masking = masking, validation_masking

    def train_dataloader(self) -> DataLoader:
        """Build the loader of this rank's updates, from `first_step`."""
        rank, _ = data_parallel_rank(self.trainer.strategy)
        return self.make_loader(self._global_batches(rank), range(self.first_step, self.max_steps))

    def _global_batches(self, rank: int) -> GlobalBatches:
        return GlobalBatches(
            self.dataset, self.layout, rank, self.seed, self.max_steps, self.max_residues, self.masking
        )

    def count_tokens(self) -> list[int]:
        """Count the tokens of each sample of the next update."""
        samples = self._global_batches(0).samples(min(self.first_step, self.max_steps - 1))
        return [sample.stop - sample.start + 2 for sample in samples]

    def val_dataloader(self) -> DataLoader:
        """Build the loader of this rank's validation batches."""
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
        return self.make_loader(batches, range(len(batches)))
