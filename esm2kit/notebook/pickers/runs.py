"""Picker for headless runs: a view of the parameter `run`."""

import os
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from esm2kit.core.errors import InputError
from esm2kit.notebook.runs.history import HEADLESS, format_number, metric_label
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
    return _RunView({"run": choice}, lambda given: _resolve_run(given["run"], runs, Path(folder)))


class _RunView(View):
    """A view that the page of a headless run does not show: the run itself is not finished, and stays so there."""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        if not os.environ.get(HEADLESS):
            return super()._repr_mimebundle_(**kwargs)
        shown = "In JupyterLab, one of your runs can be chosen here."
        return {"text/plain": shown, "text/html": f"<p>{shown}</p>"}


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
        f"{escape(metric_label(key))} <b>{escape(format_number(value))}</b>" for key, value in manifest.figures.items()
    )
    page = escape((folder / name / "index.html").as_posix())
    rows = {
        "run": escape(name),
        "settings file": escape(manifest.tier),
        "status": escape(manifest.state),
        "started": escape(manifest.created),
        "duration": f"{manifest.seconds:,.0f} s",
        "results": metrics or None,
        "page": f'<a href="{page}">all notebooks and results of this run</a>',
    }
    return folder / name, format_definitions(rows)
