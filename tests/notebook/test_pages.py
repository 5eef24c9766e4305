"""Pages of the runs: the result, the progress, and the notebook that is running or failed."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from support.errors import refused
from support.reports import report, row, score

from esm2kit import plots
from esm2kit.benchmarking.page import build_score_table
from esm2kit.core.files import write_json
from esm2kit.notebook.runs.manifest import Artefact, NotebookRun, RunManifest, identify_process, read_manifest
from esm2kit.notebook.runs.pages import (
    name_file,
    render_notebook_page,
    render_run_page,
    replace_navigation,
    write_runs_page,
)
from esm2kit.pages import build_figure, format_sentence, render_page

RESULT = "Validation perplexity is 16.73; guessing by frequency gives 17.52."


ERROR = "cell 5: InputError: letter 'J' <b>at</b> residue 12"


def manifest(*statuses: str, **more: Any) -> RunManifest:
    """Manifest of a run of three notebooks with these statuses."""
    names = ("00_first", "01_second", "02_third")
    entries = {
        name: NotebookRun(
            {},
            status,
            seconds=60.0,
            error=ERROR if status == "failed" else None,
            result=RESULT if (name, status) == ("00_first", "done") else "",
        )
        for name, status in zip(names, statuses, strict=False)
    }
    head = {"tier": "sample", "created": "2026-01-01T10:20:30+00:00", "git_commit": "0" * 40, "planned": names}
    return RunManifest(**head | {"process": identify_process(), "notebooks": entries} | more)


def element_text(page: str, tag: str) -> str:
    """Text of the first element of a kind on a page."""

    class Found(HTMLParser):
        depth, text = 0, ""

        def handle_starttag(self, name: str, attributes: Any) -> None:
            self.depth += name == tag and not self.text

        def handle_endtag(self, name: str) -> None:
            self.depth = 0 if name == tag else self.depth

        def handle_data(self, data: str) -> None:
            self.text += data if self.depth else ""

    found = Found()
    found.feed(page)
    return " ".join(found.text.split())


def ended_process() -> dict[str, Any]:
    """A process of this machine that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return identify_process() | {"pid": ended.pid}


@pytest.mark.parametrize(
    ("found", "status", "headline"),
    [
        (manifest("done", "done", "done"), "done", "3 notebooks in 3.0 minutes"),
        (manifest("done", "running"), "running", "Running 01_second, 1 of 3 notebooks done"),
        (manifest("done"), "running", "Running 01_second, 1 of 3 notebooks done"),
        (manifest("done", "failed"), "failed", "Failed in 01_second, 1 of 3 notebooks done"),
        (manifest("done", "running", process=ended_process()), "interrupted",
         "Interrupted in 01_second, 1 of 3 notebooks done"),
        (manifest("done", process=ended_process()), "interrupted",
         "Interrupted in 01_second, 1 of 3 notebooks done"),
        (manifest(process=ended_process(), planned=()), "interrupted",
         "Interrupted in its first notebook, 0 of 0 notebooks done"),
        (manifest("running", process={"host": "elsewhere", "pid": 1}), "running",
         "Running 00_first, 0 of 3 notebooks done"),
    ],
)  # fmt: skip
def test_the_headline_shows_the_progress_of_a_run(found: RunManifest, status: str, headline: str) -> None:
    assert found.status == status
    page = render_run_page("sample-1", found)
    assert element_text(page, "h1") == headline
    assert f"{headline}</title>" in page
    assert (RESULT in page) == bool(found.result)
    assert ('http-equiv="refresh"' in page) == (status == "running"), "only the page of a running run reloads"
    assert ("To resume: " in page) == (status in ("failed", "interrupted"))
    links = re.findall(r'href="(\w+)\.html">\1<', page)
    assert links == [name for name, each in found.notebooks.items() if each.status in ("done", "failed")]


def test_an_error_is_shown_as_text() -> None:
    page = render_run_page("sample-1", manifest("done", "failed"))
    assert "letter &#39;J&#39; &lt;b&gt;at&lt;/b&gt; residue 12" in page


def test_a_run_from_before_the_plan_was_recorded_is_done_when_its_notebooks_are() -> None:
    assert manifest("done", "done", planned=(), process=None).status == "done"


