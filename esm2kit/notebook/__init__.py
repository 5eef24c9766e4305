"""Widgets, figures and headless runs of the notebooks; the only package that requires Jupyter. Names load lazily.

`from esm2kit.notebook import *` is the first cell of a notebook: it imports the names below, the public names of
esm2kit, and np, pd, plt, torch, json, Path and cache.
"""

from importlib import import_module
from typing import Any

import esm2kit
from esm2kit.core.lazy import attach

# module -> its public names; a module without names is itself public
_PUBLIC = {
    "records": ("need", "output_name", "record", "work_folder"),
    "display": (
        "captioned",
        "explain_finetuning",
        "follow_progress",
        "format_value",
        "label",
        "layer_chart",
        "model_chart",
        "neighbour_table",
        "prediction_chart",
        "score_chart",
        "summary",
    ),
    "captions": (),
    "predictions": ("new_prediction_chart", "strip_chart", "uncertainty_chart"),
    "diagrams": (),
    "scans": (),
    "live": (),
    "refresh": ("redraw",),
    "widgets": ("Export",),
    "pickers.tasks": ("TaskChoice", "file_picker", "task_picker"),
    "pickers.models": ("compared_models", "label_model", "model_picker"),
    "pickers.shapes": ("layout_picker", "size_picker"),
    "pickers.layers": ("layer_picker",),
    "pickers.maps": ("map_picker", "protein_picker"),
    "pickers.scans": ("position_picker", "sequence_picker"),
    "pickers.runs": ("run_browser",),
}
# other packages' names that the notebooks use -> module and name; a module without a name is imported itself
SHORTHANDS = {
    "np": ("numpy", ""),
    "pd": ("pandas", ""),
    "plt": ("matplotlib.pyplot", ""),
    "torch": ("torch", ""),
    "json": ("json", ""),
    "Path": ("pathlib", "Path"),
    "cache": ("functools", "cache"),
}
_load, _list, _own = attach(__name__, _PUBLIC)
__all__ = sorted({*_own, *esm2kit.__all__, *SHORTHANDS})


def __getattr__(name: str) -> Any:
    if name in SHORTHANDS:
        module, attribute = SHORTHANDS[name]
        return getattr(import_module(module), attribute) if attribute else import_module(module)
    return getattr(esm2kit, name) if name in esm2kit.__all__ else _load(name)


def __dir__() -> list[str]:
    return sorted({*_list(), *__all__})
