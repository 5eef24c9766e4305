"""A picker for the layers that are compared on validation."""

import ipywidgets

from esm2kit.benchmarking.config import parse_layers
from esm2kit.core.errors import InputError
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions


def layer_picker(layers: str) -> View:
    """Choose layers: parameter `layers`.

    Args:
        layers: all, or at least two numbers that are separated by commas; 0 is the token embedding, -1 the last layer.

    Returns:
        A view whose value is the text for `BenchmarkConfig.repr_layer`.
    """
    field = ipywidgets.Text(
        value=layers,
        description="Layers",
        placeholder="all, or numbers such as 0,3,6",
        style=LABEL,
        layout=WIDE,
        continuous_update=False,
    )
    return View({"layers": field}, lambda given: _resolve(given["layers"].strip()))


def _resolve(text: str) -> tuple[str, str]:
    numbers = parse_layers(text)
    if numbers is not None and len(numbers) < 2:
        raise InputError(
            f"layers has only one number, {text!r}: enter at least two, or all", code="option.layers", found=text
        )
    shown = "all layers of the model" if numbers is None else ", ".join(map(str, numbers))
    return text, format_definitions({"compared": f"{shown}; 0 is the token embedding, -1 the last layer"})
