"""What the notebooks show and ask for; the only package that needs Jupyter's. Its names are imported at first use."""

from esm2kit.core.lazy import attach

# module -> the public names that live there; a module without names is public itself
_PUBLIC = {
    "records": ("need", "record", "work_folder"),
    "display": ("captioned", "explain_finetuning", "follow_progress", "label", "score_chart", "summary", "verdict"),
    "diagrams": (),
    "live": (),
    "widgets": ("Export",),
    "pickers.tasks": ("file_picker", "model_picker", "task_picker"),
    "pickers.shapes": ("layout_picker", "size_picker"),
    "pickers.maps": ("map_picker", "protein_picker"),
    "pickers.runs": ("run_browser",),
    "runs.manifest": ("read_manifest",),
}
__getattr__, __dir__, __all__ = attach(__name__, _PUBLIC)
