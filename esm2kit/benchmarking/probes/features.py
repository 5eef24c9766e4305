"""Feature rows in memory or in a file, packed protein after protein, and the targets and predictions of a probe."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from esm2kit.benchmarking.probes.parameters import ProbeParameters
from esm2kit.core.errors import InputError
from esm2kit.core.files import read_into
from esm2kit.tasks.label_metrics import DEFAULT_THRESHOLD
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import SET_NAMES, TaskData

NUMBERS_PER_BLOCK = 1 << 20  # 4 MB as float32, whatever the width
BYTES_PER_READ = 1 << 20
# A column is constant if its standard deviation is below this share of its mean, the rounding error of float32.
CONSTANT = 2.0**-24


class FileRows:
    """Rows in a file, one contiguous block per protein, read on demand.

    Rows are read and not memory-mapped: a batch costs one call per protein instead of a page fault every few rows, and
    the process holds only the batch in memory. The file stays open until `close`, so that replacing it on disk does
    not affect the rows.

    Args:
        path: The file.
        starts_P: (P,) byte offset of each protein's rows.
        offsets: (P + 1,) rows of protein i are rows offsets[i] to offsets[i + 1].
        width: Numbers per row.
        dtype: Type of the numbers in the file, float32 or float16.
    """

    def __init__(self, path: Path, starts_P: np.ndarray, offsets: np.ndarray, width: int, dtype: np.dtype) -> None:
        self.path, self.starts_P, self.offsets, self.width, self.dtype = path, starts_P, offsets, width, dtype
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (stays open until close)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and numbers per row."""
        return len(self), self.width

    def read(self, start: int, stop: int, out_ND: Tensor) -> None:
        """Read rows start to stop into a contiguous float32 tensor."""
        kept = out_ND.numpy() if self.dtype == np.float32 else np.empty(out_ND.shape, self.dtype)
        protein, row_bytes = int(np.searchsorted(self.offsets, start, side="right")) - 1, self.width * kept.itemsize
        row = start
        while row < stop:
            end = min(stop, int(self.offsets[protein + 1]))
            if end > row:
                place = int(self.starts_P[protein]) + (row - int(self.offsets[protein])) * row_bytes
                self._fill(memoryview(kept[row - start : end - start]).cast("B"), place)
            row, protein = end, protein + 1
        if kept.dtype != np.float32:
            out_ND.copy_(torch.from_numpy(kept))

    def _fill(self, buffer: memoryview, position: int) -> None:
        """Fill a buffer with bytes from a position of the file; safe for concurrent readers."""
        while buffer:
            count = read_into(self._file.fileno(), buffer[:BYTES_PER_READ], position)
            if not count:
                raise InputError(
                    f"{self.path} ends before its last rows. Embed the proteins again.",
                    code="embeddings.short",
                    path=self.path,
                )
            buffer, position = buffer[count:], position + count


