"""Pickers for training: the size of the model, and the layout of a batch over devices."""

import ipywidgets

from esm2kit.core.errors import InputError
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.hub import LICENCE, is_cached
from esm2kit.notebook.widgets import INK, LABEL, LINE, QUIET, WIDE, View, format_definitions
from esm2kit.training.layout import BatchLayout

SHAPE = {"num_layers": "Layers", "embed_dim": "Width", "attention_heads": "Heads"}


def size_picker(model: str, num_layers: int, embed_dim: int, attention_heads: int) -> View:
    """Choose the size of the model to train: parameters with the names of the arguments.

    Args:
        model: a published size, or custom.
        num_layers: layers of a custom model; disabled for a published size, like the next two.
        embed_dim: embedding width of a custom model.
        attention_heads: attention heads of a custom model.

    Returns:
        A view whose value is an ESM2Config.
    """
    options = [("custom, with the shape below", "custom"), *((name, name) for name in SIZES)]
    if model not in [value for _, value in options]:
        options.append((f"{model} (unknown)", model))
    sizes = ipywidgets.Dropdown(options=options, value=model, description="Model", style=LABEL, layout=WIDE)
    shape = {
        name: ipywidgets.BoundedIntText(
            value=value, min=1, max=100_000, description=label, style=LABEL, disabled=model != "custom"
        )
        for (name, label), value in zip(SHAPE.items(), (num_layers, embed_dim, attention_heads), strict=True)
    }

    def disable_shape(name: str) -> None:
        for control in shape.values():
            control.disabled = name != "custom"

    sizes.observe(lambda change: disable_shape(change["new"]), "value")
    return View({"model": sizes, **shape}, _resolve_size)


def _resolve_size(given: dict[str, object]) -> tuple[ESM2Config, str]:
    name = given["model"]
    if name != "custom" and name not in SIZES:
        raise InputError(
            f"unknown model {name!r}: choose custom or one of {', '.join(SIZES)}",
            code="model.unknown-size",
            name=name,
        )
    size = SIZES[name] if name in SIZES else ESM2Config(*(given[each] for each in SHAPE))
    rows = {
        "shape": f"{format_shape(size)}, {size.attention_heads} heads of {size.head_dim} channels",
        "parameters": format_count(size.num_parameters),
        "to train": f"{format_bytes(16 * size.num_parameters)} for weights, gradients and AdamW's averages in float32; "
        "activations come on top",
    }
    return size, format_definitions(rows)


def format_shape(size: ESM2Config) -> str:
    """Format layers and width of a model.

    Args:
        size: shape of the model.

    Returns:
        Text such as "6 layers × 320".
    """
    return f"{size.num_layers} layer{'s' * (size.num_layers > 1)} × {size.embed_dim}"


def format_size_table(chosen: str) -> str:
    """Format the published sizes as a table with shape, memory and whether the weights are on disk.

    Args:
        chosen: name of the size in bold; any other text marks none.

    Returns:
        A folded <details> element.
    """
    cell = f'style="text-align:right;padding:.1em 0 .1em 1.4em;border-top:1px solid {LINE}"'
    first = f'style="text-align:left;padding:.1em 0;border-top:1px solid {LINE}"'
    rows = ""
    for name, size in SIZES.items():
        weight = "bold" if name == chosen else "normal"
        entries = (
            f"{size.num_layers} × {size.embed_dim}",
            format_count(size.num_parameters),
            format_bytes(4 * size.num_parameters),
            format_bytes(16 * size.num_parameters),
            "yes" if is_cached(name) else "no",
        )
        cells = "".join(f"<td {cell}>{entry}</td>" for entry in entries)
        rows += f'<tr style="font-weight:{weight};background:none"><td {first}>{name}</td>{cells}</tr>'
    heads = ("layers × width", "parameters", "to embed", "to train", "on disk")
    style = f"text-align:right;font-weight:normal;color:{QUIET};padding-left:1.4em"
    head = "".join(f'<th scope="col" style="{style}">{name}</th>' for name in heads)
    note = "Memory is calculated: 4 bytes per parameter for float32 weights, 16 with gradients and AdamW's averages; "
    return (
        f'<details><summary style="cursor:pointer;color:{QUIET}">The official models '
        f"(licence {LICENCE}): sizes and memory</summary>"
        f'<table style="border-collapse:collapse;color:{INK};margin:.3em 0">'
        f'<tr style="background:none"><td></td>{head}</tr>{rows}</table>'
        f'<small style="color:{QUIET}">{note}activations come on top.</small></details>'
    )


