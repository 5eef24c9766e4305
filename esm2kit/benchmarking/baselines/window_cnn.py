"""FLIP's one-hot CNN for proteins, computed once for every distinct window instead of once for every position.

Convolution of 5 rows, ReLU, linear, ReLU, maximum over positions, linear: up to the maximum, a position's vector
depends on its five letters alone. Variants of one protein share nearly all their windows: the same numbers, for a small
part of the work.
"""

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.labels import build_class_targets, decode_outputs

logger = logging.getLogger(__name__)

TAPS = 5
PAD = len(RESIDUE_LETTERS)  # before the first and after the last residue: a row of zeros
LETTERS = len(RESIDUE_LETTERS) + 1
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class WindowCnnConfig:
    """Settings of the CNN.

    Args:
        channels: of the convolution.
        hidden: of the linear layer before the maximum.
        learning_rates: Adam's, of convolution, linear layer and output.
        weight_decays: of the same.
        batch_size: proteins a step.
        epochs: at most.
        patience: epochs without a better validation loss.
    """

    channels: int = 64
    hidden: int = 128
    learning_rates: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    weight_decays: tuple[float, float, float] = (0.0, 0.0, 0.0)
    batch_size: int = 64
    epochs: int = 30
    patience: int = 5

    @classmethod
    def flip2021(cls) -> "WindowCnnConfig":
        """Dallago et al. 2021."""
        return cls(1024, 2048, (1e-3, 5e-5, 5e-6), (0.0, 0.05, 0.05), batch_size=256, epochs=100, patience=20)


