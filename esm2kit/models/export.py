"""`esm2kit export`: a model into the forms other programs read."""

from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.models.config import ExportConfig
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.load import load_model


def export(config: ExportConfig) -> str:
    """Convert a model; returns where it went. Raises: InputError if the target exists or the model cannot be loaded."""
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out} is there already: give another name", code="export.exists", path=out)
    if config.format == "fair-esm" and out.suffix != ".pt":
        raise InputError(f"{out}: fair-esm reads .pt files: give a name that ends so", code="export.suffix", path=out)
    model, source = load_model(config.model)
    (save_hf if config.format == "huggingface" else save_fair_esm)(model, out)
    return f"{source.name} as {config.format}: {out}"