def format_bytes(size: float) -> str:
    """Format a number of bytes with a unit, MB or GB.

    Args:
        size: bytes.

    Returns:
        Text such as "2.6 GB".
    """
    if size < 1e8:
        return f"{size / 1e6:,.2g} MB"
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def format_count(number: int) -> str:
    """Format a number of parameters.

    Args:
        number: parameters.

    Returns:
        Text such as "7.5M".
    """
    if number < 1e5:
        return f"{number / 1e3:.0f}K"
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


LAYOUT = {
    "global_batch_size": "Global batch",
    "devices": "Devices",
    "tensor_model_parallel_size": "Tensor parallel",
    "accumulate_grad_batches": "Accumulate",
}


def layout_picker(
    global_batch_size: int,
    devices: int,
    tensor_model_parallel_size: int | None,
    accumulate_grad_batches: int,
    size: View | None = None,
) -> View:
    """Choose how a global batch is split over devices: parameters with the names of the arguments.

    Args:
        global_batch_size: sequences per update.
        devices: devices of this machine.
        tensor_model_parallel_size: devices that share one model's matrices; None if the stage does not support it.
        accumulate_grad_batches: micro-batches of each device per update.
        size: size picker; its attention heads must be divisible by tensor_model_parallel_size.

    Returns:
        A view whose value is a BatchLayout.
    """
    given = (global_batch_size, devices, tensor_model_parallel_size, accumulate_grad_batches)
    controls = {
        name: ipywidgets.BoundedIntText(value=value, min=1, max=1_000_000, description=label, style=LABEL)
        for (name, label), value in zip(LAYOUT.items(), given, strict=True)
        if value is not None
    }
    view = View(controls, lambda parameters: _resolve_layout(parameters, size))
    if size is not None:
        view.follow(size)
    return view


def _resolve_layout(parameters: dict[str, int], size: View | None) -> tuple[BatchLayout, str]:
    layout = BatchLayout.of(**parameters)
    tensor = layout.tensor_model_parallel_size
    heads = size.value.attention_heads if size is not None and tensor > 1 else tensor
    if heads % tensor:
        raise InputError(
            f"attention_heads {heads} is not divisible by tensor_model_parallel_size {tensor}",
            code="layout.heads",
            attention_heads=heads,
            tensor_model_parallel_size=tensor,
        )
    return layout, f"<b>{layout.equation}</b><br>{_describe_layout(layout)}{_render_batch(layout)}"


def _describe_layout(layout: BatchLayout) -> str:
    groups, micro_batches = layout.data_parallel_size, layout.accumulate_grad_batches
    who = "one device" if groups == 1 else f"{groups} data-parallel groups"
    who += f" of {layout.tensor_model_parallel_size} devices" if layout.tensor_model_parallel_size > 1 else ""
    batches = "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"
    return f"One update: {layout.global_batch_size} sequences on {who}, in {batches} of {layout.micro_batch_size} each."


def _render_batch(layout: BatchLayout) -> str:
    """One row per data-parallel group, one block per micro-batch, one square per sequence; empty if too large."""
    rows, blocks, micro = layout.data_parallel_size, layout.accumulate_grad_batches, layout.micro_batch_size
    if rows > 16 or blocks * micro > 64:
        return ""
    squares = "".join(
        f'<rect x="{block * (micro * 11 + 8) + place * 11}" y="{row * 15}" width="9" height="9" rx="2" '
        f'fill="{("#0173b2", "#de8f05")[block % 2]}"/>'
        for row in range(rows)
        for block in range(blocks)
        for place in range(micro)
    )
    width, height = blocks * (micro * 11 + 8), rows * 15
    label = f"{rows} rows of {blocks} blocks of {micro} sequences"
    return (
        f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" '
        f'style="display:block;margin:.6em 0 .2em">{squares}</svg>'
    )
