"""Advice that follows from training and validation losses."""

import math
from collections.abc import Sequence

import numpy as np

# Relative changes of a loss that count as a change.
RISE, FALL, HARDLY = 0.05, 0.02, 0.05
FEWEST = 3  # validations


def advise(train_losses: Sequence[float], validation_losses: Sequence[float]) -> str:
    """Describe what the losses of a run show, and what to change.

    Args:
        train_losses: Training loss at each validation, the mean since the previous one.
        validation_losses: Validation loss at each validation, at the same places.

    Returns:
        One or two sentences.
    """
    train, held = np.asarray(train_losses, dtype=float), np.asarray(validation_losses, dtype=float)
    if len(train) != len(held) or not np.isfinite([*train, *held]).all():
        return "The loss is not finite: lower lr and head_lr."
    if len(held) < FEWEST:
        return f"{len(held)} validations are too few to judge the training: validate more often, or train longer."
    best, scale = int(held.argmin()), max(abs(float(held.min())), 1e-12)
    learned = _relative_fall(train)
    unstable = train[-1] > (1 + 2 * RISE) * train.min() and held[-1] > (1 + RISE) * held.min()
    if unstable and best < len(held) - 1:
        return "The training loss itself rose again, so the updates are too large: lower lr and head_lr."
    if learned < HARDLY and _relative_fall(held) < HARDLY:
        return (
            "Neither loss has fallen by more than 5%, so little was learned: raise head_lr or lr, or train for more "
            "epochs. If that changes nothing, the labels may not follow from the sequence."
        )
    rise = (held[-1] - held.min()) / scale
    if best < len(held) - 1 and rise > RISE and learned > HARDLY:
        return (
            f"Overfitting: the validation loss was lowest at validation {best + 1} of {len(held)} and rose by "
            f"{rise:.0%} while the training loss kept falling. The weights of the lowest loss are used. Try fewer "
            "trained weights (mode lora or frozen), more dropout or more labels; more epochs do not help."
        )
    if best >= len(held) - 1 - len(held) // 10 and _relative_fall(held[-max(FEWEST, len(held) // 3) :]) > FALL:
        return "The validation loss was still falling at the end: train for more epochs, or raise lr and head_lr."
    if learned < HARDLY:
        return (
            "The training loss hardly fell after the first validation: raise head_lr or lr, or train for more epochs."
        )
    return "Both losses have levelled off: more epochs change little. More labels or a larger model may help."


def _relative_fall(losses: np.ndarray) -> float:
    """Return by which share the loss fell from the first value to the lowest."""
    first = float(losses[0])
    return (first - float(losses.min())) / max(abs(first), 1e-12)


def advise_seeds(history: dict[str, Sequence[Sequence[float | None]]]) -> str:
    """Give the advice for the first seed of a report's row.

    Args:
        history: train_loss and validation_loss, (validations, seeds), as in a report.

    Returns:
        The advice, or "" without a history.
    """
    curves = [
        [math.nan if row[0] is None else row[0] for row in history.get(name, ())]
        for name in ("train_loss", "validation_loss")
    ]
    return advise(*curves) if curves[0] else ""
