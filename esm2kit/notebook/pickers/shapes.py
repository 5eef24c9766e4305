"""The pickers of training: how large the model is, and how a batch is laid over devices."""

import ipywidgets
from huggingface_hub import try_to_load_from_cache

from esm2kit.core.errors import InputError
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.hub import INDEXES, OFFICIAL_MODELS, SINGLE_FILES
from esm2kit.notebook.widgets import INK, LABEL, LINE, QUIET, WIDE, View, definition_list
from esm2kit.training.layout import BatchLayout

SHAPE = {"num_layers": "Layers", "embed_dim": "Width", "attention_heads": "Heads"}


def size_picker(model: str, num_layers: int, embed_dim: int, attention_heads: int) -> View:
    """Choose how large a model to train; parameters of these names, value an ESM2Config.

    Args:
        model: a published size, or custom.
        num_layers: of a custom model; a published one has its own, and these three are greyed out.
        embed_dim: of a custom model.
        attention_heads: of a custom model.
    """
    options = [("custom, of the shape below", "custom"), *((name, name) for name in SIZES)]
    if model not in [value for _, value in options]:
        options.append((f"{model} (unknown)", model))
    sizes = ipywidgets.Dropdown(options=options, value=model, description="Model", style=LABEL, layout=WIDE)
    shape = {
        name: ipywidgets.BoundedIntText(
            value=value, min=1, max=100_000, description=label, style=LABEL, disabled=model != "custom"
        )
        for (name, label), value in zip(SHAPE.items(), (num_layers, embed_dim, attention_heads), strict=True)
    }

    def grey_out(name: str) -> None:
        for control in shape.values():
            control.disabled = name != "custom"

    sizes.observe(lambda change: grey_out(change["new"]), "value")
    return View({"model": sizes, **shape}, _size_value)


def _size_value(given: dict[str, object]) -> tuple[ESM2Config, str]:
    name = given["model"]
    if name != "custom" and name not in SIZES:
        raise InputError(
            f"model {name!r} is unknown: choose custom or one of {', '.join(SIZES)}",
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
    return size, definition_list(rows)


def format_shape(size: ESM2Config) -> str:
    """Layers and width, the words that name a size."""
    return f"{size.num_layers} layer{'s' * (size.num_layers > 1)} × {size.embed_dim}"


def size_table(chosen: str) -> str:
    """The published sizes as a table, the chosen one in bold: shape, memory, and whether its weights are here."""
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
    note = "Memory is arithmetic: 4 bytes a parameter for float32 weights, 16 with gradients and AdamW's averages; "
    return (
        f'<table style="border-collapse:collapse;color:{INK};margin:.3em 0">'
        f'<tr style="background:none"><td></td>{head}</tr>{rows}</table>'
        f'<small style="color:{QUIET}">{note}activations come on top.</small>'
    )


def format_bytes(size: float) -> str:
    """Bytes as a person reads them."""
    if size < 1e8:
        return f"{size / 1e6:,.2g} MB"
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def format_count(number: int) -> str:
    """Parameters as a person counts them."""
    if number < 1e5:
        return f"{number / 1e3:.0f}K"
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def is_cached(name: str) -> bool:
    """Whether an official model's tensors lie in the Hugging Face cache, so that no network is needed."""
    official = OFFICIAL_MODELS[name]
    return any(
        isinstance(try_to_load_from_cache(official.repo, file, revision=official.revision), str)
        for file in (*SINGLE_FILES, *INDEXES)
    )


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
    """Lay a global batch over devices; parameters of these names, value a BatchLayout.

    Args:
        global_batch_size: sequences of one update.
        devices: of this machine.
        tensor_model_parallel_size: devices that share one model's matrices; None where the stage does not cut them.
        accumulate_grad_batches: micro-batches a device works through for one update.
        size: a size picker, whose model's heads tensor parallel has to divide; the layout follows its choice.
    """
    given = (global_batch_size, devices, tensor_model_parallel_size, accumulate_grad_batches)
    controls = {
        name: ipywidgets.BoundedIntText(value=value, min=1, max=1_000_000, description=label, style=LABEL)
        for (name, label), value in zip(LAYOUT.items(), given, strict=True)
        if value is not None
    }
    view = View(controls, lambda parameters: _layout_value(parameters, size))
    if size is not None:
        view.follow(size)
    return view


def _layout_value(parameters: dict[str, int], size: View | None) -> tuple[BatchLayout, str]:
    layout = BatchLayout.of(**parameters)
    tensor = layout.tensor_model_parallel_size
    heads = size.value.attention_heads if size is not None and tensor > 1 else tensor
    if heads % tensor:
        raise InputError(
            f"attention_heads {heads} do not divide among tensor_model_parallel_size {tensor}",
            code="layout.heads",
            attention_heads=heads,
            tensor_model_parallel_size=tensor,
        )
    return layout, f"<b>{layout.equation}</b><br>{_layout_sentence(layout)}{_batch_svg(layout)}"


def _layout_sentence(layout: BatchLayout) -> str:
    groups, turns = layout.data_parallel_size, layout.accumulate_grad_batches
    who = "one device" if groups == 1 else f"{groups} data-parallel groups"
    who += f" of {layout.tensor_model_parallel_size} devices" if layout.tensor_model_parallel_size > 1 else ""
    when = "in one go" if turns == 1 else f"in {turns} turns"
    return f"An update: {layout.global_batch_size} sequences, {layout.micro_batch_size} at a time, on {who}, {when}."


def _batch_svg(layout: BatchLayout) -> str:
    """A row a data-parallel group, a block a turn, a square a sequence; none where it would be too large."""
    rows, turns, micro = layout.data_parallel_size, layout.accumulate_grad_batches, layout.micro_batch_size
    if rows > 16 or turns * micro > 64:
        return ""
    squares = "".join(
        f'<rect x="{turn * (micro * 11 + 8) + place * 11}" y="{row * 15}" width="9" height="9" rx="2" '
        f'fill="{("#0173b2", "#de8f05")[turn % 2]}"/>'
        for row in range(rows)
        for turn in range(turns)
        for place in range(micro)
    )
    width, height = turns * (micro * 11 + 8), rows * 15
    label = f"{rows} rows of {turns} blocks of {micro} sequences"
    return (
        f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" '
        f'style="display:block;margin:.6em 0 .2em">{squares}</svg>'
    )