@dataclass(frozen=True)
class Features:
    """Feature rows, packed protein after protein.

    Args:
        values_ND: Numbers of any float type, in memory, memory-mapped or in a file.
        offsets: (P + 1,) rows of protein i are values_ND[offsets[i]:offsets[i + 1]].
        name: Name for messages.
    """

    values_ND: np.ndarray | FileRows
    offsets: np.ndarray
    name: str = ""

    @property
    def width(self) -> int:
        """Numbers per row."""
        return self.values_ND.shape[1]

    def close(self) -> None:
        """Close the file, if the rows are in one."""
        if isinstance(self.values_ND, FileRows):
            self.values_ND.close()

    def load(self) -> "Features":
        """Read rows from a file into memory if there is one per protein; batches of them are scattered."""
        if not isinstance(self.values_ND, FileRows) or len(self.values_ND) > len(self.offsets) - 1:
            return self
        return replace(self, values_ND=self.take(np.arange(len(self.values_ND))).numpy())

    def read(self, start: int, stop: int, out_ND: Tensor) -> None:
        """Read rows start to stop into a contiguous float32 tensor."""
        if isinstance(self.values_ND, FileRows):
            self.values_ND.read(start, stop, out_ND)
        else:
            out_ND.copy_(self._tensor()[start:stop])

    def take(self, rows: np.ndarray) -> Tensor:
        """Return some rows as a tensor that must not be modified, because consecutive rows in memory are a view.

        Args:
            rows: Row numbers. Ascending runs are read fastest.

        Returns:
            (len(rows), D) float32.
        """
        if not isinstance(self.values_ND, FileRows):
            consecutive = len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all()
            where = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else torch.from_numpy(rows)
            return self._tensor()[where].float()
        out_ND = torch.empty(len(rows), self.width)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            self.read(int(rows[first]), int(rows[last - 1]) + 1, out_ND[first:last])
        return out_ND

    def _tensor(self) -> Tensor:
        """Return a view of the values that is never modified; the array may be a read-only memory map."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.values_ND)


@dataclass(frozen=True)
class ProbeTargets:
    """The targets of a probe, and the sets for training, selection and scoring.

    Args:
        packed: One target per protein or per residue, protein after protein. Classes are int64, values float64.
            Several targets per protein are (P, C), as in TaskData.
        scored: False for targets that are not scored, in the order of `packed`.
        offsets: (P + 1,) targets of protein i are packed[offsets[i]:offsets[i + 1]].
        proteins: Set name -> protein numbers, ascending. A missing set is empty.
        task: Level, target type and labels.
        ids: Names of the proteins for messages.
    """

    packed: np.ndarray
    scored: np.ndarray
    offsets: np.ndarray
    proteins: Mapping[str, np.ndarray]
    task: Task
    ids: Sequence[str] = ()

    @classmethod
    def from_task(cls, data: TaskData) -> Self:
        """Build the targets of a task."""
        proteins = {name: data.rows(name) for name in SET_NAMES}
        return cls(data.targets, data.scored, data.offsets, proteins, data.task, data.ids)

    def rows(self, set_name: str) -> np.ndarray:
        """Return the indices of the scored targets of a set."""
        member = np.zeros(len(self.offsets) - 1, dtype=bool)
        member[self.proteins.get(set_name, [])] = True
        return np.flatnonzero(np.repeat(member, np.diff(self.offsets)) & self.scored)

    def name(self, protein: int) -> str:
        """Return the id of a protein, or its number from 1."""
        return self.ids[protein] if len(self.ids) else str(protein + 1)


class Fitted(NamedTuple):
    """The predictions of a fitted model.

    Args:
        test_SM: Predictions of the scored test targets, one row per seed. Classes are int64, values float64. For
            several targets per protein (S, M, C) values, or probabilities of the labels.
        validation_SM: Predictions of the scored validation targets.
        history: Learning curves {"train_loss": (E, S), "validation_loss": (E, S)}; empty for linear probes.
        selected: Settings selected on validation: the penalty, or the epoch of each seed, and for a multi-label task
            the threshold of each seed.
        seconds: Wall time of fitting and prediction.
        parameters: The fitted probe, which can predict other proteins; None for models that are not probes.
        test_logits_MC: Logits of the mean probabilities over seeds, for the scored test targets of classes; None for
            values and for models without probabilities.
        validation_logits_MC: The same for the validation targets.
        fold_thresholds_SM: For out-of-fold predictions of a multi-label task, the threshold of each, that of its fold.
    """

    test_SM: np.ndarray
    validation_SM: np.ndarray
    history: dict[str, list[list[float]]] = {}  # noqa: RUF012
    selected: dict[str, float | list[float] | list[int]] = {}  # noqa: RUF012
    seconds: float = 0.0
    parameters: ProbeParameters | None = None
    test_logits_MC: np.ndarray | None = None
    validation_logits_MC: np.ndarray | None = None
    fold_thresholds_SM: np.ndarray | None = None

    @property
    def thresholds(self) -> list[float] | list[np.ndarray]:
        """The probability above which a label of a multi-label task is predicted, for each seed; of folds (M, 1)."""
        if self.fold_thresholds_SM is not None:
            return list(self.fold_thresholds_SM[:, :, None])
        return self.selected.get("threshold") or [DEFAULT_THRESHOLD] * len(self.test_SM)


def read_blocks(features: Features, rows: np.ndarray, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Read ascending rows in blocks.

    Args:
        features: The feature rows.
        rows: Row numbers.
        size: Rows per block. Default: about 4 MB per block.

    Yields:
        The slice of `rows`, and the block (size, D) in float32.

    Raises:
        InputError: A block contains nan or inf. `check_finite` finds the protein.
    """
    size = size or max(1, NUMBERS_PER_BLOCK // features.width)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        block_ND = features.take(part)
        if not math.isfinite(float(block_ND.sum())):
            raise InputError(
                f"{features.name or 'features'}: nan or inf in rows {part[0]} to {part[-1]}", code="features.not-finite"
            )
        yield slice(start, start + len(part)), block_ND


def check_finite(features: Features, targets: ProbeTargets) -> None:
    """Check that all features are finite.

    Args:
        features: The feature rows.
        targets: The targets, for the name of a protein.

    Raises:
        InputError: A row contains nan or inf. The message contains the first such protein.
    """
    size = max(1, NUMBERS_PER_BLOCK // features.width)
    for start in range(0, len(features.values_ND), size):
        rows = np.arange(start, min(start + size, len(features.values_ND)))
        wrong = ~torch.isfinite(features.take(rows)).all(1)
        if wrong.any():
            row = start + int(wrong.int().argmax())
            protein = int(np.searchsorted(features.offsets, row, side="right")) - 1
            raise InputError(
                f"{features.name or 'features'}: the vectors of protein {targets.name(protein)!r} contain nan or inf. "
                "Embed the protein again, in float32 if the values exceed the range of float16.",
                code="features.not-finite",
                source=features.name,
                protein=targets.name(protein),
            )


def compute_column_moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation of each column.

    Args:
        blocks: Blocks (N, D) of rows.

    Returns:
        Mean and standard deviation, each (D,) float32, computed in float64. Constant columns have a deviation of 1.
    """
    count, mean_D, squares_D = 0, 0.0, 0.0
    for block in blocks:
        block = block.to(torch.float64, copy=True)
        size, block_mean = len(block), block.mean(0)
        delta = block_mean - mean_D
        squares_D = squares_D + block.sub_(block_mean).square_().sum(0) + delta.square() * count * size / (count + size)
        mean_D = mean_D + delta * size / (count + size)
        count += size
    scale_D = (squares_D / count).sqrt()
    scale_D[scale_D <= CONSTANT * mean_D.abs()] = 1.0
    return mean_D.float(), scale_D.clamp_min(torch.finfo(torch.float32).tiny).float()
