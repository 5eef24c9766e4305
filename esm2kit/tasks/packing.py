"""Pack the proteins of a labelled task into batches of tokens and labels.

Training samples are pure functions of (seed, epoch, protein). Batches for validation and prediction have a token
budget, and windows cover all residues of a long protein.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from esm2kit.core.files import atomic_path
from esm2kit.core.rng import GOLDEN, mix, random_below, stream_key
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.batching import split_by_tokens
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.labels import build_class_targets
from esm2kit.tasks.scaling import TargetScale, choose_scale
from esm2kit.tasks.task_data import TaskData

_SAMPLE_STREAM = 201
# Residues that adjacent windows of a long protein share.
WINDOW_OVERLAP = 256


class Window(NamedTuple):
    """Residues [start, stop) of a protein, and the key of its dropout masks."""

    protein: int
    start: int
    stop: int
    key: int = 0


class LabelledBatch(NamedTuple):
    """Packed sequences with their labels, the input of one forward pass in training.

    Args:
        tokens_N: token ids.
        num_tokens: number of tokens per sequence.
        keys_B: dropout keys.
        rows_M: indices of the model's outputs that are scored.
        targets_M: labels of these outputs, (M, L) for L binary labels or values.
        weights_M: weights of the labels, same shape.
        proteins: indices of the proteins in the task, for error messages.
        label_weight: denominator of the loss, the sum of the label weights; a number of the host, because reading it
            from a GPU would wait for the GPU.
    """

    tokens_N: Tensor
    num_tokens: list[int]
    keys_B: Tensor
    rows_M: Tensor
    targets_M: Tensor
    weights_M: Tensor
    proteins: list[int]
    label_weight: float


class EvaluationBatch(NamedTuple):
    """Packed windows to evaluate. Output row i is stored in slot i of the set's outputs; without slots, none is."""

    tokens_N: Tensor
    num_tokens: list[int]
    slots_M: Tensor


class Labels(NamedTuple):
    """Targets of a task in the form that the loss requires.

    Args:
        targets: (N,) int64 classes or float32 values, standardised by `scale`, or (N, L) binary labels or values.
        weights: same shape or (N,): 1, or class weights; 0 for a missing one of several values.
        scale: mean and standard deviation of the train values; 0 and 1 if the values are not scaled.
    """

    targets: Tensor
    weights: Tensor
    scale: TargetScale = TargetScale()


def build_labels(data: TaskData, scale_targets: bool, class_weights: bool) -> Labels:
    """Build the targets for training.

    Args:
        data: the task.
        scale_targets: standardise values with the mean and standard deviation of train.
        class_weights: weight each class by labels / (classes x labels of that class), counted on train.

    Returns:
        Targets and weights, one per protein or residue.

    Raises:
        InputError: the values are not scaled and exceed the range or the precision of float32.
    """
    train = data.target_rows("train")
    if data.task.target == "value":
        scale = choose_scale(data.targets[train], scale_targets)
        scaled = torch.from_numpy(scale.standardise(data.targets)).float()
        if data.task.columns:
            return Labels(scaled.nan_to_num(), scaled.isfinite().float(), scale)
        return Labels(scaled, torch.ones(len(scaled)), scale)
    targets = build_class_targets(data.targets, data.task)
    if not class_weights:
        return Labels(targets, torch.ones(targets.shape))
    if data.task.binary_labels:
        share_L = targets[train].mean(0).clamp(1e-6, 1 - 1e-6)
        return Labels(targets, torch.where(targets > 0, 0.5 / share_L, 0.5 / (1 - share_L)))
    counts_K = torch.bincount(targets[train], minlength=len(data.task.labels))
    present = counts_K > 0
    weights_K = torch.where(present, len(train) / (present.sum() * counts_K.clamp(min=1)), 0.0)
    return Labels(targets, weights_K.float()[targets])


def load_tokens(sequences: Sequence[str], cache: Path, sha256: str) -> np.ndarray:
    """Load the token ids of all sequences from a file in the cache, which is created if it does not exist.

    The ranks are not synchronised. Each rank that does not find the file writes the same content.

    Args:
        sequences: amino-acid sequences.
        cache: folder of the file.
        sha256: of the task, part of the file name.

    Returns:
        (N,) uint8 token ids without BOS and EOS, concatenated and memory-mapped.
    """
    tokens = Path(cache) / f"tokens-{sha256[:16]}.npy"
    if not tokens.is_file():
        with atomic_path(tokens) as part, open(part, "wb") as file:
            np.save(file, encode("".join(sequences)))
    return np.load(tokens, mmap_mode="r")


