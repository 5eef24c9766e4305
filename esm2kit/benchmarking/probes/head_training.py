"""Train the heads of all seeds together, with one batch order and independent early stopping."""

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.early_stopping import BestWeights, check_finite_loss
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets, compute_column_moments, read_blocks
from esm2kit.benchmarking.probes.heads import HEADS, FeatureBatch, SeededHead
from esm2kit.benchmarking.probes.parameters import ProbeParameters
from esm2kit.core.numbers import format_decimals
from esm2kit.core.progress import Progress
from esm2kit.sequences.batching import split_within_budget
from esm2kit.tasks.labels import average_seeds, build_class_targets, decode_outputs
from esm2kit.tasks.scaling import TargetScale, choose_scale
from esm2kit.tasks.task import Task

logger = logging.getLogger(__name__)

# All seeds share one batch order. A seed determines initial weights and dropout.
ORDER_SEED = 0


def _row_indices(offsets: np.ndarray, proteins: np.ndarray) -> np.ndarray:
    """Return the row indices of some proteins, protein after protein."""
    return np.concatenate([np.arange(offsets[protein], offsets[protein + 1]) for protein in proteins])


class _BatchReader:
    """Reads batches of feature rows and their targets for one task."""

    def __init__(
        self,
        features: Features,
        targets: ProbeTargets,
        config: ProbeConfig,
        head: type[SeededHead],
        device: torch.device,
    ) -> None:
        self.features, self.offsets, self.task = features, features.offsets, targets.task
        self.proteins, self.target_offsets = targets.proteins, targets.offsets
        self.sizes = np.diff(features.offsets)
        self.head, self.device, self.budget = head, device, config.row_budget
        self.one_row_each = bool((self.sizes == 1).all()) and head.radius == 0 and not head.per_protein
        train_rows = _row_indices(self.offsets, self.proteins["train"])
        moments = (
            compute_column_moments(block for _, block in read_blocks(features, train_rows))
            if config.standardize
            else None
        )
        self.moments = tuple(moment.to(device) for moment in moments) if moments else None
        if self.task.target == "class":
            self.targets = build_class_targets(targets.packed, self.task).to(device)
        else:
            self.scale = choose_scale(targets.packed[targets.rows("train")], config.scale_targets)
            self.targets = torch.from_numpy(self.scale.standardise(targets.packed)).float().to(device)
        self.scored = targets.scored
        self.num_scored = np.diff(np.concatenate([[0], np.cumsum(targets.scored)])[targets.offsets])
        if self.task.columns:  # values, of which some may be missing
            self.num_scored = np.isfinite(targets.packed).sum(1)
        self.buffer_ND = torch.empty(0, features.width)

    def split(self, proteins: np.ndarray) -> Iterator[np.ndarray]:
        """Split proteins into parts of at most `row_budget` rows."""
        return (proteins[part] for part in split_within_budget(self.sizes[proteins], self.budget))

    def batch(self, proteins: np.ndarray) -> FeatureBatch:
        """Return the feature rows of some proteins on the device. On the CPU the next batch overwrites them."""
        if self.one_row_each:
            x_ND = self.features.take(self.offsets[proteins]).to(self.device)
            if self.moments is not None:
                x_ND = (x_ND - self.moments[0]).div_(self.moments[1])  # not in place: x may be a view of the features
            return FeatureBatch(x_ND, None, [])
        gap, counts = self.head.radius, self.sizes[proteins]
        sizes = [gap] * (2 * len(counts) + 1)
        sizes[1::2] = counts.tolist()
        # one buffer for all batches, because page faults of newly allocated memory cost more than the copy
        if len(self.buffer_ND) < sum(sizes):
            self.buffer_ND = torch.empty(max(sum(sizes), self.budget), self.features.width)
        x_ND, position = self.buffer_ND[: sum(sizes)], 0
        for place, size in enumerate(sizes):
            rows_ND = x_ND[position : position + size]
            if place % 2:
                start = int(self.offsets[proteins[place // 2]])
                self.features.read(start, start + size, rows_ND)
            else:
                rows_ND.zero_()
            position += size
        is_real_N = torch.from_numpy(np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)).to(self.device)
        x_ND = x_ND.to(self.device)
        if self.moments is not None:
            x_ND.sub_(self.moments[0]).div_(self.moments[1]).mul_(is_real_N[:, None])
        return FeatureBatch(x_ND, is_real_N, sizes)

    def outputs(self, model: SeededHead, proteins: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the outputs (S, M, C) for the scored targets of some proteins, and these targets (M,)."""
        batch = self.batch(proteins)
        outputs = model(batch)
        indices = _row_indices(self.target_offsets, proteins)
        scored = self.scored[indices]
        places = np.flatnonzero(scored)
        if not self.head.per_protein and batch.is_real_N is not None and batch.sizes[0]:
            # shift by the gap rows before each protein
            places = places + self.head.radius * (1 + np.repeat(np.arange(len(proteins)), batch.sizes[1::2]))[scored]
        if len(places) < outputs.shape[1]:
            outputs = outputs.index_select(1, torch.from_numpy(places).to(self.device))
        return outputs, self.targets[torch.from_numpy(indices[scored]).to(self.device)]


def _sum_losses(outputs_SMC: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return the summed loss of each seed (S,)."""
    num_seeds = outputs_SMC.shape[0]
    if task.columns:
        measured_MC = targets.isfinite()
        return ((outputs_SMC - targets.nan_to_num()) * measured_MC).square().sum((1, 2))
    if task.target == "value":
        return (outputs_SMC[..., 0] - targets).square().sum(1)
    if task.binary_labels:
        expanded = targets.expand(num_seeds, *targets.shape)
        losses = F.binary_cross_entropy_with_logits(outputs_SMC, expanded, reduction="none")
        return losses.sum((1, 2)) / len(task.binary_labels)
    flat = F.cross_entropy(outputs_SMC.flatten(0, 1), targets.repeat(num_seeds), reduction="none")
    return flat.view(num_seeds, -1).sum(1)


def _predict(
    rows: _BatchReader, model: SeededHead, set_name: str, logits: list[Tensor] | None = None
) -> tuple[np.ndarray, Tensor]:
    """Return the predictions (S, M) for the targets of a set, and the mean loss of each seed (S,).

    The logits of the mean probabilities over seeds are appended to `logits`.
    """
    model.eval()
    total, count, decided = torch.zeros(len(model.seeds), device=rows.device), 0, []
    with torch.no_grad():
        for part in rows.split(rows.proteins[set_name]):
            outputs, targets = rows.outputs(model, part)
            total += _sum_losses(outputs, targets, rows.task)
            count += int(rows.num_scored[part].sum())
            decided.append(decode_outputs(outputs, rows.task))
            if logits is not None:
                logits.append(average_seeds(outputs, rows.task).cpu())
    predicted = torch.cat(decided, dim=1).cpu().numpy()
    if rows.task.target == "value":
        predicted = rows.scale.restore(predicted)
    return predicted, total / count


def fit_head(
    features: Features,
    targets: ProbeTargets,
    config: ProbeConfig,
    seeds: tuple[int, ...],
    device: torch.device,
    num_sources: int = 1,
) -> Fitted:
    """Train one head per seed in a single pass; see `esm2kit.benchmarking.probes.fit.fit_probe`.

    A seed that stops early keeps its best weights while the others continue, so its result does not depend on them.

    Args:
        features: The feature rows.
        targets: Targets and sets.
        config: The head and its settings.
        seeds: One seed per head.
        device: Device for training.
        num_sources: Number of features of equal width that `features` has side by side, each with FNNs of its own.

    Returns:
        Predictions, learning curves and the epoch of each seed.

    Raises:
        InputError: The loss of a seed is never finite on validation, or is not finite with the weights it keeps.
    """
    kind = HEADS[config.probe]
    rows = _BatchReader(features, targets, config, kind, device)
    width = features.width // num_sources
    seeds = seeds * num_sources
    model = kind(seeds, width, targets.task.num_outputs, config.hidden or width, config.dropout, device)
    optimizer = Adam(model.parameters(), config)
    best = BestWeights(model, config)
    history: dict[str, list[list[float]]] = {"train_loss": [], "validation_loss": []}
    train = targets.proteins["train"]
    progress = Progress(logger, f"{config.probe}:", "epochs", config.epochs)
    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng((ORDER_SEED, epoch)).permutation(train)
        history["train_loss"].append(_train_epoch(rows, model, optimizer, order, config.batch_size))
        _, loss_S = _predict(rows, model, "validation")
        history["validation_loss"].append(loss_S.tolist())
        if not best.update(loss_S, epoch):
            break
        may_stop = "" if config.patience is None else ", with early stopping"
        progress.update(epoch, f"validation loss {format_decimals(float(loss_S.mean()))}{may_stop}")
    progress.close()
    best.restore()
    predicted, logits = {}, {}
    for set_name in ("test", "validation"):
        parts: list[Tensor] | None = [] if targets.task.target == "class" else None
        predicted[set_name], loss_S = _predict(rows, model, set_name, parts)
        check_finite_loss(loss_S, config, seeds, set_name)
        logits[f"{set_name}_logits_MC"] = torch.cat(parts).numpy() if parts else None
    parameters = _collect_parameters(rows, model, config.probe, config.hidden or width)
    selected = {"epoch": best.kept_epoch_S.tolist()}
    return Fitted(predicted["test"], predicted["validation"], history, selected, 0.0, parameters, **logits)


def _collect_parameters(rows: _BatchReader, model: SeededHead, probe: str, hidden: int) -> ProbeParameters:
    """Return what the trained heads predict with, on the CPU."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if rows.moments is not None:
        tensors |= {"shift_D": rows.moments[0].cpu(), "scale_D": rows.moments[1].cpu()}
    scale = rows.scale if rows.task.target == "value" else TargetScale()
    return ProbeParameters(probe, tensors, scale, hidden, model.seeds)


class Adam:
    """torch's fused Adam, or its AdamW with AMSGrad, called as a function.

    The function computes the same as `torch.optim.Adam(fused=True)`. The class would load torch's compiler, which
    takes one of the 2.5 seconds of a probe on gb1.

    Args:
        parameters: Parameters to update. A step clears their gradients.
        config: Learning rate, weight decay and optimizer.
    """

    def __init__(self, parameters: Iterable[Tensor], config: ProbeConfig) -> None:
        self.parameters, self.config = list(parameters), config
        self.amsgrad = config.optimizer == "adamw_amsgrad"
        self.means, self.squares, largest = ([torch.zeros_like(p) for p in self.parameters] for _ in range(3))
        self.largest = largest if self.amsgrad else []
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor] | None = None) -> None:
        """Update the parameters.

        Args:
            gradients: One per parameter. None uses those that the parameters have.
        """
        gradients = gradients or [parameter.grad for parameter in self.parameters]
        adam(
            self.parameters, gradients, self.means, self.squares, self.largest, self.steps, fused=True,
            decoupled_weight_decay=self.amsgrad, amsgrad=self.amsgrad, beta1=0.9, beta2=0.999, eps=1e-8,
            lr=self.config.learning_rate, weight_decay=self.config.weight_decay, maximize=False,
        )  # fmt: skip
        for parameter in self.parameters:
            parameter.grad = None


def _train_epoch(
    rows: _BatchReader, model: SeededHead, optimizer: Adam, order: np.ndarray, batch_size: int
) -> list[float]:
    """Train for one epoch and return the mean loss of each seed; splitting a batch does not change its gradient."""
    model.train()
    total, seen = torch.zeros(len(model.seeds), device=rows.device), 0
    for start in range(0, len(order), batch_size):
        proteins = order[start : start + batch_size]
        count = int(rows.num_scored[proteins].sum())
        if not count:
            continue
        for part in rows.split(proteins):
            outputs, targets = rows.outputs(model, part)
            losses = _sum_losses(outputs, targets, rows.task)
            (losses.sum() / count).backward()
            total += losses.detach()
        optimizer.step()
        seen += count
    return (total / seen).tolist()
