"""HTML pages of the runs: one per run and one overview; self-contained files with light and dark theme."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.notebook.runs.history import describe_silent_cells, format_number, metric_label, split_speeds
from esm2kit.notebook.runs.manifest import NotebookRun, RunManifest, read_runs
from esm2kit.notebook.runs.pictures import choose_main, read_pictures

TEMPLATES = PackageLoader(__package__)
# Seconds between reloads of the page of a run in progress.
REFRESH_SECONDS = 15
COLUMNS = 6
# Folder of a report -> what it reports.
REPORTS = {"benchmark": "benchmark of", "finetune": "fine-tuning on"}


def render_run_page(name: str, manifest: RunManifest, folder: Path | None = None) -> str:
    """Render the page of one run, with links to its executed notebooks and artefacts, and with their figures.

    Args:
        name: folder name of the run.
        manifest: its manifest.
        folder: folder of the executed notebooks. None omits the figures.

    Returns:
        HTML.
    """
    silent_cells, entries = describe_silent_cells(manifest), manifest.notebooks
    all_entries = {name: NotebookRun({}, "planned") for name in manifest.planned} | entries
    done = sum(entry.status == "done" for entry in entries.values())
    if manifest.status == "done":
        progress = f"{format_count(done, 'notebook')} in {_format_duration(manifest.seconds)}"
    else:
        progress = f"{manifest.state}, {done} of {format_count(len(all_entries), 'notebook')} done"
    pictures = {each: read_pictures(folder / f"{each}.ipynb") if folder else [] for each in sorted(entries)}
    main = choose_main(pictures)
    return _render(
        "run.html.j2",
        title=name,
        head=f"{progress[:1].upper()}{progress[1:]}",
        manifest=manifest,
        notebooks=dict(sorted(all_entries.items())),
        error=entries[manifest.current_notebook].error if manifest.current_notebook in entries else None,
        refresh=REFRESH_SECONDS if manifest.status == "running" else None,
        silent_cells=silent_cells[:1].upper() + silent_cells[1:],
        main=main,
        pictures={each: [picture for picture in found if not main or picture != main[1]]
                  for each, found in pictures.items()},
    )  # fmt: skip


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def render_notebook_page(executed: Path, others: Sequence[str] = ()) -> str:
    """Render an executed notebook as a self-contained HTML page.

    Args:
        executed: the .ipynb file.
        others: all notebooks of the run that have a page, for the links at the top.

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
        page = _rewrite_links(exporter.from_filename(str(executed))[0])
        return replace_navigation(page, executed.stem, others)


def replace_navigation(page: str, notebook: str, others: Sequence[str]) -> str:
    """Link a notebook's page to those of the other notebooks of its run.

    Args:
        page: HTML of the notebook.
        notebook: its name.
        others: names of the notebooks that have a page.

    Returns:
        HTML.
    """
    names = sorted({*others, notebook})
    place = names.index(notebook)
    values = {
        "previous": names[place - 1] if place else None,
        "following": names[place + 1] if place + 1 < len(names) else None,
    }
    for where in ("top", "bottom"):
        bar = _render("navigation.html.j2", **values, where=where)
        page = re.sub(rf'<nav class="{where}".*?</nav>', lambda found, bar=bar: bar, page, count=1, flags=re.DOTALL)
    return page


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
    results, speeds = split_speeds(metrics)
    index = folder / "index.html"
    with atomic_path(index) as part:
        part.write_text(
            _render(
                "runs.html.j2",
                title="esm2kit runs",
                head=f"{format_count(len(runs), 'run')} of the notebooks",
                runs=runs,
                newest=dict(list(runs.items())[:1]),
                columns=columns,
                tables={"Results": results, "Speed": speeds},
                shown="The newest run" if len(columns) == 1 else f"The newest {len(columns)} runs",
                reports={name: _report_links(folder / name, manifest) for name, manifest in runs.items()},
            ),
            encoding="utf-8",
        )
    return index


def _report_links(run: Path, manifest: RunManifest) -> dict[str, str]:
    """HTML pages that the notebooks of a run created: text of the link -> link from the overview."""
    found = {}
    for entry in manifest.notebooks.values():
        for key, item in entry.made.items():
            path = item.path_within(run.name)
            if path.endswith(".html") and (run / path).exists():
                found[name_file(key, path)] = f"{run.name}/{path}"
    return found


def name_file(key: str, path: str) -> str:
    """Name a file of a run: a report after its task, another file as the notebook does.

    Args:
        key: name that the notebook recorded.
        path: the file.

    Returns:
        Text of a link, such as "benchmark of domain_of_life".
    """
    parts = path.split("/")
    before = REPORTS.get(parts[-3]) if parts[-1] == "report.html" and len(parts) > 2 else None
    return f"{before} {parts[-2]}" if before else key


def _render(template: str, **values: Any) -> str:
    from nbconvert.filters import markdown2html

    environment = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True)
    environment.filters |= {"number": format_number, "metric_label": metric_label, "markdown": markdown2html}
    environment.globals |= {"name_file": name_file, "split_speeds": split_speeds}
    return environment.get_template(template).render(values)
