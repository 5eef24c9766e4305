"""Parse the targets and masks of a task's records, and convert model outputs to predictions."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.tasks.files import TaskRecord
from esm2kit.tasks.metrics import unpack_bits
from esm2kit.tasks.sources import Source
from esm2kit.tasks.task import Task

# Spellings of a residue without a measurement in a list of labels.
UNMEASURED = {"nan", "na", "n/a", "none", "null"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?(\d*|[1-9]\d{0,2}(\.\d{3})+),\d+([eE][+-]?\d+)?", re.ASCII)
# 42,062 may be a number with thousands separators or one with a decimal comma; 1,234,567 and 1,234.5 are not ambiguous.
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", re.ASCII)
QUOTES = "'\""
LARGEST = 1e300  # of a target, so that differences of two and sums of 1e7 targets are finite


def is_number(text: str) -> bool:
    """Whether a text is a number, including nan and inf. Python's digit groups, such as 1_000, are not numbers."""
    return NUMBER.fullmatch(text) is not None


def is_integer(text: str) -> bool:
    """Whether a text is an integer."""
    return INTEGER.fullmatch(text) is not None


def has_comma(text: str) -> bool:
    """Whether a text is a number with a decimal comma, such as 60,11, or with thousands separators."""
    return (DECIMAL_COMMA.fullmatch(text) or THOUSANDS.fullmatch(text)) is not None


def split_labels(text: str) -> list[str] | None:
    """Split a target that lists several labels.

    Args:
        text: labels in brackets, or separated by semicolons, commas or blanks: `1;0;1`, `1 0 1`, `['H', 'C', 'C']`.

    Returns:
        The labels without quotation marks, or None if the text is a single label.
    """
    inner = text.strip()
    bracketed = len(inner) > 1 and inner[0] + inner[-1] in ("[]", "()")
    inner = inner[1:-1].strip() if bracketed else inner
    separator = next((letter for letter in ";," if letter in inner), None)  # None splits at blanks
    items = [item.strip().strip(QUOTES) for item in inner.split(separator)]
    return items if bracketed or len(items) > 1 else None


def split_residue_labels(text: str, num_residues: int) -> Sequence[str]:
    """Split the target of a residue task into its labels.

    Args:
        text: a list as in `split_labels`, or one character per residue.
        num_residues: of the protein. A text of this length that is not a list of this length has one character each.

    Returns:
        The labels, ideally one per residue.
    """
    items = split_labels(text)
    return text if items is None or (len(items) != num_residues == len(text)) else items


def parse_residue_targets(
    task: Task, row: TaskRecord, table: np.ndarray, source: Source
) -> tuple[np.ndarray, np.ndarray]:
    """Parse the target of a residue task.

    Args:
        task: the task.
        row: the record. Its target is as in `split_residue_labels`; nan and NA stand for unmeasured residues.
        table: (characters,) code point -> class, -1 for characters that are not labels; the last entry is -1.
        source: the file, for the message.

    Returns:
        (residues,) classes or values, 0 for unmeasured residues; and (residues,) False for unmeasured residues.

    Raises:
        InputError: a label is unknown, or the number of labels is not the number of residues.
    """
    labels = split_residue_labels(row.target or "", len(row.sequence))
    if len(labels) != len(row.sequence):
        raise InputError(
            f"{source}: record {row.id!r} has {len(labels)} labels for {len(row.sequence)} residues. Write one label "
            "per residue; if the target is one per protein, set level to protein.",
            code="task.label-count",
            record=row.id,
            found=len(labels),
            expected=len(row.sequence),
        )
    measured = np.ones(len(labels), dtype=bool)
    if not isinstance(labels, str):
        measured = np.array([label.lower() not in UNMEASURED for label in labels])
    if task.target == "value":
        values = [
            parse_number(row, label, source) if known else 0.0 for label, known in zip(labels, measured, strict=True)
        ]
        return np.array(values), measured
    if isinstance(labels, str):
        codes = np.frombuffer(labels.encode("utf-32-le"), dtype=np.uint32)
        classes = table[np.minimum(codes, len(table) - 1)]
    else:
        index = task.label_index()
        classes = np.array(
            [index.get(label, -1) if known else 0 for label, known in zip(labels, measured, strict=True)]
        )
    if (classes < 0).any():
        label = labels[int((classes < 0).argmax())]
        raise InputError(
            f"{source}: record {row.id!r} has the unknown label {label!r}. Use one of {', '.join(task.labels)}.",
            code="task.label",
            record=row.id,
            found=label,
            known=task.labels,
        )
    return classes, measured


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
    mask = "".join(split_labels(row.mask) or row.mask)
    if len(mask) != len(row.sequence) or set(mask) - {"0", "1"}:
        raise InputError(
            f"{source}: the mask of {row.id!r} must have one 0 or 1 for each of the {len(row.sequence)} residues, "
            f"found {len(mask)} characters from {''.join(sorted(set(mask)))!r}",
            code="task.mask",
            record=row.id,
            found=len(mask),
            expected=len(row.sequence),
        )
    return np.frombuffer(mask.encode(), dtype=np.uint8) == ord("1")


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
    if not is_number(text):
        raise InputError(
            f"{source}: target {text!r} of record {row.id!r} is not a number. {_suggest_number(text)}",
            code="task.target",
            record=row.id,
            found=text,
        )
    value = float(text)
    if not np.isfinite(value):
        raise InputError(
            f"{source}: record {row.id!r} has the target {text!r}. Correct it, or remove the record.",
            code="task.target",
            record=row.id,
            found=text,
        )
    if abs(value) > LARGEST:
        raise InputError(
            f"{source}: the target {text!r} of record {row.id!r} is not between -{LARGEST:g} and {LARGEST:g}. Divide "
            "all targets by a common factor, or take their logarithms.",
            code="task.target-range",
            record=row.id,
            found=text,
            largest=LARGEST,
        )
    return value


