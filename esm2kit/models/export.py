"""`esm2kit export`: a model into the forms other programs read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, refuse_unknown_choices
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.load import load_model


@dataclass(frozen=True)
class ExportConfig:
    """Write a model for Hugging Face or fair-esm; every tensor arrives as it is.

    Args:
        model: official name, hub repository, fair-esm .pt, Hugging Face folder, or our checkpoint.
        out: the folder (huggingface) or the .pt file (fair-esm) to write; must not be there yet.
        format: huggingface (AutoModel.from_pretrained reads it) or fair-esm (esm.pretrained reads it).
    """

    model: str
    out: Path
    format: Literal["huggingface", "fair-esm"] = "huggingface"

    def __post_init__(self) -> None:
        refuse_unknown_choices(self)


def export(config: ExportConfig) -> str:
    """Convert a model; returns where it went. Raises: InputError if the target exists or the model cannot be loaded."""
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out} is there already: give another name")
    if config.format == "fair-esm" and out.suffix != ".pt":
        raise InputError(f"{out}: fair-esm reads .pt files: give a name that ends so")
    model, source = load_model(config.model)
    (save_hf if config.format == "huggingface" else save_fair_esm)(model, out)
    return f"{source['name']} as {config.format}: {out}"
