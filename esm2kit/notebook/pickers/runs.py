"""Picker for headless runs: a view of the parameter `run`."""

from html import escape
from pathlib import Path

import ipywidgets

from esm2kit.core.errors import InputError
from esm2kit.notebook.runs.history import format_number
from esm2kit.notebook.runs.manifest import RunManifest, read_runs
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions


def run_browser(run: str, folder: Path | str) -> View:
    """Choose one of the executed runs: parameter `run`.

    Args:
        run: folder name of a run; empty for the newest finished run.
        folder: papermill_runs.

    Returns:
        A view whose value is the folder of the run; None if no run has finished.
    """
    runs = read_runs(Path(folder))
    options = [("the newest finished run", ""), *((name, name) for name in runs)]
    if run not in [value for _, value in options]:
        options.append((f"{run} (not found)", run))
    choice = ipywidgets.Dropdown(options=options, value=run, description="Run", style=LABEL, layout=WIDE)
    return View({"run": choice}, lambda given: _resolve_run(given["run"], runs, Path(folder)))


def _resolve_run(run: str, runs: dict[str, RunManifest], folder: Path) -> tuple[Path | None, str]:
    finished = [name for name, manifest in runs.items() if manifest.status == "done"]
    name = run or next(iter(finished), "")
    if not name:
        working = [f"{escape(other)} is {escape(each.state)}" for other, each in runs.items()]
        start = "<code>make walkthrough</code>, or <code>esm2kit run --tier sample</code>"
        return (
            None,
            f"{'; '.join(working)}. No run has finished yet."
            if working
            else f"No run has finished yet: start one with {start}.",
        )
    if name not in runs:
        raise InputError(
            f"run {name!r} is not in {folder}, which has {', '.join(runs) or 'no runs'}",
            code="run.unknown",
            name=name,
            known=list(runs),
        )
    manifest = runs[name]
    metrics = "<br>".join(
        f"{escape(key)} <b>{escape(format_number(value))}</b>" for key, value in manifest.figures.items()
    )
    rows = {
        "run": escape(name),
        "tier": escape(manifest.tier),
        "status": escape(manifest.state),
        "started": escape(manifest.created),
        "seconds": f"{manifest.seconds:,.0f}",
        "metrics": metrics or None,
        "page": f"<code>{escape(str(folder / name / 'index.html'))}</code>",
    }
    return folder / name, format_definitions(rows)
