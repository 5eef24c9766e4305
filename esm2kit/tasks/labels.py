"""Parse the targets and masks of a task's records, and convert model outputs to predictions."""

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.tasks.files import Source, TaskRecord
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.task import Task


def is_number(text: str) -> bool:
    """Whether a text is a number, including nan and inf."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_integer(text: str) -> bool:
    """Whether a text is an integer."""
    return text.lstrip("+-").isdigit()


def has_decimal_comma(text: str) -> bool:
    """Whether a text is a number with a decimal comma, such as 60,11."""
    return text.count(",") == 1 and is_number(text.replace(",", "."))


def parse_residue_targets(task: Task, row: TaskRecord, table: np.ndarray, source: Source) -> np.ndarray:
    """Parse the target of a residue task: one label character per residue, or values separated by semicolons.

    Args:
        task: the task.
        row: the record.
        table: (256,) byte -> class, -1 for bytes that are not labels.
        source: the file, for the message.

    Returns:
        (residues,) classes or values.

    Raises:
        InputError: a label is unknown, or the number of labels is not the number of residues.
    """
    text = row.target or ""
    if task.target == "value":
        values = np.array([parse_number(row, part, source) for part in text.split(";")])
    else:
        values = table[np.frombuffer(text.encode("ascii", errors="replace"), dtype=np.uint8)]
        if (values < 0).any():
            letter = text[int((values < 0).argmax())]
            raise InputError(
                f"{source}: record {row.id!r} has the unknown label {letter!r}. Use one of {', '.join(task.labels)}.",
                code="task.label",
                record=row.id,
                found=letter,
                known=task.labels,
            )
    if len(values) != len(row.sequence):
        raise InputError(
            f"{source}: record {row.id!r} has {len(values)} labels for {len(row.sequence)} residues",
            code="task.label-count",
            record=row.id,
            found=len(values),
            expected=len(row.sequence),
        )
    return values


def parse_mask(row: TaskRecord, source: Source) -> np.ndarray:
    """Parse the mask of a record.

    Args:
        row: the record.
        source: the file, for the message.

    Returns:
        (residues,) True for residues that are scored; all are if the record has no mask.

    Raises:
        InputError: the mask is not one 0 or 1 per residue.
    """
    if row.mask is None:
        return np.ones(len(row.sequence), dtype=bool)
    if len(row.mask) != len(row.sequence) or set(row.mask) - {"0", "1"}:
        raise InputError(
            f"{source}: the mask of {row.id!r} must have one 0 or 1 for each of the {len(row.sequence)} residues, "
            f"found {len(row.mask)} characters from {''.join(sorted(set(row.mask)))!r}",
            code="task.mask",
            record=row.id,
            found=len(row.mask),
            expected=len(row.sequence),
        )
    return np.frombuffer(row.mask.encode(), dtype=np.uint8) == ord("1")


def parse_number(row: TaskRecord, text: str, source: Source) -> float:
    """Parse a finite number.

    Args:
        row: the record, for the message.
        text: the number.
        source: the file, for the message.

    Returns:
        The number.

    Raises:
        InputError: the text is not a finite number.
    """
    try:
        value = float(text)
    except ValueError:
        hint = " Use a decimal point instead of a comma." if has_decimal_comma(text) else ""
        raise InputError(
            f"{source}: target {text!r} of record {row.id!r} is not a number.{hint}",
            code="task.target",
            record=row.id,
            found=text,
        ) from None
    if not np.isfinite(value):
        raise InputError(
            f"{source}: record {row.id!r} has the target {text!r}. Correct it, or remove the record.",
            code="task.target",
            record=row.id,
            found=text,
        )
    return value


def build_class_targets(classes_N: np.ndarray, task: Task) -> Tensor:
    """Return (N,) int64 classes, or (N, L) float32 binary labels (0 or 1) for a task that has them."""
    if not task.binary_labels:
        return torch.from_numpy(classes_N)
    return torch.from_numpy(unpack_bits(classes_N, len(task.binary_labels))).float()


def decode_outputs(outputs: Tensor, task: Task) -> Tensor:
    """Convert outputs (..., C) to predictions (...): values, classes, or the integers encoded by the positive bits."""
    if task.target == "value":
        return outputs[..., 0]
    if task.binary_labels:
        powers = 1 << torch.arange(len(task.binary_labels), device=outputs.device)
        return ((outputs > 0).long() * powers).sum(-1)
    return outputs.argmax(-1)
