"""A row's TARGET and MASK as numbers, or one line on why they are none."""

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.tasks.files import Source, TaskRecord
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.task import Task


def is_number(text: str) -> bool:
    """Whether a text reads as a number, nan and inf included."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_integer(text: str) -> bool:
    """Whether a text reads as an integer."""
    return text.lstrip("+-").isdigit()


def has_decimal_comma(text: str) -> bool:
    """Whether a text is a number but for a comma in place of its point: 60,11."""
    return text.count(",") == 1 and is_number(text.replace(",", "."))


def parse_residue_targets(task: Task, row: TaskRecord, table: np.ndarray, source: Source) -> np.ndarray:
    """(residues,) classes through the table of letters, or values separated by semicolons.

    Raises: InputError for a label outside the alphabet, or another number of labels than residues.
    """
    text = row.target or ""
    if task.target == "value":
        values = np.array([parse_number(row, part, source) for part in text.split(";")])
    else:
        values = table[np.frombuffer(text.encode("ascii", errors="replace"), dtype=np.uint8)]
        if (values < 0).any():
            letter = text[int((values < 0).argmax())]
            raise InputError(
                f"{source}: record {row.id!r} has the label {letter!r}; known are {', '.join(task.labels)}",
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
    """(residues,) True where the target counts; everywhere if the row has no mask."""
    if row.mask is None:
        return np.ones(len(row.sequence), dtype=bool)
    if len(row.mask) != len(row.sequence) or set(row.mask) - {"0", "1"}:
        raise InputError(
            f"{source}: the mask of {row.id!r} must be {len(row.sequence)} times 0 or 1, one a residue; "
            f"it has {len(row.mask)} characters",
            code="task.mask",
            record=row.id,
            found=len(row.mask),
            expected=len(row.sequence),
        )
    return np.frombuffer(row.mask.encode(), dtype=np.uint8) == ord("1")


def parse_number(row: TaskRecord, text: str, source: Source) -> float:
    """A finite number.

    Raises: InputError naming the record.
    """
    try:
        value = float(text)
    except ValueError:
        hint = "; write a decimal point, not a comma" if has_decimal_comma(text) else ""
        raise InputError(
            f"{source}: record {row.id!r} has the target {text!r}, which is no number{hint}",
            code="task.target",
            record=row.id,
            found=text,
        ) from None
    if not np.isfinite(value):
        raise InputError(
            f"{source}: record {row.id!r} has the target {text!r}; drop the record or fix it",
            code="task.target",
            record=row.id,
            found=text,
        )
    return value


def build_class_targets(classes_N: np.ndarray, task: Task) -> Tensor:
    """(N,) int64 classes, or (N, L) float32 zeros and ones of the binary labels they stand for."""
    if not task.binary_labels:
        return torch.from_numpy(classes_N)
    return torch.from_numpy(unpack_bits(classes_N, len(task.binary_labels))).float()


def decode_outputs(outputs: Tensor, task: Task) -> Tensor:
    """Class of the largest output, or the integer that the positive bits spell, or the value; over the last axis."""
    if task.target == "value":
        return outputs[..., 0]
    if task.binary_labels:
        powers = 1 << torch.arange(len(task.binary_labels), device=outputs.device)
        return ((outputs > 0).long() * powers).sum(-1)
    return outputs.argmax(-1)
