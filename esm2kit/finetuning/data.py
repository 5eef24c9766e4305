"""A labelled task as packed micro-batches, each a function of (seed, consumed samples) as in pretraining.

One item of the training set is this rank's part of the global batch of one update. Samples follow an endless sequence
of epochs, each a seeded permutation of the training set, so every batch is full. Validation uses batches with a token
budget and windows that cover all residues of long proteins.
"""

from torch.utils.data import DataLoader, Dataset

from esm2kit.core.rng import permutation
from esm2kit.tasks.packing import EvaluationBatches, LabelledBatch, LabelledProteins, Window
from esm2kit.training.data import PackedData
from esm2kit.training.layout import BatchLayout
from esm2kit.training.parallel import data_parallel_rank


class LabelledBatches(Dataset):
    """Training set of updates: item i is this rank's micro-batches of the global batch of update i.

    Args:
        proteins: The task.
        layout: How the global batch is split.
        rank: Data-parallel rank.
        seed: Seed of order and windows.
        max_steps: Number of updates.
    """

    def __init__(self, proteins: LabelledProteins, layout: BatchLayout, rank: int, seed: int, max_steps: int) -> None:
        self.proteins, self.layout, self.rank = proteins, layout, rank
        self.seed, self.max_steps = seed, max_steps
        self.train = proteins.data.rows("train")

    def __len__(self) -> int:
        return self.max_steps

    def samples(self, step: int) -> list[Window]:
        """Return the windows of the global batch of an update, in sampling order."""
        size = self.layout.global_batch_size
        windows = []
        for consumed in range(step * size, (step + 1) * size):
            epoch, position = divmod(consumed, len(self.train))
            protein = int(self.train[permutation(self.seed, epoch, position, len(self.train))])
            windows.append(self.proteins.sample(self.seed, epoch, protein))
        return windows

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        samples = self.samples(step)
        split = self.layout.split([sample.stop - sample.start + 2 for sample in samples], self.rank)
        return [self.proteins.batch([samples[position] for position in part]) for part in split]


class FinetuneData(PackedData):
    """Lightning data module of a labelled task.

    Args:
        proteins: The task.
        layout: How the global batch is split.
        seed: Seed of order and windows.
        max_steps: Number of updates.
        first_step: Update to start from.
        tokens_per_validation_batch: Token budget of a validation batch per rank.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(
        self,
        proteins: LabelledProteins,
        layout: BatchLayout,
        seed: int,
        max_steps: int,
        first_step: int,
        tokens_per_validation_batch: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__(num_workers)
        self.proteins, self.layout, self.seed = proteins, layout, seed
        self.max_steps, self.first_step, self.budget = max_steps, first_step, tokens_per_validation_batch

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the updates from `first_step` on."""
        rank, _ = data_parallel_rank(self.trainer.strategy)
        batches = LabelledBatches(self.proteins, self.layout, rank, self.seed, self.max_steps)
        return self.make_loader(batches, range(self.first_step, self.max_steps))

    def count_tokens(self) -> list[int]:
        """Count the tokens of each sample of the next update."""
        batches = LabelledBatches(self.proteins, self.layout, 0, self.seed, self.max_steps)
        samples = batches.samples(min(self.first_step, self.max_steps - 1))
        return [sample.stop - sample.start + 2 for sample in samples]

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this rank's validation batches."""
        batches = EvaluationBatches(
            self.proteins, "validation", self.budget, *data_parallel_rank(self.trainer.strategy)
        )
        return self.make_loader(batches, range(len(batches)))
