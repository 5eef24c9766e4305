"""Widgets, figures and headless runs of the notebooks; the only package that requires Jupyter. Names load lazily."""

from esm2kit.core.lazy import attach

# module -> its public names; a module without names is itself public
_PUBLIC = {
    "records": ("need", "record", "work_folder"),
    "display": (
        "captioned",
        "confusion_chart",
        "explain_finetuning",
        "follow_progress",
        "format_value",
        "label",
        "score_chart",
        "summary",
        "verdict",
    ),
    "diagrams": (),
    "live": (),
    "widgets": ("Export",),
    "pickers.tasks": ("file_picker", "task_picker"),
    "pickers.models": ("compared_models", "label_model", "model_picker"),
    "pickers.shapes": ("layout_picker", "size_picker"),
    "pickers.maps": ("map_picker", "protein_picker"),
    "pickers.runs": ("run_browser",),
    "runs.manifest": ("read_manifest",),
}
__getattr__, __dir__, __all__ = attach(__name__, _PUBLIC)
