"""A labelled task as packed micro-batches: each a pure function of (seed, consumed samples), as in pretraining.

One item of the training set is one update's share of the global batch. Samples run through endless epochs, each a
seeded permutation of the train set, so no batch is short. Validation and prediction go by a token budget, in windows
that cover every residue of a long protein.
"""

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from esm2kit.core.rng import permutation
from esm2kit.sequences.batching import split_micro_batches
from esm2kit.tasks.packing import EvaluationBatches, LabelledBatch, LabelledProteins, Window
from esm2kit.training.layout import BatchLayout
from esm2kit.training.parallel import data_parallel_rank


class LabelledBatches(Dataset):
    """Update number -> this rank's micro-batches of that update's global batch."""

    def __init__(self, proteins: LabelledProteins, layout: BatchLayout, rank: int, seed: int, max_steps: int) -> None:
        self.proteins, self.layout, self.rank = proteins, layout, rank
        self.seed, self.max_steps = seed, max_steps
        self.train = proteins.data.rows("train")

    def __len__(self) -> int:
        return self.max_steps

    def samples(self, step: int) -> list[Window]:
        """The global batch of an update, in drawing order."""
        size = self.layout.global_batch_size
        drawn = []
        for consumed in range(step * size, (step + 1) * size):
            epoch, position = divmod(consumed, len(self.train))
            protein = int(self.train[permutation(self.seed, epoch, position, len(self.train))])
            drawn.append(self.proteins.sample(self.seed, epoch, protein))
        return drawn

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        samples = self.samples(step)
        micro_batches = self.layout.accumulate_grad_batches * self.layout.data_parallel_size
        split = split_micro_batches([sample.stop - sample.start for sample in samples], micro_batches)
        mine = split[self.rank :: self.layout.data_parallel_size]
        return [self.proteins.batch([samples[position] for position in part]) for part in mine]


class FinetuneData(LightningDataModule):
    """Lightning's view on the two sets above.

    Args:
        proteins: the task.
        layout: how the global batch divides.
        seed: of order and windows.
        max_steps: updates in all.
        first_step: updates done before; the next one to serve.
        tokens_per_validation_batch: token budget of a rank's validation batch.
    """

    def __init__(
        self,
        proteins: LabelledProteins,
        layout: BatchLayout,
        seed: int,
        max_steps: int,
        first_step: int,
        tokens_per_validation_batch: int,
    ) -> None:
        super().__init__()
        self.proteins, self.layout, self.seed = proteins, layout, seed
        self.max_steps, self.first_step, self.budget = max_steps, first_step, tokens_per_validation_batch

    def train_dataloader(self) -> DataLoader:
        rank, _ = data_parallel_rank(self.trainer.strategy)
        batches = LabelledBatches(self.proteins, self.layout, rank, self.seed, self.max_steps)
        # batch_size None: an item already is a batch; a range as sampler keeps order and start in plain sight
        return DataLoader(batches, batch_size=None, sampler=range(self.first_step, self.max_steps))

    def val_dataloader(self) -> DataLoader:
        batches = EvaluationBatches(
            self.proteins, "validation", self.budget, *data_parallel_rank(self.trainer.strategy)
        )
        return DataLoader(batches, batch_size=None, sampler=range(len(batches)))