def _suggest_number(text: str) -> str:
    """Return what to do about a text that should be a number."""
    plain = text.replace(",", "")
    if THOUSANDS.fullmatch(text):
        decimal = f", or {text.replace(',', '.')} if the comma is a decimal comma" if text.count(",") == 1 else ""
        return f"Write {plain}{'' if '.' in text else decimal}."
    if DECIMAL_COMMA.fullmatch(text):
        return f"Write {text.replace('.', '').replace(',', '.')}, with a decimal point instead of a comma."
    if not text:
        return "Write nan for a residue without a measurement."
    if split_labels(text):
        return "Write one value per column, and name the columns as --target a,b."
    return "Write the number without a unit or another sign, or remove the record."


def build_class_targets(classes_N: np.ndarray, task: Task) -> Tensor:
    """Return (N,) int64 classes, or (N, L) float32 binary labels (0 or 1) for a task that has them."""
    if not task.binary_labels:
        return torch.from_numpy(classes_N)
    if task.is_multilabel:
        return torch.from_numpy(classes_N).float()
    return torch.from_numpy(unpack_bits(classes_N, len(task.binary_labels))).float()


def decode_outputs(outputs: Tensor, task: Task) -> Tensor:
    """Convert outputs (..., C) to predictions.

    Args:
        outputs: outputs of a model.
        task: the task.

    Returns:
        (...) values, classes, or the integers encoded by the positive bits; (..., C) several values, or the
        probabilities of the labels of a multi-label task.
    """
    if task.columns:
        return outputs
    if task.is_multilabel:
        return outputs.sigmoid()
    if task.target == "value":
        return outputs[..., 0]
    if task.binary_labels:
        powers = 1 << torch.arange(len(task.binary_labels), device=outputs.device)
        return ((outputs > 0).long() * powers).sum(-1)
    return outputs.argmax(-1)


def average_seeds(outputs_SNC: Tensor, task: Task) -> Tensor:
    """Average the outputs of the seeds: (N, C) values, or logits of the mean probabilities."""
    if len(outputs_SNC) == 1:
        return outputs_SNC[0]
    if task.target == "value":
        return outputs_SNC.mean(0)
    if task.binary_labels:
        return torch.logit(outputs_SNC.double().sigmoid().mean(0), eps=1e-12).float()
    return outputs_SNC.double().softmax(-1).mean(0).log().float()


def decide_outputs(outputs: np.ndarray, task: Task, threshold: float = 0.5) -> np.ndarray:
    """Convert outputs (..., C) to classes (int64), values (float64), or labels that are present (int64, 0 or 1).

    Args:
        outputs: outputs of a model.
        task: the task.
        threshold: probability above which a label of a multi-label task is present.

    Returns:
        (...), or (..., C) for a task with several targets.
    """
    decided = decode_outputs(torch.from_numpy(outputs), task).numpy()
    if task.is_multilabel:
        return (decided > threshold).astype(np.int64)
    return decided.astype(np.float64) if task.target == "value" else decided


def compute_probabilities(outputs: np.ndarray, task: Task, temperature: float = 1.0) -> np.ndarray:
    """Convert outputs (..., C) to probabilities of classes or binary labels; values are returned unchanged.

    Args:
        outputs: values, or logits.
        task: the task.
        temperature: logits are divided by it.

    Returns:
        Probabilities or values, in the type of the outputs.
    """
    if task.target == "value":
        return outputs
    tensor = torch.from_numpy(outputs) / temperature if temperature != 1 else torch.from_numpy(outputs)
    return (tensor.sigmoid() if task.binary_labels else tensor.softmax(-1)).numpy()
