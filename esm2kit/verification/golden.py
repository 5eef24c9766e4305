"""Reference outputs of official models, as other programs published them: data/golden/<model>.yaml."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from esm2kit.core.errors import InputError
from esm2kit.core.paths import find_packaged_file, find_packaged_files

OUTPUTS = ("logits", "last_hidden_state")
NUMBERS = ("pseudo_perplexity", "contact_precision")


class GoldenOutput(NamedTuple):
    """Published values of an output of a model.

    Args:
        name: of the block.
        what: what the output is.
        source: where it is published.
        input_ids: token ids of one sequence; there is no padding, whatever the ids are.
        tokens: the same tokens as text, "" if not given.
        output: "logits" or "last_hidden_state".
        shape: (tokens, width) of the complete output.
        values: (rows, columns) the first rows and columns of it.
        atol: allowed absolute difference.
        rtol: allowed difference as a share of the value.
    """

    name: str
    what: str
    source: str
    input_ids: tuple[int, ...]
    tokens: str
    output: str
    shape: tuple[int, int]
    values: np.ndarray
    atol: float
    rtol: float


class GoldenNumber(NamedTuple):
    """A published number, such as the pseudo-perplexity of the proteins that `verify` scores.

    Args:
        value: the number.
        atol: allowed difference.
        source: where it is published.
    """

    value: float
    atol: float
    source: str


class Golden(NamedTuple):
    """The reference outputs of a model.

    Args:
        outputs: logits and hidden states.
        numbers: name in NUMBERS -> its published value.
    """

    outputs: tuple[GoldenOutput, ...]
    numbers: dict[str, GoldenNumber]


def read_golden(model: str, path: Path | None = None) -> Golden:
    """Read the reference outputs of a model.

    Args:
        model: official name.
        path: the file. Default: the one of esm2kit for this model.

    Returns:
        The outputs; none if esm2kit has none for this model.

    Raises:
        InputError: the file is not one of reference outputs, or is of another model.
    """
    for file in [path] if path else find_packaged_files("data/golden/esm2_*.yaml"):
        found = _read(file)
        if found["model"] == model:
            return _parse(found["golden"], file)
        if path:
            raise InputError(
                f"{path} has the reference outputs of '{found['model']}', not of {model}. Pass --model {found['model']}"
                " or another file.",
                code="verify.golden-model",
                path=path,
                found=found["model"],
                expected=model,
            )
    return Golden((), {})


def describe_published_precision(model: str) -> str:
    """Describe the published contact precision of a model on other structures.

    Args:
        model: official name.

    Returns:
        The values; empty without one.
    """
    table = yaml.safe_load(find_packaged_file("data/golden/published.yaml").read_text(encoding="utf-8"))
    found = table["contact_precision"]
    if model not in found["values"]:
        return ""
    values = [f"{found['values'][model][name] / 100:.3f} on {what}" for name, what in found["sets"].items()]
    return f"published on other structures: {', '.join(values)} (Lin et al. 2023)"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        is_golden = isinstance(found["model"], str) and isinstance(found["golden"], list)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        is_golden = False
    if not is_golden:
        raise _error(file, "it needs the keys model and golden")
    return found


def _parse(blocks: list[dict[str, Any]], file: Path) -> Golden:
    outputs, numbers = [], {}
    for number, block in enumerate(blocks):
        name = block.get("name", number) if isinstance(block, dict) else number
        try:
            if block["output"] in NUMBERS:
                found = GoldenNumber(_number(block, "value"), _tolerance(block, "atol"), str(block["source"]))
                numbers[block["output"]] = found
            else:
                outputs.append(_parse_output(block))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise _error(file, f"block {name} cannot be read ({' '.join(str(error).split())})") from None
    return Golden(tuple(outputs), numbers)


def _parse_output(block: dict[str, Any]) -> GoldenOutput:
    values = np.array(block["values"], dtype=np.float64)
    (input_ids,), (_, *shape) = block["input_ids"], block["shape"]
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    if block["output"] not in OUTPUTS:
        raise ValueError(f"output is '{block['output']}', expected one of {', '.join((*OUTPUTS, *NUMBERS))}")
    if block["slice"].replace(" ", "") != f"[0,:{len(values)},:{values.shape[1]}]":
        raise ValueError(f"slice {block['slice']} does not fit {len(values)} x {values.shape[1]} values")
    return GoldenOutput(
        block["name"],
        block["what"],
        block["source"],
        tuple(map(int, input_ids)),
        block.get("tokens", ""),
        block["output"],
        (int(shape[0]), int(shape[1])),
        values,
        _tolerance(block, "atol"),
        _tolerance(block, "rtol"),
    )


def _number(block: dict[str, Any], key: str) -> float:
    value = float(block[key])
    if not math.isfinite(value):
        raise ValueError(f"{key} is {value}")
    return value


def _tolerance(block: dict[str, Any], key: str) -> float:
    """Return a tolerance; one that is negative or infinite would fail or pass everything."""
    value = _number(block, key)
    if value < 0:
        raise ValueError(f"{key} is {value}")
    return value


def _error(file: Path, found: str) -> InputError:
    return InputError(
        f"{file} is not a file of reference outputs: {found}. data/golden/esm2_t6_8M.yaml is one.",
        code="verify.golden",
        path=file,
    )
