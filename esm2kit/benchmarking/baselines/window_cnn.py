"""FLIP's one-hot CNN for proteins, computed once per distinct window of five residues.

The layers are a convolution of width 5, ReLU, linear, ReLU, maximum over positions, and linear. Up to the maximum, the
vector of a position depends only on its window. Variants of one protein share most windows, so computing each distinct
window once gives the same result with much less work.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_decimals
from esm2kit.core.progress import Progress
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.tasks.labels import average_seeds, build_class_targets, decode_outputs
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

TAPS = 5
PAD = len(RESIDUE_LETTERS)  # before the first and after the last residue; encoded as zeros
LETTERS = len(RESIDUE_LETTERS) + 1


@dataclass(frozen=True)
class WindowCnnConfig:
    """Settings of the CNN.

    Args:
        channels: Channels of the convolution.
        hidden: Units of the linear layer before the maximum.
        learning_rates: Learning rates of Adam for the convolution, the linear layer and the output.
        weight_decays: Weight decays of the same three layers.
        batch_size: Proteins per update.
        epochs: Maximum number of epochs.
        patience: Epochs without a lower validation loss before training stops.
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
        """Return the settings of Dallago et al. 2021."""
        return cls(1024, 2048, (1e-3, 5e-5, 5e-6), (0.0, 0.05, 0.05), batch_size=256, epochs=100, patience=20)