def test_a_manifest_survives_a_round_trip_and_older_ones_are_read(tmp_path: Path) -> None:
    made = {"index": Artefact("/runs/a/index.html", 3, "0" * 64), "large": Artefact("/runs/a/large", 2**40)}
    complete = manifest("done").with_notebook("01_second", NotebookRun({"seed": 1}, "running", inputs=made, made=made))
    complete.write(tmp_path)
    assert read_manifest(tmp_path) == complete
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert "seconds" not in found["notebooks"]["01_second"], "unknown values are omitted"
    assert found["notebooks"]["01_second"]["made"]["large"] == {"path": "/runs/a/large", "bytes": 2**40}
    old = {"tier": "t", "created": "2026", "git_commit": None, "status": "done", "at": "", "seconds": 1.0,
           "notebooks": {"00_x": {"parameters": {}, "status": "done", "made": {}, "figures": {"a": 1}}}}  # fmt: skip
    write_json(tmp_path / "manifest.json", old)
    assert read_manifest(tmp_path).figures == {"00 a": 1}
    (tmp_path / "manifest.json").write_text("[]")
    with refused("run.unreadable"):
        read_manifest(tmp_path)


def test_the_overview_starts_with_the_newest_run(tmp_path: Path) -> None:
    for day, found in enumerate((manifest("done", "done", "done"), manifest("done", "failed")), 1):
        folder = tmp_path / f"sample-{day}"
        folder.mkdir()
        replace(found, created=f"2026-01-0{day}T00:00:00").write(folder)
        assert read_manifest(folder).seconds == 60.0 * len(found.notebooks)
    page = write_runs_page(tmp_path).read_text()
    assert element_text(page, "h1") == "2 runs of the notebooks"
    assert element_text(page, "p") == f"Newest run: sample-2: failed in 01_second. {RESULT}"


def test_the_page_of_a_notebook_links_to_other_pages_and_folds_a_long_log(tmp_path: Path) -> None:
    links = "[03](03_embed.ipynb), [runs](../papermill_runs/README.md), [site](https://example.org/a.ipynb)"
    cells = [nbformat.v4.new_markdown_cell(links)]
    for lines in (20, 8):
        printed = [nbformat.v4.new_output("stream", name="stdout", text=f"of {lines}: <{n}>\n") for n in range(lines)]
        cells.append(nbformat.v4.new_code_cell("train()", outputs=printed))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "02_pretrain.ipynb")
    page = render_notebook_page(tmp_path / "02_pretrain.ipynb")
    found = [link for link in re.findall(r'<a href="([^"]+)"', page) if link[0] != "#"]
    found = [link for link in found if link != "index.html"]
    assert found == ["03_embed.html", "../../papermill_runs/README.md", "https://example.org/a.ipynb"]
    details = r"<details><summary>(\d+) earlier lines.*?</summary>(.*?)</details>"
    ((count, folded),) = re.findall(details, page, flags=re.S)
    assert int(count) == 17
    assert [f"of 20: &lt;{n}&gt;" in folded for n in range(20)] == [True] * 17 + [False] * 3
    assert "of 8:" not in folded
    assert [page.count(f"of {lines}: &lt;") for lines in (20, 8)] == [20, 8]


def write_notebook(path: Path, *outputs: dict[str, Any]) -> None:
    """An executed notebook whose only code cell displayed these."""
    shown = [nbformat.v4.new_output("display_data", data=data) for data in outputs]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("draw()", outputs=shown)]), path)


