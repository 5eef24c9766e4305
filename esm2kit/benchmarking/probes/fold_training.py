"""Train the FNNs of all folds and seeds in one pass, each on the batches of its fold.

All parameters of `Fnn` have a leading axis with one slice per fold and seed. In each step every fold has a batch of its
own, in the order that it has when it is trained alone. Batches of different sizes are padded; the loss of padding is 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.early_stopping import BestWeights, check_finite_loss
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets, compute_column_moments, read_blocks
from esm2kit.benchmarking.probes.head_training import ORDER_SEED, Adam
from esm2kit.benchmarking.probes.heads import Fnn
from esm2kit.tasks.labels import average_seeds, build_class_targets, decode_outputs
from esm2kit.tasks.scaling import TargetScale, choose_scale

MAX_BYTES = 1 << 30  # of the standardised features of all folds


def can_share_a_pass(features: Features, targets_F: Sequence[ProbeTargets], config: ProbeConfig) -> bool:
    """Whether the folds of an FNN can be trained in one pass: one row and one target per protein, all in memory."""
    first = targets_F[0]
    one_row_each = len(features.values_ND) == len(features.offsets) - 1 == len(first.packed)
    largest = max(len(proteins) for targets in targets_F for proteins in targets.proteins.values())
    size = len(features.values_ND) * features.width * 4 * len(targets_F)
    fits = size <= MAX_BYTES and max(largest, config.batch_size) <= config.row_budget
    return config.probe == "fnn" and one_row_each and first.packed.ndim == 1 and bool(first.scored.all()) and fits


class _Batch(NamedTuple):
    """The rows of each fold, padded to equal numbers.

    Args:
        x_FND: Standardised features.
        y_FN: Targets, with further axes for binary labels.
        is_real_FN: False for padding.
        sizes: Number of rows of each fold.
    """

    x_FND: Tensor
    y_FN: Tensor
    is_real_FN: Tensor
    sizes: list[int]


class _FoldReader:
    """Standardised features and targets of all folds."""

    def __init__(
        self, features: Features, targets_F: Sequence[ProbeTargets], config: ProbeConfig, device: torch.device
    ) -> None:
        self.task, self.device = targets_F[0].task, device
        x_PD = features.take(np.arange(len(features.values_ND)))
        parts, self.scales, targets = [], [], []
        for each in targets_F:
            train = each.proteins["train"]
            if config.standardize:
                mean_D, scale_D = compute_column_moments(block for _, block in read_blocks(features, train))
                parts.append((x_PD - mean_D).div_(scale_D))
            else:
                parts.append(x_PD)
            if self.task.target == "class":
                targets.append(build_class_targets(each.packed, self.task))
                self.scales.append(TargetScale())
            else:
                self.scales.append(choose_scale(each.packed[train], config.scale_targets))
                targets.append(torch.from_numpy(self.scales[-1].standardise(each.packed)).float())
        self.x_FPD, self.y_FP = torch.stack(parts).to(device), torch.stack(targets).to(device)

    def batch(self, proteins_F: Sequence[np.ndarray]) -> _Batch:
        """Return the rows of each fold's proteins."""
        sizes = [len(proteins) for proteins in proteins_F]
        rows_FN = np.zeros((len(sizes), max(sizes)), dtype=np.int64)
        for row, proteins in zip(rows_FN, proteins_F, strict=True):
            row[: len(proteins)] = proteins
        is_real_FN = torch.from_numpy(np.arange(max(sizes)) < np.array(sizes)[:, None]).to(self.device)
        rows, folds = torch.from_numpy(rows_FN).to(self.device), torch.arange(len(sizes), device=self.device)[:, None]
        return _Batch(self.x_FPD[folds, rows], self.y_FP[folds, rows], is_real_FN, sizes)


def _run(model: Fnn, batch: _Batch) -> Tensor:
    """Compute the outputs (X, N, C) of all slices, those of padding included."""
    num_folds, _, width = batch.x_FND.shape
    hidden = model.weight_in.shape[-1]
    fused = model.weight_in.view(num_folds, -1, width, hidden).transpose(1, 2).flatten(2)  # (F, D, S * H)
    hidden_FSNH = torch.bmm(batch.x_FND, fused).unflatten(2, (-1, hidden)).transpose(1, 2)
    hidden_XNH = F.relu(hidden_FSNH.flatten(0, 1) + model.bias_in)
    sizes_X = [size for size in batch.sizes for _ in range(hidden_FSNH.shape[1])]
    return torch.baddbmm(model.bias_out, model.apply_dropout(hidden_XNH, sizes_X), model.weight_out)