class LabelledProteins:
    """Tokens and labels of a task, and the batches built from them.

    Args:
        data: the task.
        labels: its targets.
        cache: folder of the token file.
        max_residues: maximum length of a window.
    """

    def __init__(self, data: TaskData, labels: Labels, cache: Path, max_residues: int) -> None:
        self.data, self.labels, self.max_residues = data, labels, max_residues
        self.tokens = load_tokens(data.sequences, cache, data.sha256)
        self.starts = np.concatenate([[0], np.cumsum(data.num_residues)])
        self.per_residue = data.task.level == "residue"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path of the token file instead of its content, for the processes that prepare batches."""
        return self.__dict__ | {"tokens": str(self.tokens.filename)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"tokens": np.load(state["tokens"], mmap_mode="r")})

    def sample(self, seed: int, epoch: int, protein: int) -> Window:
        """Sample the window of a protein in an epoch: the protein, or max_residues from a random start."""
        key = stream_key(seed, epoch, protein, _SAMPLE_STREAM)
        residues = int(self.data.num_residues[protein])
        if residues <= self.max_residues:
            return Window(protein, 0, residues, key)
        start = random_below(mix(key + GOLDEN), residues - self.max_residues + 1)
        return Window(protein, start, start + self.max_residues, key)

    def windows(self, proteins: np.ndarray) -> list[Window]:
        """Split proteins into windows that cover all their residues."""
        windowing = Windowing(self.max_residues, min(WINDOW_OVERLAP, self.max_residues // 2), 0)
        sizes = self.data.num_residues
        return [Window(int(row), *span) for row in proteins for span in windowing.split(int(sizes[row]))]

    def pack(self, windows: Sequence[Window]) -> tuple[Tensor, list[int]]:
        """Concatenate the token ids of windows, each with BOS and EOS, and return them with the tokens per window."""
        parts = []
        for window in windows:
            first = self.starts[window.protein]
            parts += [[BOS_IDX], self.tokens[first + window.start : first + window.stop], [EOS_IDX]]
        tokens_N = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return tokens_N, [window.stop - window.start + 2 for window in windows]

    def batch(self, windows: Sequence[Window]) -> LabelledBatch:
        """Pack windows together with their scored labels."""
        tokens_N, num_tokens = self.pack(windows)
        if self.per_residue:
            spans = [self.starts[window.protein] + np.arange(window.start, window.stop) for window in windows]
            places = np.concatenate(spans)
        else:
            places = np.array([window.protein for window in windows])
        rows = np.flatnonzero(self.data.scored[places])
        chosen = torch.from_numpy(places[rows])
        keys = np.array([window.key for window in windows], dtype=np.uint64).astype(np.int64)
        weights_M = self.labels.weights[chosen]
        summed = (weights_M if weights_M.ndim == 1 else weights_M.mean(1)).sum(dtype=torch.float64)
        return LabelledBatch(
            tokens_N,
            num_tokens,
            torch.from_numpy(keys),
            torch.from_numpy(rows),
            self.labels.targets[chosen],
            weights_M,
            [window.protein for window in windows],
            summed.item(),
        )


def batch_windows(windows: Sequence[Window], tokens_per_batch: int) -> list[list[Window]]:
    """Group windows into batches of at most `tokens_per_batch` tokens, longest first; longer windows are separate."""
    batches = split_by_tokens([window.stop - window.start + 2 for window in windows], tokens_per_batch)
    return [[windows[position] for position in batch] for batch in batches]


class EvaluationBatches(Dataset):
    """Batches that cover all residues of a set, with a token budget per rank; the ranks share each batch."""

    def __init__(
        self, proteins: LabelledProteins, set_name: str, tokens_per_batch: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.proteins, self.rank, self.ranks = proteins, rank, ranks
        rows = proteins.data.rows(set_name)
        counts = proteins.data.num_residues[rows] if proteins.per_residue else np.ones(len(rows), np.int64)
        self.first_slot = dict(zip(rows.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
        self.num_slots = int(counts.sum())
        self.batches = batch_windows(proteins.windows(rows), tokens_per_batch * ranks)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> EvaluationBatch:
        share = self.batches[index][self.rank :: self.ranks]
        if not share:  # the ranks of a sharded model need equal numbers of forward passes: run one, discard it
            return EvaluationBatch(*self.proteins.pack(self.batches[index][:1]), torch.empty(0, dtype=torch.int64))
        first, per_residue = self.first_slot, self.proteins.per_residue
        slots = [first[w.protein] + (np.arange(w.start, w.stop) if per_residue else np.zeros(1, int)) for w in share]
        return EvaluationBatch(*self.proteins.pack(share), torch.from_numpy(np.concatenate(slots)))
