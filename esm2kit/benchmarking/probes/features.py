"""Feature rows and what a probe makes of them: packed protein after protein, in memory or read where they lie."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.tasks.data import SET_NAMES, TaskData
from esm2kit.tasks.task import Task

NUMBERS_PER_BLOCK = 1 << 20  # 4 MB as float32, whatever the width
BYTES_PER_READ = 1 << 20


class FileRows:
    """Rows that lie in a file, a stretch a protein, and are read when they are asked for.

    Read, not memory-mapped: a batch costs one call a protein instead of a page fault every few rows, and the process
    holds the batch alone, while the system keeps of the file what memory it can spare. The file is open until `close`:
    another one put in its place meanwhile has its rows elsewhere.

    Args:
        path: the file.
        starts_P: the byte at which each protein's rows begin.
        offsets: (P + 1,) rows of protein i are rows offsets[i] to offsets[i + 1].
        width: numbers a row.
        dtype: of the file's numbers, float32 or float16.
    """

    def __init__(self, path: Path, starts_P: np.ndarray, offsets: np.ndarray, width: int, dtype: np.dtype) -> None:
        self.path, self.starts_P, self.offsets, self.width, self.dtype = path, starts_P, offsets, width, dtype
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open while rows are read)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.width

    def read(self, start: int, stop: int, out_ND: Tensor) -> None:
        """Rows start to stop into a contiguous float32 tensor.

        Raises: InputError if the file ends before them.
        """
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

    def _fill(self, wanted: memoryview, place: int) -> None:
        """Bytes of the file from `place` on, by position: readers do not share one that another may move."""
        while wanted:
            got = os.preadv(self._file.fileno(), [wanted[:BYTES_PER_READ]], place)
            if not got:
                raise InputError(
                    f"{self.path} ends before its last rows: embed again", code="embeddings.short", path=self.path
                )
            wanted, place = wanted[got:], place + got


@dataclass(frozen=True)
class Features:
    """Feature rows, packed protein after protein.

    Args:
        values_ND: any float type, in memory, memory-mapped, or in a file.
        offsets: (P + 1,) rows of protein i are values_ND[offsets[i]:offsets[i + 1]].
        name: for the report.
    """

    values_ND: np.ndarray | FileRows
    offsets: np.ndarray
    name: str = ""

    @property
    def width(self) -> int:
        return self.values_ND.shape[1]

    def close(self) -> None:
        """Let go of the file, if the rows lie in one."""
        if isinstance(self.values_ND, FileRows):
            self.values_ND.close()

    def read(self, start: int, stop: int, out_ND: Tensor) -> None:
        """Rows start to stop into a contiguous float32 tensor."""
        if isinstance(self.values_ND, FileRows):
            self.values_ND.read(start, stop, out_ND)
        else:
            out_ND.copy_(self._tensor()[start:stop])

    def take(self, rows: np.ndarray) -> Tensor:
        """(len(rows), D) float32: some rows, ascending in each run that is to be fast.

        Never to be written to: consecutive rows in memory come as a view.
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
        """A view, never written to, so a read-only memory map is fine."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.values_ND)


@dataclass(frozen=True)
class ProbeTargets:
    """What a probe learns to predict, and the sets it is fitted, selected and scored on.

    Args:
        packed: one target a protein, or one a residue, protein after protein; classes are int64, values float64.
        scored: False where a target does not count, packed alike.
        offsets: (P + 1,) protein i's targets are packed[offsets[i]:offsets[i + 1]].
        proteins: set name -> its proteins, ascending; a set that is not named is empty.
        task: what the targets mean: level, target, labels.
        ids: names of the proteins, for messages.
    """

    packed: np.ndarray
    scored: np.ndarray
    offsets: np.ndarray
    proteins: Mapping[str, np.ndarray]
    task: Task
    ids: Sequence[str] = ()

    @classmethod
    def from_task(cls, data: TaskData) -> Self:
        """The targets of a task."""
        proteins = {name: data.rows(name) for name in SET_NAMES}
        return cls(data.targets, data.scored, data.offsets, proteins, data.task, data.ids)

    def rows(self, set_name: str) -> np.ndarray:
        """Indices of a set's targets that count."""
        member = np.zeros(len(self.offsets) - 1, dtype=bool)
        member[self.proteins.get(set_name, [])] = True
        return np.flatnonzero(np.repeat(member, np.diff(self.offsets)) & self.scored)

    def name(self, protein: int) -> str:
        """A protein's id, or its number from 1."""
        return self.ids[protein] if len(self.ids) else str(protein + 1)


class Fitted(NamedTuple):
    """A fitted probe's predictions.

    Args:
        test_SM: for the test targets that count, one row a seed; classes int64, values float64.
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


def read_blocks(features: Features, rows: np.ndarray, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of ascending rows as float32: (where in `rows`, block).

    Raises: InputError for nan or inf among them; `check_finite` says where.
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
    """Refuse features that hold nan or inf; reads all of them.

    Raises:
        InputError: names the first such protein.
    """
    size = max(1, NUMBERS_PER_BLOCK // features.width)
    for start in range(0, len(features.values_ND), size):
        rows = np.arange(start, min(start + size, len(features.values_ND)))
        wrong = ~torch.isfinite(features.take(rows)).all(1)
        if wrong.any():
            row = start + int(wrong.int().argmax())
            protein = int(np.searchsorted(features.offsets, row, side="right")) - 1
            raise InputError(
                f"{features.name or 'features'}: the vectors of protein {targets.name(protein)!r} hold nan or inf; "
                "embed it again, in float32 if float16 cannot hold its numbers",
                code="features.not-finite",
                source=features.name,
                protein=targets.name(protein),
            )


def compute_column_moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column over blocks (N, D) of rows.

    Returns: two (D,) float32, worked out in float64; a deviation of 1 where a column does not vary.
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
    scale_D[scale_D < 1e-8] = 1.0
    return mean_D.float(), scale_D.float()