def test_the_page_of_a_run_shows_the_score_chart_and_all_other_figures(tmp_path: Path) -> None:
    svg = {name: {"text/html": f'<div class="figure" id="figure-{name}"><svg></svg></div>'} for name in "abc"}
    write_notebook(tmp_path / "02_first.ipynb", {"text/html": "<p>a card</p>"}, svg["a"],
                   {"text/markdown": "*Loss, `train`.* It falls."})  # fmt: skip
    write_notebook(tmp_path / "04_second.ipynb", svg["b"], {"text/markdown": "*Scores.* 5 < 6, **clear**."},
                   {"image/png": "QUJD\n"}, {"text/markdown": "*An image*"}, svg["c"])  # fmt: skip
    found = manifest("done", "done", planned=("02_first", "04_second", "06_third"))
    entries = dict(zip(found.planned, found.notebooks.values(), strict=False))
    (tmp_path / "06_third.ipynb").write_text('{"cells": [')  # being written
    page = render_run_page("sample-1", replace(found, notebooks=entries | {"06_third": entries["04_second"]}), tmp_path)
    main, _, rest = page.partition("<h2>All figures</h2>")
    assert re.findall(r'class="picture" href="([^"]+)"', main) == ["04_second.html#figure-b"]
    assert "<em>Scores.</em> 5 &lt; 6, <strong>clear</strong>." in main
    links = re.findall(r'class="picture" href="([^"]+)" aria-label="([^"]+)"', rest)
    assert links == [
        ("02_first.html#figure-a", "Loss, train, in 02_first"),
        ("04_second.html", "An image, in 04_second"),
    ]
    assert "data:image/png;base64,QUJD" in rest
    assert "figure-c" not in page, "a figure without a caption"
    assert "picture" not in element_text(render_run_page("sample-1", found, tmp_path / "absent"), "main")


def test_speeds_are_separate_from_results() -> None:
    found = manifest("done")
    figures = {"val_perplexity": 16.76, "tokens_per_s": 12_929.0, "matmul_gflops": 198.0}
    found = replace(found, notebooks={"00_first": replace(found.notebooks["00_first"], figures=figures)})
    cells = [" ".join(re.sub(r"<[^>]+>", " ", cell).split())
             for cell in re.findall(r"<td.*?</td>", render_run_page("sample-1", found), re.DOTALL)]  # fmt: skip
    assert cells[2] == "validation perplexity 16.76"
    assert cells[4] == "60 s training (tokens/s) 12,929 matrix product (GFLOP/s) 198"


@pytest.mark.parametrize(
    ("key", "path", "name"),
    [
        ("report", "artefacts/finetune/helix/report.html", "fine-tuning on helix"),
        ("helix", "artefacts/benchmark/helix/report.html", "benchmark of helix"),
        ("report", "report.html", "report"),
        ("model", "artefacts/finetune/helix", "model"),
    ],
)
def test_a_report_is_named_after_its_task(key: str, path: str, name: str) -> None:
    assert name_file(key, path) == name


@pytest.mark.parametrize(
    ("count", "heading", "shown"), [(1, "1 run", "The newest run."), (2, "2 runs", "The newest 2")]
)
def test_the_overview_counts_runs_and_names_reports(tmp_path: Path, count: int, heading: str, shown: str) -> None:
    for day in range(count):
        folder = tmp_path / f"sample-{day}"
        report = folder / "artefacts" / "finetune" / "helix" / "report.html"
        report.parent.mkdir(parents=True)
        report.write_text("")
        found = manifest("done")
        entry = replace(found.notebooks["00_first"], made={"report": Artefact(str(report))},
                        figures={"loss": 2.5, "tokens_per_s": 5.0})  # fmt: skip
        replace(found, notebooks={"00_first": entry}).write(folder)
    page = write_runs_page(tmp_path).read_text()
    assert element_text(page, "h1") == f"{heading} of the notebooks"
    assert f"<p>{shown}" in page
    assert '<a href="sample-0/artefacts/finetune/helix/report.html">fine-tuning on helix</a>' in page
    assert page.index("<h2>Results</h2>") < page.index("loss") < page.index("<h2>Speed</h2>") < page.index("tokens/s")


def test_the_page_of_a_notebook_links_to_the_previous_and_the_next(tmp_path: Path) -> None:
    write_notebook(tmp_path / "01_b.ipynb", {"text/html": "<nav>of the notebook</nav>"})
    page = render_notebook_page(tmp_path / "01_b.ipynb", ["00_a"])
    for others, links in (
        (["00_a"], ["00_a", "index"]),
        (["00_a", "01_b", "02_c"], ["00_a", "index", "02_c"]),
        ([], ["index"]),
    ):
        page = replace_navigation(page, "01_b", others)
        for where in ("top", "bottom"):
            bar = re.search(rf'<nav class="{where}".*?</nav>', page, re.DOTALL)[0]
            assert re.findall(r'href="(\w+).html"', bar) == links
    assert page.count("<nav>of the notebook</nav>") == 1


