"""HTML pages of the runs: one per run and one overview; self-contained files with light and dark theme."""

import re
import warnings
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from esm2kit.core.files import atomic_path
from esm2kit.notebook.runs.history import describe_silent_cells, format_number, metric_label
from esm2kit.notebook.runs.manifest import NotebookRun, RunManifest, read_runs

TEMPLATES = PackageLoader(__package__)
# Seconds between reloads of the page of a run in progress.
REFRESH_SECONDS = 15
COLUMNS = 6


def render_run_page(name: str, manifest: RunManifest) -> str:
    """Render the page of one run, with links to its executed notebooks and artefacts.

    Args:
        name: folder name of the run.
        manifest: its manifest.

    Returns:
        HTML.
    """
    silent_cells, entries = describe_silent_cells(manifest), manifest.notebooks
    all_entries = {name: NotebookRun({}, "planned") for name in manifest.planned} | entries
    done = sum(entry.status == "done" for entry in entries.values())
    if manifest.status == "done":
        progress = f"{'1 notebook' if done == 1 else f'{done} notebooks'} in {_format_duration(manifest.seconds)}"
    else:
        progress = f"{manifest.state}, {done} of {len(all_entries)} notebooks done"
    return _render(
        "run.html.j2",
        title=name,
        head=f"Tier {manifest.tier}: {progress}",
        manifest=manifest,
        notebooks=dict(sorted(all_entries.items())),
        error=entries[manifest.current_notebook].error if manifest.current_notebook in entries else None,
        refresh=REFRESH_SECONDS if manifest.status == "running" else None,
        silent_cells=silent_cells[:1].upper() + silent_cells[1:],
    )


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def render_notebook_page(executed: Path) -> str:
    """Render an executed notebook as a self-contained HTML page.

    Args:
        executed: the .ipynb file.

    Returns:
        HTML.
    """
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    # join the lines of a long log, which are separate outputs, so that the page can fold them
    settings = Config({"CoalesceStreamsPreprocessor": {"enabled": True}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporter = HTMLExporter(
            config=settings, template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True
        )
        exporter.extra_loaders = [TEMPLATES]
        exporter.template_file = "notebook.html.j2"
        return _rewrite_links(exporter.from_filename(str(executed))[0])


def _rewrite_links(page: str) -> str:
    """Rewrite the links of a notebook, which are relative to `notebooks`, for the page of a run."""
    page = re.sub(r'<a href="(\w+)\.ipynb', r'<a href="\1.html', page)
    return page.replace('<a href="../', '<a href="../../')


def write_runs_page(folder: Path) -> Path:
    """Write `<folder>/index.html`, the overview of all runs, newest first.

    Args:
        folder: papermill_runs.

    Returns:
        Path of the page.
    """
    runs = read_runs(folder)
    columns = list(runs)[:COLUMNS]
    metrics = {metric: [runs[name].figures.get(metric) for name in columns]
               for each in columns for metric in runs[each].figures}  # fmt: skip
    index = folder / "index.html"
    with atomic_path(index) as part:
        part.write_text(
            _render(
                "runs.html.j2",
                title="esm2kit runs",
                head=f"{len(runs)} run{'s' * (len(runs) != 1)} of the notebooks",
                runs=runs,
                newest=dict(list(runs.items())[:1]),
                columns=columns,
                metrics=metrics,
                reports={name: _report_links(folder / name, manifest) for name, manifest in runs.items()},
            ),
            encoding="utf-8",
        )
    return index


def _report_links(run: Path, manifest: RunManifest) -> dict[str, str]:
    """HTML pages that the notebooks of a run created: name -> link from the overview."""
    made = {
        key: item.path_within(run.name) for entry in manifest.notebooks.values() for key, item in entry.made.items()
    }
    return {key: f"{run.name}/{path}" for key, path in made.items() if path.endswith(".html") and (run / path).exists()}


def _render(template: str, **values: Any) -> str:
    environment = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True)
    environment.filters |= {"number": format_number, "metric_label": metric_label}
    return environment.get_template(template).render(values)