class Windows:
    """The distinct windows of a task's proteins, and which protein holds which."""

    def __init__(self, sequences: list[str]) -> None:
        table = np.full(256, PAD, dtype=np.int64)
        table[np.frombuffer(RESIDUE_LETTERS.encode(), np.uint8)] = np.arange(PAD)
        coded: dict[str, np.ndarray] = {}
        for sequence in sequences:
            if sequence not in coded:
                padded = np.pad(table[np.frombuffer(sequence.encode(), np.uint8)], TAPS // 2, constant_values=PAD)
                windows = np.lib.stride_tricks.sliding_window_view(padded, TAPS)
                coded[sequence] = np.unique(windows @ LETTERS ** np.arange(TAPS))
        codes, owner = (
            np.concatenate(list(coded.values())),
            np.repeat(np.arange(len(coded)), [len(c) for c in coded.values()]),
        )
        unique, ids = np.unique(codes, return_inverse=True)
        self.letters_UK = unique[:, None] // LETTERS ** np.arange(TAPS) % LETTERS
        shared = np.bincount(ids) == len(coded)
        self.shared = np.flatnonzero(shared)
        own = ~shared[ids]
        self.ids = ids[own]
        counts = np.bincount(owner[own], minlength=len(coded))
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        place = {sequence: index for index, sequence in enumerate(coded)}
        self.row = np.array([place[sequence] for sequence in sequences])

    def batch(self, proteins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the distinct windows of some proteins (W), shared ones first, and (B, M) places in them, -1 beyond."""
        rows = self.row[proteins]
        parts = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        distinct, inverse = np.unique(np.concatenate(parts), return_inverse=True)
        counts = np.array([len(part) for part in parts])
        where_BM = np.full((len(parts), max(1, counts.max())), -1)
        where_BM[np.arange(where_BM.shape[1]) < counts[:, None]] = inverse.reshape(-1) + len(self.shared)
        return np.concatenate([self.shared, distinct]), where_BM


class WindowCnn(nn.Module):
    """The network over windows."""

    def __init__(self, config: WindowCnnConfig, outputs: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound))

        fan_in = TAPS * (LETTERS - 1)
        self.convolution = drawn(TAPS * (LETTERS - 1), config.channels, fan_in=fan_in)
        self.bias = drawn(config.channels, fan_in=fan_in)
        self.weight_hidden = drawn(config.channels, config.hidden, fan_in=config.channels)
        self.bias_hidden = drawn(config.hidden, fan_in=config.channels)
        self.weight_out = drawn(config.hidden, outputs, fan_in=config.hidden)
        self.bias_out = drawn(outputs, fan_in=config.hidden)

    def forward(self, letters_WK: Tensor, where_BM: Tensor, num_shared: int) -> Tensor:
        """(B, outputs); letters of the distinct windows, and each protein's places among them."""
        # A product with one-hot rows is a sum of rows of the matrix; PAD has no row of its own.
        weight_KLC = self.convolution.view(TAPS, LETTERS - 1, -1)
        rows = F.pad(weight_KLC, (0, 0, 0, 1)).flatten(0, 1)
        places_WK = letters_WK + LETTERS * torch.arange(TAPS)
        hidden = F.relu(F.embedding_bag(places_WK, rows, mode="sum") + self.bias)
        hidden = F.relu(torch.addmm(self.bias_hidden, hidden, self.weight_hidden))
        # After a ReLU nothing is below zero, so zero stands for "no window".
        own = hidden[where_BM.clamp_min(0)].masked_fill((where_BM < 0)[..., None], 0.0).amax(1)
        if num_shared:
            own = torch.maximum(own, hidden[:num_shared].amax(0))
        return torch.addmm(self.bias_out, own, self.weight_out)

    def groups(self, config: WindowCnnConfig) -> list[dict]:
        """Parameter groups for Adam."""
        layers = (
            (self.convolution, self.bias),
            (self.weight_hidden, self.bias_hidden),
            (self.weight_out, self.bias_out),
        )
        settings = zip(layers, config.learning_rates, config.weight_decays, strict=True)
        return [{"params": list(layer), "lr": rate, "weight_decay": decay} for layer, rate, decay in settings]


def fit_window_cnn(data: TaskData, config: WindowCnnConfig, seeds: tuple[int, ...]) -> Fitted:
    """Train one CNN a seed, stop on validation, predict test once.

    Raises: InputError if a seed's validation loss is no number from the first epoch on.
    """
    windows = Windows(data.sequences)
    letters = torch.from_numpy(windows.letters_UK)
    y_train = data.targets[data.rows("train")]
    value = data.task.target == "value"
    centre, spread = (float(y_train.mean()), float(y_train.std()) or 1.0) if value else (0.0, 1.0)
    targets = (
        torch.from_numpy((data.targets - centre) / spread).float()
        if value
        else build_class_targets(data.targets, data.task)
    )

    def outputs(model: WindowCnn, proteins: np.ndarray) -> Tensor:
        distinct, where_BM = windows.batch(proteins)
        return model(letters[torch.from_numpy(distinct)], torch.from_numpy(where_BM), len(windows.shared))

    def loss_of(out: Tensor, proteins: np.ndarray) -> Tensor:
        y = targets[torch.from_numpy(proteins)]
        if value:
            return (out[:, 0] - y).square().mean()
        return F.binary_cross_entropy_with_logits(out, y) if data.task.binary_labels else F.cross_entropy(out, y)

    def predict(model: WindowCnn, set_name: str) -> Tensor:
        rows = data.rows(set_name)
        with torch.no_grad():
            return torch.cat(
                [outputs(model, rows[i : i + config.batch_size]) for i in range(0, len(rows), config.batch_size)]
            )

    history: dict[str, list[list[float]]] = {"train_loss": [], "validation_loss": []}
    tests, validations, epochs = [], [], []
    told = time.perf_counter()
    for seed in seeds:
        model = WindowCnn(config, data.task.num_outputs, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.groups(config))
        order = np.random.default_rng(seed)
        best, best_epoch, kept, curves = math.inf, 0, None, []
        for epoch in range(1, config.epochs + 1):
            shuffled, losses = order.permutation(data.rows("train")), []
            for start in range(0, len(shuffled), config.batch_size):
                proteins = shuffled[start : start + config.batch_size]
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(outputs(model, proteins), proteins)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            held = float(loss_of(predict(model, "validation"), data.rows("validation")))
            curves.append((float(np.mean(losses)), held))
            if kept is None and not math.isfinite(held):
                raise InputError(
                    f"one-hot CNN, seed {seed}: validation loss {held} is no number; lower learning_rates, or leave "
                    "onehot_cnn out of baselines",
                    code="probe.diverged",
                    probe="onehot_cnn",
                    seeds=[seed],
                    set="validation",
                )
            if held < best:
                best, best_epoch, kept = held, epoch, {k: v.clone() for k, v in model.state_dict().items()}
            if epoch - best_epoch >= config.patience:
                break
            if time.perf_counter() - told > SECONDS_BETWEEN_LINES:
                told = time.perf_counter()
                logger.info(
                    "one-hot CNN: seed %d, epoch %d of at most %d, validation loss %.4f",
                    seed,
                    epoch,
                    config.epochs,
                    held,
                )
        model.load_state_dict(kept)
        for sink, set_name in ((tests, "test"), (validations, "validation")):
            decided = decode_outputs(predict(model, set_name), data.task).numpy()
            sink.append(decided.astype(np.float64) * spread + centre if value else decided)
        epochs.append(best_epoch)
        history["train_loss"].append([train for train, _ in curves])
        history["validation_loss"].append([held for _, held in curves])
    return Fitted(np.stack(tests), np.stack(validations), _epochs_first(history), {"epoch": epochs})


def _epochs_first(history: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Seeds stop at different epochs; a stopped seed repeats its last value, so that curves are (E, S)."""
    longest = max(len(curve) for curve in history["train_loss"])
    padded = {
        name: [curve + curve[-1:] * (longest - len(curve)) for curve in curves] for name, curves in history.items()
    }
    return {name: [list(epoch) for epoch in zip(*curves, strict=True)] for name, curves in padded.items()}
