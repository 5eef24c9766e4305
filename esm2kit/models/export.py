"""`esm2kit export`: convert a model to the formats of other programs."""

import os
import tempfile
from pathlib import Path

from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import check_output_folder
from esm2kit.models.config import ExportConfig
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.load import load_model


def export(config: ExportConfig) -> str:
    """Convert a model.

    Args:
        config: the options of the export.

    Returns:
        A line with the model, the format and the output path.

    Raises:
        InputError: the output exists, or the model cannot be loaded.
    """
    check_type(config, ExportConfig, "config")
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out} already exists. Choose another name.", code="export.exists", path=out)
    if config.format == "fair-esm" and out.suffix != ".pt":
        raise InputError(
            f"{out}: fair-esm reads only .pt files. Choose a name that ends in .pt.", code="export.suffix", path=out
        )
    check_output_folder(out.parent)
    model, source = load_model(config.model)
    if config.format == "huggingface":
        _save_complete_folder(model, out)
    else:
        save_fair_esm(model, out)
    return f"{source.name} as {config.format}: {out}"


def _save_complete_folder(model: ESM2, out: Path) -> None:
    """Write the Hugging Face folder next to its final place, and rename it once it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".esm2kit-", dir=out.parent) as work:
        folder = Path(work) / "export"
        save_hf(model, folder)
        os.replace(folder, out)
