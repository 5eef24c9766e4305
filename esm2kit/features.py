"""Feature rows and what a probe makes of them: packed protein after protein, in memory or memory-mapped."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.errors import InputError
from esm2kit.flip import Task
from esm2kit.tasks import TaskData

ProbeName = Literal["ridge", "logistic", "fnn", "cnn", "light_attention"]
ROWS_PER_BLOCK = 1 << 14


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is fitted.

    Args:
        probe: ridge (values), logistic (classes), fnn, cnn (residues) or light_attention (proteins, from residues).
        hidden: hidden units of a network; 0 for as many as the features have columns.
        dropout: share of hidden units set to zero while training.
        learning_rate: Adam's.
        weight_decay: Adam's, added to the gradient.
        epochs: passes over train at most.
        batch_size: proteins a step.
        patience: epochs without a better validation loss before a seed stops; None trains all epochs.
        keep: weights of the `best` validation loss, or of the `last` epoch.
        standardize: z-score features on train.
        scale_targets: z-score values on train while training; scores are in the target's unit either way.
        row_budget: rows (residues) in memory at once; a larger batch is worked off in parts, with the same gradient.
    """

    probe: ProbeName
    hidden: int = 32
    dropout: float = 0.25
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 200
    batch_size: int = 64
    patience: int | None = 10
    keep: Literal["best", "last"] = "best"
    standardize: bool = True
    scale_targets: bool = True
    row_budget: int = 32_768


@dataclass(frozen=True)
class Features:
    """Feature rows, packed protein after protein.

    Args:
        values_ND: any float type, in memory or memory-mapped.
        offsets: (P + 1,) rows of protein i are values_ND[offsets[i]:offsets[i + 1]].
        name: for the report.
    """

    values_ND: np.ndarray
    offsets: np.ndarray
    name: str = ""

    def tensor(self) -> Tensor:
        """A view, never written to, so a read-only memory map is fine."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.values_ND)


class Fitted(NamedTuple):
    """What a probe says of the test set, asked once.

    Args:
        test_SM: predictions for `task_data.target_rows("test")`, one row a seed; classes int64, values float64.
        validation_SM: the same for validation.
        history: learning curves {"train_loss": (E, S), "validation_loss": (E, S)}; empty for linear probes.
        selected: what validation chose: the penalty, or each seed's epoch.
        seconds: wall time of fitting and predicting.
    """

    test_SM: np.ndarray
    validation_SM: np.ndarray
    history: dict[str, list[list[float]]] = {}  # noqa: RUF012
    selected: dict[str, float | list[float] | list[int]] = {}  # noqa: RUF012
    seconds: float = 0.0


def check_rows(features: Features, data: TaskData) -> None:
    """Refuse features whose rows are not one a protein or one a residue of these very proteins.

    Raises: InputError naming the first protein that differs.
    """
    counts = np.diff(features.offsets)
    if len(counts) != len(data.ids):
        raise InputError(f"{features.name or 'features'}: {len(counts)} proteins for {len(data.ids)} in the task")
    if (counts == 1).all() and data.task.level == "protein":
        return
    wrong = np.flatnonzero(counts != data.num_residues)
    if wrong.size:
        row = wrong[0]
        raise InputError(
            f"{features.name or 'features'}: protein {data.ids[row]!r} has {counts[row]} rows for "
            f"{data.num_residues[row]} residues ({wrong.size} proteins differ); embed these very sequences, whole"
        )


def row_blocks(values: Tensor, rows: np.ndarray, size: int = ROWS_PER_BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of ascending rows as float32: (where in `rows`, block)."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        low, high = int(part[0]), int(part[-1]) + 1
        block = values[low:high]
        if high - low != len(part):
            block = block[torch.from_numpy(part - low)]
        yield slice(start, start + len(part)), block.float()


def column_moments(values: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column over some rows, float32; 1 where a column does not vary."""
    count, mean_D, squares_D = 0, 0.0, 0.0
    for _, block in row_blocks(values, rows):
        block = block.double()
        size, block_mean = len(block), block.mean(0)
        delta = block_mean - mean_D
        squares_D = squares_D + (block - block_mean).square().sum(0) + delta.square() * count * size / (count + size)
        mean_D = mean_D + delta * size / (count + size)
        count += size
    scale_D = (squares_D / count).sqrt()
    scale_D[scale_D < 1e-8] = 1.0
    return mean_D.float(), scale_D.float()


def class_targets(classes: np.ndarray, task: Task) -> Tensor:
    classes_N = torch.from_numpy(classes)
    if not task.binary_labels:
        return classes_N
    return ((classes_N[:, None] >> torch.arange(len(task.binary_labels))) & 1).float()


def decide(outputs: Tensor, task: Task) -> Tensor:
    """Class of the largest output, or the integer that the positive bits spell, or the value; over the last axis."""
    if task.target == "value":
        return outputs[..., 0]
    if task.binary_labels:
        powers = 1 << torch.arange(len(task.binary_labels), device=outputs.device)
        return ((outputs > 0).long() * powers).sum(-1)
    return outputs.argmax(-1)