ROWS = [
    row("finetuned", "m, fine-tuned (full, cnn)", {"rmse": score(1.5, 1.25, 1.75)}),
    row("probe", "m, cnn", {"rmse": score(1.75, 1.5, 2.0)}),
    row("untrained", "untrained m, cnn", {"rmse": score(2.0, 1.75, 2.25)}),
    row("baseline", "mean", {"rmse": score(2.5)}, note="the mean of train"),
    row("baseline", "composition", {"rmse": score(2.25, 2.0, 2.5)}, note="linear on letters"),
]


def test_the_page_of_a_notebook_folds_what_jupyterlab_folds_and_shows_attachments(tmp_path: Path) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    title = nbformat.v4.new_markdown_cell("# T\n\n![A map](attachment:map.png)")
    title.attachments = {"map.png": {"image/png": pixel}}
    shown, folded, injected = (nbformat.v4.new_code_cell(f"{name} = 1") for name in ("shown", "folded", "injected"))
    folded.metadata["jupyter"] = {"source_hidden": True}
    injected.metadata["tags"] = ["injected-parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[title, shown, folded, injected]), tmp_path / "made.ipynb")
    page = render_notebook_page(tmp_path / "made.ipynb")
    assert f'src="data:image/png;base64,{pixel}"' in page
    assert 'alt="A map"' in page
    found = re.findall(r'<details class="source"><summary>([^<]*)</summary>(.*?)</details>', page, flags=re.S)
    assert [summary for summary, _ in found] == ["Code", "Parameters of this run"]
    assert ["folded" in found[0][1], "injected" in found[1][1]] == [True, True]
    assert not any("shown" in body for _, body in found)


def test_a_table_of_scores_describes_each_row_and_marks_the_first() -> None:
    table = build_score_table(report("rmse", ROWS))
    assert [row["marked"] for row in table["rows"]] == [True, False, False, False, False]
    assert [row["cells"][0]["text"] for row in table["rows"][:3]] == [
        "fine-tuned encoder (full, cnn)",
        "CNN probe on the frozen encoder",
        "CNN probe on an untrained encoder",
    ]
    assert [row["cells"][0]["small"] for row in table["rows"]] == [
        "m, fine-tuned (full, cnn)",
        "m, cnn",
        "untrained m, cnn",
        "the mean of train",
        "linear on letters",
    ]
    assert table["rows"][0]["cells"][1]["small"] == "[1.250, 1.750]"
    assert table["rows"][3]["cells"][1]["small"] == "", "a row without an interval shows no dashes"


def test_the_best_baseline_is_the_lowest_error_or_the_highest_score() -> None:
    assert report("rmse", ROWS).best_baseline.name == "composition"
    renamed = [replace(each, metrics={"spearman": each.metrics["rmse"]}) for each in ROWS]
    assert report("spearman", renamed).best_baseline.name == "mean"
    assert report("rmse", ROWS[:3]).best_baseline is None


def test_a_label_with_dollars_is_not_a_formula() -> None:
    labels = [r"$5 \bad{", "$6"]
    assert labels[0] in build_figure(lambda: plots.confusion_matrix([[1, 0], [0, 1]], labels), "", "")["html"]


def test_a_page_has_the_colours_of_its_figures() -> None:
    for theme in ("#0173b2", "#5cb0e8"):
        assert f"--primary: {theme}" in render_page("", "", [], [])


@pytest.mark.parametrize(
    ("note", "sentence"),
    [
        ("measurements.xlsx: id column 'Protein'", "measurements.xlsx: id column 'Protein'."),
        ("sol: no id column", "sol: no id column."),
        ("train 96, validation 12.", "Train 96, validation 12."),
        ("multi-label: 3 labels", "Multi-label: 3 labels."),
        ("2 classes", "2 classes."),
        ("", "."),
    ],
)
def test_a_note_becomes_a_sentence_and_names_keep_their_case(note: str, sentence: str) -> None:
    assert format_sentence(note) == sentence
