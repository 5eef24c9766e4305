"""The pages over runs: one a run, one over all of them; single files, no network, light and dark."""

import re
import warnings
from pathlib import Path
from typing import Any

from jinja2 import Environment

from esm2kit.core.files import atomic_path
from esm2kit.notebook.runs.history import figures_of, read_runs, short, silences, state, with_status, worded

STYLE = """
:root { color-scheme: light dark; --line: #8884; --link: light-dark(#0b57d0, #8ab4f8); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .4rem .8rem .4rem 0; vertical-align: top;
border-bottom: 1px solid var(--line); } a { color: var(--link); } th button { font: inherit; font-weight: 600; background: none;
border: 0; padding: 0; cursor: pointer; color: inherit; text-align: left; } th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; } .failed, .interrupted { color: light-dark(#b3261e, #f2b8b5); font-weight: 600; }
.running { color: light-dark(#0b57d0, #8ab4f8); font-weight: 600; } h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; } .lead { font-size: 1.12rem; }
h2 { margin: 2rem 0 .4rem; font-size: 1.15rem; } th[scope=row] { font-weight: normal; } .wide { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; } td:first-child { white-space: nowrap; }
code, .num { font-variant-numeric: tabular-nums; } td.num, td code { white-space: nowrap; } .small { font-size: .85em; opacity: .8; }
"""
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
  [...body.rows].sort((a, b) => (up ? 1 : -1) * key(a).localeCompare(key(b), "en", {numeric: true}))
    .forEach(row => body.append(row));
};
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh }}">
{% endif %}<title>{{ title }}</title><style>{{ style }}</style></head><body><main><h1>{{ head }}</h1>{{ body }}</main></body></html>
"""
# A page of a run at work is fetched anew every so many seconds: its reader sees it come along.
SECONDS_BETWEEN_LOOKS = 15
RUN = """{% if result %}<p class="lead">{{ result }}</p>
{% endif %}{% if error %}<p class="lead failed">{{ error }}</p>
{% endif %}{% if next %}<p>{{ next }}</p>
{% endif %}<p class="small">Run <code>{{ run }}</code>, started {{ manifest.created[:16] | replace("T", " ") }}, commit
<code>{{ (manifest.git_commit or "none")[:10] }}</code>. <a href="manifest.json">manifest.json</a> holds parameters, hashes and
versions. <a href="../index.html">All runs</a></p>
<div class="wide" tabindex="0" role="region" aria-label="The run's notebooks"><table><thead><tr>{% for head in ("Notebook", "Status", "Seconds", "Figures", "Made") %}
<th scope="col">{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for name, entry in notebooks.items() %}<tr><td>{% if entry.status in ("done", "failed") %}<a href="{{ name }}.html">{{ name }}</a>{% else %}{{ name }}{% endif %}</td>
<td class="{{ entry.status }}">{{ entry.status }}{% if entry.error %}<br><span class="small">{{ entry.error }}</span>{% endif %}</td>
<td class="num">{% if entry.seconds is defined %}{{ "{:,.0f}".format(entry.seconds) }}{% endif %}</td>
<td>{% for key, value in (entry.figures or {}).items() %}{{ key | worded }} <b>{{ value | figure }}</b><br>{% endfor %}</td>
<td>{% for key, item in (entry.made or {}).items() %}<a href="{{ item.path | relative }}">{{ key }}</a><br>{% endfor %}</td></tr>
{% endfor %}</tbody></table></div><p class="small">{{ silences }}</p>"""
RUNS = """{% for name, manifest in newest.items() %}<p class="lead">The newest, <a href="{{ name }}/index.html">{{ name }}</a>:
<span class="{{ manifest.status }}">{{ manifest | state }}</span>. {{ manifest | result }}</p>
{% endfor %}<p class="small">Click a heading, or press Enter on it, to sort. <code>esm2kit runs A B</code> compares two runs,
<code>esm2kit rerun A</code> repeats one.</p>
<h2>Runs</h2><div class="wide" tabindex="0" role="region" aria-label="All runs"><table><thead><tr>{% for head in ("Run", "Tier", "Status", "Started", "Minutes", "Commit", "Reports") %}
<th scope="col"><button type="button">{{ head }}</button></th>{% endfor %}</tr></thead><tbody>
{% for name, manifest in runs.items() %}<tr><td><a href="{{ name }}/index.html">{{ name }}</a></td>
<td>{{ manifest.tier }}</td><td class="{{ manifest.status }}">{{ manifest | state }}</td>
<td class="num">{{ manifest.created[:16] | replace("T", " ") }}</td>
<td class="num" data-key="{{ manifest.seconds }}">{{ "%.1f" | format(manifest.seconds / 60) }}</td>
<td><code>{{ (manifest.git_commit or "none")[:10] }}</code></td>
<td>{% for key, path in reports[name].items() %}<a href="{{ path }}">{{ key }}</a><br>{% endfor %}</td></tr>
{% endfor %}</tbody></table></div>
<h2>Figures</h2><p>The last {{ columns | length }} runs side by side.</p>
<div class="wide" tabindex="0" role="region" aria-label="Figures of the last runs"><table><thead><tr><th scope="col"><button type="button">Figure</button></th>
{% for name in columns %}<th scope="col"><button type="button">{{ name }}</button></th>{% endfor %}</tr></thead><tbody>
{% for figure, values in figures.items() %}<tr><th scope="row">{{ figure | worded }}</th>
{% for value in values %}<td class="num" data-key="{{ value if value is not none else "" }}">{% if value is not none %}{{ value | figure }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div><script>{{ sort }}</script>"""
COLUMNS = 6
# Without the scripts that nbconvert has its pages fetch: the notebooks hold no formula and no live widget. The dark
# colours are JupyterLab's own; a figure keeps its white paper.
NOTEBOOK = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) { DARK :root { --jp-mirror-editor-comment-color: #7fb3b3; } }
body.jp-Notebook { max-width: 64rem; margin: 0 auto; }
.jp-RenderedImage img { border-radius: 4px; max-width: 100%; }
nav, summary { font: 14px/1.5 system-ui, sans-serif; color: var(--jp-content-font-color1); padding: .3rem; } summary { cursor: pointer; }
nav a { color: var(--jp-content-link-color); }
.jp-RenderedMarkdown table { margin-left: 0; } .jp-OutputArea-output table { max-width: 100%; } .jp-Cell-inputWrapper, .jp-OutputArea-output { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--jp-content-link-color); }
</style>{%- endblock -%}
{%- block body_header -%}{{ super() }}<nav><a href="index.html">The run: all notebooks and figures</a></nav>{%- endblock -%}
{%- block stream_stdout -%}
{%- set lines = output.text.splitlines(keepends=True) -%}
{%- if lines | length > MOST -%}
<div class="jp-OutputArea-output"><details><summary>{{ lines | length - LAST }} earlier lines of the log</summary>
<div class="jp-RenderedText"><pre>{{ lines[:-LAST] | join | ansi2html }}</pre></div></details>
<div class="jp-RenderedText"><pre>{{ lines[-LAST:] | join | ansi2html }}</pre></div></div>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
""".replace("MOST", "8").replace("LAST", "3")


def run_page(name: str, manifest: dict[str, Any]) -> str:
    """The HTML page of one run, linking its executed notebooks and what they made."""
    manifest = with_status(manifest)
    told, entries = silences(manifest), manifest["notebooks"]
    planned = {name: {"status": "to come"} for name in manifest.get("planned", ())}
    done = sum(entry["status"] == "done" for entry in entries.values())
    count = f"{done} of {len(planned | entries)} notebooks"
    ended = manifest["status"] == "done"
    again = f"esm2kit run --tier {manifest['tier']} --resume"
    return _page(
        name,
        RUN,
        head=f"Tier {manifest['tier']}: " + (f"{_count(done)} in {_minutes(manifest['seconds'])}" if ended
                                             else f"{state(manifest)}, {count} done"),
        manifest=manifest,
        run=name,
        notebooks=dict(sorted((planned | entries).items())),
        result=result(manifest),
        error=entries.get(manifest["at"], {}).get("error"),
        next=None if ended or manifest["status"] == "running" else f"What came before is kept; {again} goes on from there.",
        refresh=SECONDS_BETWEEN_LOOKS if manifest["status"] == "running" else None,
        silences=told[:1].upper() + told[1:],
    )  # fmt: skip


def result(manifest: dict[str, Any]) -> str:
    """What a run came to, in the sentences its notebooks gave."""
    return " ".join(entry["told"] for _, entry in sorted(manifest["notebooks"].items()) if entry.get("told"))


def _count(notebooks: int) -> str:
    return "1 notebook" if notebooks == 1 else f"{notebooks} notebooks"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def notebook_page(executed: Path) -> str:
    """An executed notebook as an HTML page of its own: no network, light or dark as its reader has it."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    # a cell that printed for minutes has each line as an output of its own; joined, a long log can be folded
    settings = Config({"CoalesceStreamsPreprocessor": {"enabled": True}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporter = HTMLExporter(
            config=settings, template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True
        )
        folder = next(path for path in map(Path, exporter.template_paths) if (path / "static/theme-dark.css").is_file())
        dark = (folder / "static/theme-dark.css").read_text()
        exporter.extra_loaders = [DictLoader({"esm2kit.html.j2": NOTEBOOK.replace("DARK", dark)})]
        exporter.template_file = "esm2kit.html.j2"
        return _links(exporter.from_filename(str(executed))[0])


def _links(page: str) -> str:
    """A notebook's links, written for the folder `notebooks`, as they lead from the page of a run."""
    page = re.sub(r'<a href="(\w+)\.ipynb', r'<a href="\1.html', page)
    return page.replace('<a href="../', '<a href="../../')


def runs_page(folder: Path) -> Path:
    """Write `<folder>/index.html` over all runs in it, newest first; returns its path."""
    runs = read_runs(folder)
    columns = list(runs)[:COLUMNS]
    named = {name: figures_of(runs[name]) for name in columns}
    figures = {figure: [named[name].get(figure) for name in columns] for name in columns for figure in named[name]}
    reports = {name: _reports(folder / name, manifest) for name, manifest in runs.items()}
    index = folder / "index.html"
    with atomic_path(index) as part:
        part.write_text(
            _page(
                "esm2kit runs",
                RUNS,
                head=f"{len(runs)} run{'s' * (len(runs) != 1)} of the notebooks",
                runs=runs,
                newest=dict(list(runs.items())[:1]),
                columns=columns,
                figures=figures,
                reports=reports,
                sort=SORT,
            )
        )
    return index


def _reports(run: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The HTML pages a run's notebooks made: name -> link from the page over all runs."""
    made = {
        key: str(item["path"]).split(f"/{run.name}/", 1)[-1]
        for entry in manifest["notebooks"].values()
        for key, item in entry.get("made", {}).items()
    }
    return {key: f"{run.name}/{path}" for key, path in made.items() if path.endswith(".html") and (run / path).exists()}


def _page(title: str, template: str, head: str, run: str = "", refresh: int | None = None, **values: Any) -> str:
    environment = Environment(autoescape=True)
    environment.filters |= {"figure": short, "state": state, "result": result, "worded": worded}
    # artefacts of a run lie below its folder: a link that moves with it
    environment.filters["relative"] = lambda path: str(path).split(f"/{run}/", 1)[-1]
    from markupsafe import Markup

    values = {key: Markup(value) if key == "sort" else value for key, value in values.items()}
    body = environment.from_string(template).render(run=run, **values)
    around = {"title": f"{title} · {head}", "head": head, "refresh": refresh}
    return environment.from_string(PAGE).render(style=Markup(STYLE), body=Markup(body), **around)