class Windows:
    """The distinct windows of a task's proteins, and the windows of each protein."""

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
        index_of = {sequence: index for index, sequence in enumerate(coded)}
        self.row = np.array([index_of[sequence] for sequence in sequences])

    def batch(self, proteins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct windows (W,) of some proteins, shared ones first, and indices (B, M) padded with -1."""
        rows = self.row[proteins]
        parts = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        distinct, inverse = np.unique(np.concatenate(parts), return_inverse=True)
        counts = np.array([len(part) for part in parts])
        where_BM = np.full((len(parts), max(1, counts.max())), -1)
        where_BM[np.arange(where_BM.shape[1]) < counts[:, None]] = inverse.reshape(-1) + len(self.shared)
        return np.concatenate([self.shared, distinct]), where_BM


class WindowCnn(nn.Module):
    """The CNN on distinct windows.

    Args:
        config: Settings.
        outputs: Number of outputs.
        generator: Generator of the initial weights.
    """

    def __init__(self, config: WindowCnnConfig, outputs: int, generator: torch.Generator) -> None:
        super().__init__()

        def init_uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound))

        fan_in = TAPS * (LETTERS - 1)
        self.convolution = init_uniform(TAPS * (LETTERS - 1), config.channels, fan_in=fan_in)
        self.bias = init_uniform(config.channels, fan_in=fan_in)
        self.weight_hidden = init_uniform(config.channels, config.hidden, fan_in=config.channels)
        self.bias_hidden = init_uniform(config.hidden, fan_in=config.channels)
        self.weight_out = init_uniform(config.hidden, outputs, fan_in=config.hidden)
        self.bias_out = init_uniform(outputs, fan_in=config.hidden)

    def forward(self, letters_WK: Tensor, where_BM: Tensor, num_shared: int) -> Tensor:
        """Return the outputs (B, C) from the letters of distinct windows and the window indices of each protein."""
        # the product with one-hot rows is a sum of rows of the weight matrix; PAD adds a row of zeros
        weight_KLC = self.convolution.view(TAPS, LETTERS - 1, -1)
        rows = F.pad(weight_KLC, (0, 0, 0, 1)).flatten(0, 1)
        places_WK = letters_WK + LETTERS * torch.arange(TAPS)
        hidden = F.relu(F.embedding_bag(places_WK, rows, mode="sum") + self.bias)
        hidden = F.relu(torch.addmm(self.bias_hidden, hidden, self.weight_hidden))
        # outputs of a ReLU are not negative, so zeros mask padded indices in the maximum
        own = hidden[where_BM.clamp_min(0)].masked_fill((where_BM < 0)[..., None], 0.0).amax(1)
        if num_shared:
            own = torch.maximum(own, hidden[:num_shared].amax(0))
        return torch.addmm(self.bias_out, own, self.weight_out)

    def parameter_groups(self, config: WindowCnnConfig) -> list[dict]:
        """Return the parameter groups for Adam."""
        layers = (
            (self.convolution, self.bias),
            (self.weight_hidden, self.bias_hidden),
            (self.weight_out, self.bias_out),
        )
        settings = zip(layers, config.learning_rates, config.weight_decays, strict=True)
        return [{"params": list(layer), "lr": rate, "weight_decay": decay} for layer, rate, decay in settings]


def fit_window_cnn(data: TaskData, config: WindowCnnConfig, seeds: tuple[int, ...]) -> Fitted:
    """Train one CNN per seed with early stopping on validation, and predict validation and test.

    Args:
        data: The task.
        config: Settings.
        seeds: One seed per network.

    Returns:
        Predictions, learning curves and the epoch of each seed.

    Raises:
        InputError: The validation loss of a seed is never finite.
    """
    windows = Windows(data.sequences)
    letters = torch.from_numpy(windows.letters_UK)
    y_train = data.targets[data.rows("train")]
    value = data.task.target == "value"
    scale = TargetScale.from_values(y_train) if value else TargetScale()
    targets = (
        torch.from_numpy(scale.standardise(data.targets)).float()
        if value
        else build_class_targets(data.targets, data.task)
    )

    def outputs(model: WindowCnn, proteins: np.ndarray) -> Tensor:
        distinct, where_BM = windows.batch(proteins)
        return model(letters[torch.from_numpy(distinct)], torch.from_numpy(where_BM), len(windows.shared))

    def loss_of(out: Tensor, proteins: np.ndarray) -> Tensor:
        y = targets[torch.from_numpy(proteins)]
        if data.task.columns:
            measured = y.isfinite()
            return ((out - y.nan_to_num()) * measured).square().sum() / measured.sum().clamp(min=1)
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
    progress = Progress(logger, "one-hot CNN:", "epochs", config.epochs * len(seeds))
    for seed in seeds:
        model = WindowCnn(config, data.task.num_outputs, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.parameter_groups(config))
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
                    f"one-hot CNN, seed {seed}: the validation loss is {held}. Choose lower learning_rates, or "
                    "omit onehot_cnn from baselines.",
                    code="probe.diverged",
                    probe="onehot_cnn",
                    seeds=[seed],
                    set="validation",
                )
            if held < best:
                best, best_epoch, kept = held, epoch, {k: v.clone() for k, v in model.state_dict().items()}
            if epoch - best_epoch >= config.patience:
                break
            note = f"seed {seed}, validation loss {format_decimals(held)}, with early stopping"
            progress.update(len(tests) * config.epochs + epoch, note)
        model.load_state_dict(kept)
        for sink, set_name in ((tests, "test"), (validations, "validation")):
            sink.append(predict(model, set_name))
        epochs.append(best_epoch)
        history["train_loss"].append([train for train, _ in curves])
        history["validation_loss"].append([held for _, held in curves])
    progress.close()
    outputs_SMC = [torch.stack(each) for each in (tests, validations)]
    predicted = [decode_outputs(each, data.task).numpy() for each in outputs_SMC]
    if value:
        return Fitted(*map(scale.restore, predicted), _pad_curves(history), {"epoch": epochs})
    logits = [average_seeds(each, data.task).numpy() for each in outputs_SMC]
    return Fitted(*predicted, _pad_curves(history), {"epoch": epochs}, 0.0, None, *logits)


def _pad_curves(history: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Repeat the last value of seeds that stopped early, and transpose the curves to (E, S)."""
    longest = max(len(curve) for curve in history["train_loss"])
    padded = {
        name: [curve + curve[-1:] * (longest - len(curve)) for curve in curves] for name, curves in history.items()
    }
    return {name: [list(epoch) for epoch in zip(*curves, strict=True)] for name, curves in padded.items()}