def _sum_losses(outputs_XNC: Tensor, batch: _Batch, rows: _FoldReader) -> Tensor:
    """Return the summed loss of each slice (X,)."""
    num_folds = len(batch.sizes)
    outputs_FSNC = outputs_XNC.unflatten(0, (num_folds, -1))
    y_FSN = batch.y_FN[:, None].expand(num_folds, outputs_FSNC.shape[1], *batch.y_FN.shape[1:])
    if rows.task.target == "value":
        losses = (outputs_FSNC[..., 0] - y_FSN).square()
    elif rows.task.binary_labels:
        losses = F.binary_cross_entropy_with_logits(outputs_FSNC, y_FSN, reduction="none").mean(-1)
    else:
        losses = F.cross_entropy(outputs_FSNC.flatten(0, 2), y_FSN.flatten(), reduction="none").view(y_FSN.shape)
    return (losses * batch.is_real_FN[:, None]).sum(-1).flatten()


def _update(model: Fnn, optimizers: Sequence[Adam], rows: _FoldReader, batch: _Batch) -> None:
    """Update the slices of the folds that have a batch."""
    losses_FS = _sum_losses(_run(model, batch), batch, rows).view(len(batch.sizes), -1)
    sizes_F = torch.tensor([max(size, 1) for size in batch.sizes], device=losses_FS.device)
    (losses_FS.sum(1) / sizes_F).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for fold, (optimizer, size) in enumerate(zip(optimizers, batch.sizes, strict=True)):
        if size:
            optimizer.step([gradient.unflatten(0, (len(batch.sizes), -1))[fold] for gradient in gradients])
    model.zero_grad(set_to_none=True)


def _predict(model: Fnn, rows: _FoldReader, proteins_F: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the outputs (F, S, N, C) for some proteins of each fold, and the mean loss of each slice (X,)."""
    batch = rows.batch(proteins_F)
    model.eval()
    with torch.no_grad():
        outputs_XNC = _run(model, batch)
        losses_FS = _sum_losses(outputs_XNC, batch, rows).view(len(batch.sizes), -1)
    sizes_F1 = torch.tensor(batch.sizes, device=losses_FS.device)[:, None]
    return outputs_XNC.unflatten(0, (len(batch.sizes), -1)), (losses_FS / sizes_F1).flatten()


def fit_fnn_folds(
    features: Features,
    targets_F: Sequence[ProbeTargets],
    config: ProbeConfig,
    seeds: tuple[int, ...],
    device: torch.device,
) -> list[Fitted]:
    """Train one FNN per fold and seed in a single pass; see `esm2kit.benchmarking.probes.fit.fit_probe_folds`.

    Args:
        features: One row per protein.
        targets_F: Targets and sets of each fold.
        config: Settings of the FNN.
        seeds: Seeds of each fold.
        device: Device for training.

    Returns:
        One fit per fold, with predictions and the epoch of each seed.

    Raises:
        InputError: The loss of a seed is never finite on validation, or is not finite with the weights it keeps.
    """
    rows, num_folds = _FoldReader(features, targets_F, config, device), len(targets_F)
    width = features.width
    model = Fnn(seeds * num_folds, width, rows.task.num_outputs, config.hidden or width, config.dropout, device)
    slices = [parameter.detach().unflatten(0, (num_folds, -1)) for parameter in model.parameters()]
    optimizers = [Adam([part[fold] for part in slices], config) for fold in range(num_folds)]
    sets_F = {name: [each.proteins[name] for each in targets_F] for name in ("train", "validation", "test")}
    best = BestWeights(model, config)
    longest = max(map(len, sets_F["train"]))
    for epoch in range(1, config.epochs + 1):
        active_F = best.running_S.view(num_folds, -1).any(1).tolist()
        orders = [
            np.random.default_rng((ORDER_SEED, epoch)).permutation(train) if active else train[:0]
            for train, active in zip(sets_F["train"], active_F, strict=True)
        ]
        model.train()
        for start in range(0, longest, config.batch_size):
            parts = [order[start : start + config.batch_size] for order in orders]
            if any(map(len, parts)):
                _update(model, optimizers, rows, rows.batch(parts))
        _, loss_X = _predict(model, rows, sets_F["validation"])
        if not best.update(loss_X, epoch):
            break
    best.restore()
    found = {}
    for name in ("test", "validation"):
        outputs_FSNC, loss_X = _predict(model, rows, sets_F[name])
        check_finite_loss(loss_X, config, model.seeds, name)
        found[name] = [_decide(outputs_FSNC[fold], len(sets_F[name][fold]), rows, fold) for fold in range(num_folds)]
    epochs_F = best.kept_epoch_S.view(num_folds, -1).tolist()
    fitted = []
    for (test, test_logits), (held, held_logits), epochs in zip(
        found["test"], found["validation"], epochs_F, strict=True
    ):
        fitted.append(Fitted(test, held, {}, {"epoch": epochs}, 0.0, None, test_logits, held_logits))
    return fitted


def _decide(outputs_SNC: Tensor, size: int, rows: _FoldReader, fold: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the predictions (S, M) of a fold, and for classes the logits (M, C) of the mean over seeds."""
    outputs_SMC = outputs_SNC[:, :size]
    predicted_SM = decode_outputs(outputs_SMC, rows.task).cpu().numpy()
    if rows.task.target == "value":
        return rows.scales[fold].restore(predicted_SM), None
    return predicted_SM, average_seeds(outputs_SMC, rows.task).cpu().numpy()
