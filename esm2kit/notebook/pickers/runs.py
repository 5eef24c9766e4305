"""The runs made headless, to look through in a notebook: a view on the parameter `run`."""

from html import escape
from pathlib import Path

import ipywidgets

from esm2kit.core.errors import InputError
from esm2kit.notebook.runs.history import format_number
from esm2kit.notebook.runs.manifest import RunManifest, read_runs
from esm2kit.notebook.widgets import LABEL, WIDE, View, definition_list


def run_browser(run: str, folder: Path | str) -> View:
    """Choose one of the executed runs; parameter `run`, value its folder, None where there is none yet.

    Args:
        run: a run's folder name; empty for the newest that is done.
        folder: papermill_runs.
    """
    runs = read_runs(Path(folder))
    options = [("the newest that is done", ""), *((name, name) for name in runs)]
    if run not in [value for _, value in options]:
        options.append((f"{run} (not there)", run))
    choice = ipywidgets.Dropdown(options=options, value=run, description="Run", style=LABEL, layout=WIDE)
    return View({"run": choice}, lambda given: _run_value(given["run"], runs, Path(folder)))


def _run_value(run: str, runs: dict[str, RunManifest], folder: Path) -> tuple[Path | None, str]:
    finished = [name for name, manifest in runs.items() if manifest.status == "done"]
    name = run or next(iter(finished), "")
    if not name:
        working = [f"{escape(other)} is {escape(each.state)}" for other, each in runs.items()]
        start = "<code>make walkthrough</code>, or <code>esm2kit run --tier sample</code>"
        return None, f"{'; '.join(working)}. None is done yet." if working else f"No run is done yet: {start}."
    if name not in runs:
        raise InputError(
            f"{folder} has no run {name!r}; it has {', '.join(runs) or 'none'}",
            code="run.unknown",
            name=name,
            known=list(runs),
        )
    manifest = runs[name]
    figures = "<br>".join(
        f"{escape(key)} <b>{escape(format_number(value))}</b>" for key, value in manifest.figures.items()
    )
    rows = {
        "run": escape(name),
        "tier": escape(manifest.tier),
        "status": escape(manifest.state),
        "started": escape(manifest.created),
        "seconds": f"{manifest.seconds:,.0f}",
        "figures": figures or None,
        "page": f"<code>{escape(str(folder / name / 'index.html'))}</code>",
    }
    return folder / name, definition_list(rows)
