"""Metrics of several values per protein: those of each target, and their mean over the targets."""

from collections.abc import Callable, Sequence

import numpy as np

from esm2kit.tasks.metrics import build_value_scorer

SEPARATOR = "/"  # between the metric and the target in the name of a target's own score


def build_column_scorer(
    truth_NC: np.ndarray,
    predicted_NC: np.ndarray,
    protein_N: np.ndarray,
    columns: Sequence[str],
    spreads_C: Sequence[float],
    build: Callable[..., Callable[[np.ndarray], dict[str, np.ndarray]]] | None = None,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Build a function that scores several values per protein.

    Args:
        truth_NC: (N, C) measured values, nan where a value is missing; these cells are not scored.
        predicted_NC: (N, C) predicted values.
        protein_N: (N,) protein of each row.
        columns: names of the C targets.
        spreads_C: (C,) standard deviations of the training values.
        build: builds the scorer of one target from its measured and predicted values, their proteins and their rows.
            None is `build_value_scorer`.

    Returns:
        A function from counts (R, P) to metric -> (R,) values. `spearman` and the others are means over the targets;
        `rmse` is the mean of the RMSE divided by the standard deviation of the training values, because targets may
        have different units. `spearman/<column>` and the others are those of one target, in its own unit.
    """
    scorers = []
    for column in range(truth_NC.shape[1]):
        rows = np.flatnonzero(~np.isnan(truth_NC[:, column]))
        inputs = (truth_NC[rows, column], predicted_NC[rows, column], protein_N[rows])
        scorers.append(build_value_scorer(*inputs) if build is None else build(*inputs, rows))
    sizes_C = [spread or 1.0 for spread in spreads_C]

    def score(counts_RP: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):  # a replicate may have no protein with a value
            found = [scorer(counts_RP) for scorer in scorers]
        means = {
            name: np.mean(
                [own[name] / (size if name == "rmse" else 1.0) for own, size in zip(found, sizes_C, strict=True)],
                axis=0,
            )
            for name in found[0]
        }
        own = {
            f"{name}{SEPARATOR}{column}": values
            for column, metrics in zip(columns, found, strict=True)
            for name, values in metrics.items()
        }
        return means | own

    return score


def is_mean(name: str) -> bool:
    """Whether the name of a score is that of all targets together, and not of one of several."""
    return SEPARATOR not in name


def group_by_column(scores: dict, columns: Sequence[str]) -> dict[str, dict]:
    """Group the scores of single targets: column -> metric -> score."""
    return {
        column: {
            name.partition(SEPARATOR)[0]: score
            for name, score in scores.items()
            if name.partition(SEPARATOR)[2] == column
        }
        for column in columns
    }
