"""Ridge and logistic regression on features that may not fit in memory; validation selects the penalty."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from esm2kit.benchmarking.probes.features import (
    CONSTANT,
    Features,
    Fitted,
    ProbeTargets,
    compute_column_moments,
    read_blocks,
)
from esm2kit.benchmarking.probes.parameters import ProbeParameters
from esm2kit.core.numbers import format_decimals
from esm2kit.core.progress import Progress
from esm2kit.tasks.labels import build_class_targets, decode_outputs
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Task

logger = logging.getLogger(__name__)

# Penalties relative to the number of training rows.
RIDGE_GRID = tuple(float(x) for x in np.logspace(-6, 3, 19))
LOGISTIC_GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
MAX_PRODUCT_BYTES = 2 << 30  # of the products of columns of all folds


@dataclass
class _Moments:
    """Sums over rows in float64, after subtraction of a shift for numerical accuracy."""

    shift_D: Tensor
    count: int = 0
    x_D: Tensor | float = 0.0
    y_C: Tensor | float = 0.0
    xx_DD: Tensor | float = 0.0
    xy_DC: Tensor | float = 0.0
    yy_C: Tensor | float = 0.0

    def add(self, x_ND: Tensor, y_NC: Tensor) -> None:
        """Add rows and their targets."""
        x_ND = x_ND.double() - self.shift_D
        self.count += len(x_ND)
        self.x_D = self.x_D + x_ND.sum(0)
        self.y_C = self.y_C + y_NC.sum(0)
        self.xx_DD = self.xx_DD + x_ND.T @ x_ND
        self.xy_DC = self.xy_DC + x_ND.T @ y_NC
        self.yy_C = self.yy_C + y_NC.square().sum(0)

    def combine(self, other: "_Moments", sign: int = 1) -> "_Moments":
        """Return the sums over the rows of both, or with the sign -1 without those of the other."""
        names = ("count", "x_D", "y_C", "xx_DD", "xy_DC", "yy_C")
        return _Moments(self.shift_D, *(getattr(self, name) + sign * getattr(other, name) for name in names))


def _sum_moments(features: Features, rows: np.ndarray, y_NC: Tensor, shift_D: Tensor) -> _Moments:
    """Sum over the feature rows of a set."""
    moments = _Moments(shift_D)
    for where, block in read_blocks(features, rows):
        moments.add(block, y_NC[where])
    return moments


class _RidgeColumn(NamedTuple):
    """The ridge regression of one target: weights of the features minus `shift_D`."""

    weight_D: Tensor
    bias: float
    penalty: float
    error: float


def fit_ridge(features: Features, targets: ProbeTargets, penalty: float | Sequence[float] | None = None) -> Fitted:
    """Fit ridge regression on z-scored features; one eigendecomposition serves all penalties.

    Several targets are fitted independently, each with its own penalty, on the proteins that have a value. Those with
    values of the same proteins share the sums over the features.

    Args:
        features: The feature rows.
        targets: Values and sets.
        penalty: Penalty per training row, of several targets one for each. None chooses it on validation.

    Returns:
        Predictions and the selected penalty, of several targets a list.
    """
    train, validation = targets.rows("train"), targets.rows("validation")
    # the error below is a difference of sums of squares, exact only for values around 0
    scale = TargetScale.from_values(targets.packed[train])
    y_train, y_validation = (scale.standardise(targets.packed[rows]) for rows in (train, validation))
    y_train, y_validation = (y.reshape(len(y), -1) for y in (y_train, y_validation))
    shift_D = next(read_blocks(features, train))[1].double().mean(0)
    columns: list[_RidgeColumn | None] = [None] * y_train.shape[1]
    groups = _group_by_measured(y_train, y_validation)
    if isinstance(penalty, Sequence):
        groups = [[place] for places in groups for place in places]
    for places in groups:
        measured, held = (~np.isnan(y[:, places[0]]) for y in (y_train, y_validation))
        y_fit, y_held = torch.from_numpy(y_train[measured][:, places]), torch.from_numpy(y_validation[held][:, places])
        rows, grid = (train[measured], validation[held]), RIDGE_GRID
        if penalty is not None:
            grid = (penalty[places[0]] if isinstance(penalty, Sequence) else penalty,)
        if len(rows[0]) < features.width:
            found = _fit_ridge_by_rows(features, rows, (y_fit, y_held), shift_D, grid)
        else:
            sums = (_sum_moments(features, part, y, shift_D) for part, y in zip(rows, (y_fit, y_held), strict=True))
            found = _solve_ridge(*sums, grid)
        for place, column in zip(places, found, strict=True):
            columns[place] = column
            rmse = math.sqrt(max(column.error, 0.0) / int(held.sum())) * scale.columns[place].spread
            logger.debug("ridge: penalty %.3g is best, validation RMSE %s", column.penalty, format_decimals(rmse))
    return _finish_ridge(features, targets, scale, shift_D, columns)


def _finish_ridge(
    features: Features, targets: ProbeTargets, scale: TargetScale, shift_D: Tensor, columns: Sequence[_RidgeColumn]
) -> Fitted:
    """Predict validation and test by the regressions of all targets."""
    tensors = {
        "shift_D": shift_D,
        "scale_D": torch.ones_like(shift_D),  # the weights already contain the scale of the columns
        "weight_DC": torch.stack([column.weight_D for column in columns], dim=1),
        "bias_C": torch.tensor([column.bias for column in columns], dtype=torch.float64),
    }
    parameters = ProbeParameters("ridge", tensors, scale)
    (test, _), (validation, _) = (_predict(parameters, features, targets, name) for name in ("test", "validation"))
    penalties = [column.penalty for column in columns]
    selected = {"penalty_per_row": penalties if targets.task.columns else penalties[0]}
    return Fitted(test, validation, selected=selected, parameters=parameters)


def fit_ridge_folds(features: Features, targets_F: Sequence[ProbeTargets]) -> list[Fitted]:
    """Fit ridge regression in each fold, from one sum of products of all rows.

    The products of a fold's training rows are those of all rows without those of its test and validation rows. The
    result is that of separate fits up to rounding. With fewer rows than columns, with several targets, or for products
    that do not fit in memory, the folds are fitted separately.

    Args:
        features: The feature rows.
        targets_F: Targets and sets of each fold. The test sets are disjoint and cover all rows.

    Returns:
        One fit per fold.
    """
    width, first = features.width, targets_F[0]
    rows_F = [{name: targets.rows(name) for name in ("train", "validation", "test")} for targets in targets_F]
    every = np.unique(np.concatenate([rows["test"] for rows in rows_F]))
    cover = len(every) == sum(len(rows["test"]) for rows in rows_F) and all(
        len(every) == sum(map(len, rows.values())) for rows in rows_F
    )
    too_large = (len(rows_F) + 4) * width * width * 8 > MAX_PRODUCT_BYTES
    few = min(len(rows["train"]) for rows in rows_F) < width
    if not cover or too_large or few or first.packed.ndim > 1:
        return [fit_ridge(features, targets) for targets in targets_F]
    scale = TargetScale.from_values(first.packed[every])
    y_NC = torch.from_numpy(scale.standardise(first.packed))[:, None]
    shift_D = next(read_blocks(features, every))[1].double().mean(0)
    tests = [_sum_moments(features, rows["test"], y_NC[rows["test"]], shift_D) for rows in rows_F]
    total = _Moments(shift_D)
    for test in tests:
        total = total.combine(test)
    fitted = []
    for targets, rows, test in zip(targets_F, rows_F, tests, strict=True):
        held = _sum_moments(features, rows["validation"], y_NC[rows["validation"]], shift_D)
        columns = _solve_ridge(total.combine(test, -1).combine(held, -1), held, RIDGE_GRID)
        fitted.append(_finish_ridge(features, targets, scale, shift_D, columns))
    return fitted


def _group_by_measured(*values_NC: np.ndarray) -> list[list[int]]:
    """Group the columns of arrays that have values in the same rows."""
    groups: dict[bytes, list[int]] = {}
    for column in range(values_NC[0].shape[1]):
        key = b"".join(np.isnan(values[:, column]).tobytes() for values in values_NC)
        groups.setdefault(key, []).append(column)
    return list(groups.values())


def _solve_ridge(fit: _Moments, held: _Moments, grid: Sequence[float]) -> list[_RidgeColumn]:
    """Fit targets that are measured in the same rows, from the sums over the rows.

    Args:
        fit: Sums over the rows for training.
        held: Sums over the rows for the choice of the penalty.
        grid: Penalties.

    Returns:
        The regression of each target.
    """
    mean_D, y_mean_C = fit.x_D / fit.count, fit.y_C / fit.count
    covariance_DD = fit.xx_DD - fit.count * torch.outer(mean_D, mean_D)
    scale_D = _compute_scale(covariance_DD.diagonal() / fit.count, fit.shift_D + mean_D)
    xy_DC = (fit.xy_DC - fit.count * torch.outer(mean_D, y_mean_C)) / scale_D[:, None]
    eigenvalues, vectors = torch.linalg.eigh(covariance_DD / scale_D / scale_D[:, None])
    rotated_DC = vectors.T @ xy_DC
    best: list[_RidgeColumn | None] = [None] * len(y_mean_C)
    for penalty in grid:
        shrunk_D = eigenvalues.clamp_min(0) + penalty * fit.count
        weight_DC = vectors @ (rotated_DC / shrunk_D[:, None]) / scale_D[:, None]
        bias_C = y_mean_C - mean_D @ weight_DC
        # sum of (y - xw - b)^2 over validation, from the moments alone
        error_C = (
            held.yy_C - 2 * (held.xy_DC * weight_DC).sum(0) - 2 * bias_C * held.y_C
            + (weight_DC * (held.xx_DD @ weight_DC)).sum(0)
            + 2 * bias_C * (held.x_D @ weight_DC) + held.count * bias_C.square()
        )  # fmt: skip
        for place, error in enumerate(error_C.tolist()):
            if best[place] is None or error < best[place].error:
                best[place] = _RidgeColumn(weight_DC[:, place], float(bias_C[place]), penalty, error)
    return best


def _compute_scale(variance_D: Tensor, mean_D: Tensor) -> Tensor:
    """Compute the standard deviation of each column; 1 for a constant one."""
    scale_D = variance_D.clamp_min(0).sqrt()
    scale_D[scale_D <= CONSTANT * mean_D.abs()] = 1.0
    return scale_D


def _fit_ridge_by_rows(
    features: Features,
    rows: tuple[np.ndarray, np.ndarray],
    y: tuple[Tensor, Tensor],
    shift_D: Tensor,
    grid: Sequence[float],
) -> list[_RidgeColumn]:
    """Fit targets that are measured in the same rows, fewer than columns, from the products of rows with each other.

    The weights are the same as those from the products of columns (Saunders et al. 1998, "Ridge regression learning
    algorithm in dual variables"), and the eigendecomposition has the size of the training set.

    Args:
        features: The feature rows.
        rows: Rows for training and for the choice of the penalty.
        y: (N, C) standardised targets of both.
        shift_D: (D,) numbers near the means of the features.
        grid: Penalties.

    Returns:
        The regression of each target.
    """
    x_ND, held_VD = (torch.cat([block.double() - shift_D for _, block in read_blocks(features, part)]) for part in rows)
    mean_D, y_mean_C = x_ND.mean(0), y[0].mean(0)
    scale_D = _compute_scale((x_ND - mean_D).square().mean(0), shift_D + mean_D)
    z_ND = (x_ND - mean_D) / scale_D
    eigenvalues, vectors = torch.linalg.eigh(z_ND @ z_ND.T)
    rotated_NC = vectors.T @ (y[0] - y_mean_C)
    products_VN = (held_VD - mean_D) / scale_D @ z_ND.T
    best: list[tuple[Tensor, float, float] | None] = [None] * len(y_mean_C)
    for penalty in grid:
        shrunk_N = eigenvalues.clamp_min(0) + penalty * len(x_ND)
        dual_NC = vectors @ (rotated_NC / shrunk_N[:, None])
        error_C = (y[1] - y_mean_C - products_VN @ dual_NC).square().sum(0)
        for place, error in enumerate(error_C.tolist()):
            if best[place] is None or error < best[place][2]:
                best[place] = (dual_NC[:, place], penalty, error)
    columns = []
    for place, (dual_N, penalty, error) in enumerate(best):
        weight_D = z_ND.T @ dual_N / scale_D
        columns.append(_RidgeColumn(weight_D, float(y_mean_C[place] - mean_D @ weight_D), penalty, error))
    return columns


def _predict(
    parameters: ProbeParameters, features: Features, targets: ProbeTargets, set_name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predict the scored targets of a set, (1, M), or (1, M, C) for several, with the logits (M, C) of classes."""
    rows = targets.rows(set_name)
    # the probe that accompanies pretraining has no test set
    blocks = (block for _, block in read_blocks(features, rows)) if len(rows) else [torch.empty(0, features.width)]
    outputs_MC = torch.cat([parameters.outputs(block, [1] * len(block), targets.task)[0] for block in blocks])
    logits_MC = None if targets.task.target == "value" else outputs_MC.numpy().astype(np.float32)
    return decode_outputs(outputs_MC, targets.task).numpy()[None], logits_MC


def fit_logistic(features: Features, targets: ProbeTargets, penalty: float | None = None) -> Fitted:
    """Fit multinomial logistic regression by L-BFGS, from the strongest to the weakest penalty.

    Each fit starts from the weights of the previous one. The search ends when the validation loss rises. Binary labels
    have one sigmoid each.

    Args:
        features: The feature rows.
        targets: Classes and sets.
        penalty: Penalty to use, one of LOGISTIC_GRID. None chooses it on validation.

    Returns:
        Predictions (1, M) and the selected penalty.
    """
    train, validation = targets.rows("train"), targets.rows("validation")
    grid = LOGISTIC_GRID if penalty is None else LOGISTIC_GRID[: LOGISTIC_GRID.index(penalty) + 1]
    mean_D, scale_D = compute_column_moments(block for _, block in read_blocks(features, train))
    outputs = targets.task.num_outputs
    width = features.width

    def prepare(rows: np.ndarray) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
        def blocks() -> Iterator[tuple[slice, Tensor]]:
            return ((where, (block - mean_D) / scale_D) for where, block in read_blocks(features, rows))

        kept = list(blocks()) if len(rows) * width * 4 <= 1 << 30 else None
        return (lambda: iter(kept)) if kept is not None else blocks

    def loss_and_gradient(weights_XC: Tensor, blocks, y_N: Tensor, gradient: bool) -> tuple[float, Tensor | None]:
        total, slope = 0.0, torch.zeros_like(weights_XC) if gradient else None
        for where, block in blocks():
            logits = torch.addmm(weights_XC[-1], block, weights_XC[:-1])
            loss, slope_logits = _class_loss(logits, y_N[where], targets.task)
            total += loss
            if slope is not None:
                slope[:-1] += block.T @ slope_logits
                slope[-1] += slope_logits.sum(0)
        return total / len(y_N), None if slope is None else slope / len(y_N)

    fit_blocks, held_blocks = prepare(train), prepare(validation)
    y_train, y_held = (build_class_targets(targets.packed[rows], targets.task) for rows in (train, validation))
    from scipy.optimize import minimize  # slow import that other probes do not need

    flat = np.zeros((width + 1) * outputs)
    best: tuple[float, float, np.ndarray] | None = None
    progress = Progress(logger, "logistic:", "penalties", len(grid))
    for tried, weight in enumerate(grid, 1):

        def objective(flat_X: np.ndarray, weight: float = weight) -> tuple[float, np.ndarray]:
            weights_XC = torch.from_numpy(flat_X.reshape(width + 1, outputs)).float()
            loss, slope = loss_and_gradient(weights_XC, fit_blocks, y_train, gradient=True)
            slope[:-1] += weight * weights_XC[:-1]
            return loss + weight / 2 * float(weights_XC[:-1].square().sum()), slope.double().numpy().ravel()

        found = minimize(
            objective, flat, jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-5, "ftol": 1e-9}
        )
        flat = found.x
        weights_XC = torch.from_numpy(flat.reshape(width + 1, outputs)).float()
        held, _ = loss_and_gradient(weights_XC, held_blocks, y_held, gradient=False)
        if best is not None and held >= best[0] and penalty is None:
            break
        best = (held, weight, flat)
        progress.update(tried, f"penalty {weight:g} is best so far")
    progress.close()
    held, penalty, flat = best
    logger.debug("logistic: penalty %.3g is best, validation loss %s", penalty, format_decimals(held))
    weights_XC = torch.from_numpy(flat.reshape(width + 1, outputs)).float()
    tensors = {"shift_D": mean_D, "scale_D": scale_D, "weight_DC": weights_XC[:-1], "bias_C": weights_XC[-1]}
    parameters = ProbeParameters("logistic", tensors)
    (test, test_logits), (validation, validation_logits) = (
        _predict(parameters, features, targets, name) for name in ("test", "validation")
    )
    selected: dict[str, Any] = {"penalty": penalty}
    return Fitted(test, validation, {}, selected, 0.0, parameters, test_logits, validation_logits)


def _class_loss(logits_NC: Tensor, targets: Tensor, task: Task) -> tuple[float, Tensor]:
    """Return the summed loss and its gradient with respect to the logits (N, C)."""
    if task.binary_labels:
        loss = F.binary_cross_entropy_with_logits(logits_NC, targets, reduction="sum") / len(task.binary_labels)
        return float(loss), (logits_NC.sigmoid() - targets) / len(task.binary_labels)
    log_NC = logits_NC.log_softmax(1)
    slope = log_NC.exp()
    slope[torch.arange(len(targets)), targets] -= 1
    return float(F.nll_loss(log_NC, targets, reduction="sum")), slope
