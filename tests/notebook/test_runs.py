"""Headless runs: parameter checks, failures that retain finished notebooks, comparisons, repeats."""

import errno
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from support.errors import refused

from esm2kit.cli.arguments import parse
from esm2kit.cli.commands import STAGES
from esm2kit.cli.main import main
from esm2kit.core.files import sha256_file
from esm2kit.notebook.records import need, record
from esm2kit.notebook.runs import headless
from esm2kit.notebook.runs.history import compare_runs, describe_silent_cells, find_silent_cells, format_number
from esm2kit.notebook.runs.manifest import Artefact, NotebookRun, RunManifest, read_manifest, read_runs
from esm2kit.notebook.runs.run import RerunConfig, RunConfig, RunsConfig, find_latest_run, rerun, run, runs

FIRST = """
from esm2kit.notebook.records import record
from pathlib import Path
made = Path(work_dir) / "first.txt"
made.parent.mkdir(parents=True, exist_ok=True)
made.write_text(str(size))
record("00_first", work_dir, {"first": made}, {"twice": 2 * size, "rows_per_s": __import__("time").time()})
"""
SECOND = """
from pathlib import Path
from esm2kit.notebook.records import need, record
from esm2kit.core.errors import InputError
first = int(need(Path(work_dir) / "first.txt", "00_first").read_text())
if Path(flag).exists():
    raise InputError("the flag file exists: delete it")
record("01_second", work_dir, {}, {"sum": first + 0.5})
"""


def notebook(path: Path, parameters: str, code: str) -> None:
    cells = [nbformat.v4.new_code_cell(parameters), nbformat.v4.new_code_cell(code.strip())]
    cells[0].metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two notebooks of one second each; the second fails while `flag` exists."""
    notebook(tmp_path / "notebooks" / "00_first.ipynb", 'work_dir: str = "w"  # x\nsize: int = 3  # rows', FIRST)
    second = (
        f'work_dir: str = "w"  # x\nflag: str = {str(tmp_path / "flag")!r}  # the notebook fails if this file exists'
    )
    notebook(tmp_path / "notebooks" / "01_second.ipynb", second, SECOND)
    (tmp_path / "papermill_runs").mkdir()
    (tmp_path / "papermill_runs" / "tiny.yaml").write_text("00_first: {size: 4}\n01_second: {}\n")
    return tmp_path


def config(root: Path, **changes: Any) -> RunConfig:
    return RunConfig(**({"tier": "tiny", "root": root} | changes))


@pytest.mark.parametrize(
    ("changes", "code", "values", "hint"),
    [
        ({"tier": "tny"}, "tier.unknown", {"name": "tny", "known": ["tiny"]}, "did you mean 'tiny'?"),
        ({"only": "1_secnd"}, "tier.notebook", {"name": "1_secnd"}, "did you mean '01_second'?"),
        ({"from_notebook": "07"}, "tier.notebook", {"name": "07"}, ""),
        ({"parameters": ["sise=4"]}, "parameter.unknown", {"name": "sise"}, "did you mean 'size'?"),
        ({"parameters": ["01_second.size=4"]}, "parameter.unknown", {"notebook": "01_second", "name": "size"}, ""),
        ({"parameters": ["size"]}, "parameter.no-value", {"given": "size"}, ""),
        ({"parameters": ["size=["]}, "parameter.not-yaml", {"name": "size", "found": "["}, ""),
        ({"only": "00", "resume": True}, "run.several-choices", {"options": ["--only", "--resume"]}, ""),
    ],
)
def test_invalid_options_are_refused_before_anything_runs(
    root: Path, changes: dict[str, Any], code: str, values: dict[str, Any], hint: str
) -> None:
    with refused(code, **values) as caught:
        run(config(root, **changes))
    assert hint in str(caught.value)
    assert not [path for path in (root / "papermill_runs").iterdir() if path.is_dir() and any(path.glob("*.ipynb"))]


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("00_frist: {}", "tier.notebook", "did you mean '00_first'?"),
        ("00_first: {sizes: 3}", "parameter.unknown", "did you mean 'size'?"),
        ("- 00_first", "tier.form", ""),
    ],
)
def test_invalid_tiers_are_refused(root: Path, text: str, code: str, hint: str) -> None:
    (root / "papermill_runs" / "bad.yaml").write_text(text)
    with refused(code) as caught:
        run(config(root, tier="bad"))
    assert hint in str(caught.value)


def test_a_failure_retains_finished_notebooks_and_resume_continues(root: Path) -> None:
    (root / "flag").write_text("")
    error = "cell 2: InputError: the flag file exists: delete it"
    with refused("run.notebook-failed", notebook="01_second", error=error) as caught:
        run(config(root))
    assert "esm2kit run --tier tiny --resume" in str(caught.value)
    folder = find_latest_run(root, "tiny")
    manifest = read_manifest(folder)
    assert [entry.status for entry in manifest.notebooks.values()] == ["done", "failed"]
    assert manifest.status == "failed"
    assert (folder / "artefacts" / "first.txt").read_text() == "4"
    assert "the flag file exists" in (folder / "01_second.html").read_text()
    assert "failed" in (root / "papermill_runs" / "index.html").read_text()
    before = (folder / "00_first.ipynb").stat().st_mtime_ns

    (root / "flag").unlink()
    assert main(["run", "--tier", "tiny", "--resume", "--root", str(root)]) == 0
    assert (folder / "00_first.ipynb").stat().st_mtime_ns == before, "a finished notebook was run again"
    finished = read_manifest(folder)
    assert finished.status == "done"
    assert "nothing was run" in run(config(root, resume=True, dry_run=True)), "a dry run resumes nothing"
    assert finished.notebooks["01_second"].figures == {"sum": 4.5}
    assert finished.notebooks["00_first"].parameters["size"] == 4
    assert len(finished.notebooks["00_first"].made["first"].sha256) == 64
    assert "nbformat==" in (folder / "environment.txt").read_text()


@pytest.mark.parametrize("default", ["10 * 2", "Path('a')", "size +"])
def test_a_default_that_is_not_a_literal_is_refused(root: Path, default: str) -> None:
    notebook(root / "notebooks" / "00_first.ipynb", f"size: int = {default}  # rows", "print(size)")
    with refused("notebook.default", name="size", found=default):
        run(config(root))


def test_a_notebook_whose_kernel_dies_has_failed(root: Path) -> None:
    parameters = 'work_dir: str = "w"  # x\nsize: int = 3  # rows'
    notebook(root / "notebooks" / "00_first.ipynb", parameters, "import os\n\nos._exit(9)")
    with refused("run.notebook-failed", error="cell 2: the kernel died, possibly out of memory"):
        run(config(root))
    folder = find_latest_run(root, "tiny")
    assert read_manifest(folder).status == "failed"
    assert "the kernel died" in (folder / "index.html").read_text()


def test_a_page_that_cannot_be_written_leaves_the_previous_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(root, only="00"))
    folder = find_latest_run(root, "tiny")
    before = {page.name: page.read_text() for page in (folder / "00_first.html", folder / "index.html")}
    for name in ("render_notebook_page", "render_run_page"):
        previous = (folder / "index.html").read_text()
        with monkeypatch.context() as patch:
            patch.setattr(headless, name, lambda *given: "half a page, then \ud800, which cannot be encoded")
            with pytest.raises(UnicodeEncodeError):
                run(config(root, only="00"))
        page = (folder / "index.html").read_text()
        assert page.endswith("</html>"), "a page is complete"
        assert (page == previous) == (name == "render_run_page"), "the page of the run shows that a notebook started"
        assert before["00_first.html"][:40] == (folder / "00_first.html").read_text()[:40]
        assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("place", ["../elsewhere", "{root}/elsewhere"])
def test_a_custom_work_folder_is_recorded_as_well(root: Path, place: str) -> None:
    run(config(root, only="00", parameters=[f"work_dir={place.format(root=root)}"]))
    entry = read_manifest(find_latest_run(root, "tiny")).notebooks["00_first"]
    assert entry.figures["twice"] == 8
    made = root / "elsewhere" / "first.txt"
    assert made.read_text() == "4"
    assert entry.made["first"] == Artefact(str(made), 1, sha256_file(made))


def test_the_pages_of_a_run_link_to_each_other(root: Path) -> None:
    run(config(root))
    folder = find_latest_run(root, "tiny")
    for page, other in (("00_first", "01_second"), ("01_second", "00_first")):
        assert (folder / f"{page}.html").read_text().count(f'href="{other}.html"') == 2, "at the top and at the bottom"


def test_an_executed_notebook_is_trusted_on_this_machine(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JupyterLab shows figures as SVG only in a trusted notebook; a folder that cannot be written to is no obstacle."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    run(config(root, only="00"))
    executed = find_latest_run(root, "tiny") / "00_first.ipynb"
    found = nbformat.read(executed, as_version=4)
    assert NotebookNotary().check_signature(found)
    found.cells[-1].source += "  # changed"
    assert not NotebookNotary().check_signature(found)
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "file" / "folder"))
    run(config(root, only="00"))
    assert read_manifest(find_latest_run(root, "tiny")).notebooks["00_first"].status == "done"


def test_an_absent_input_names_the_notebook_that_makes_it(root: Path) -> None:
    with refused("run.notebook-failed", notebook="01_second") as caught:
        run(config(root, only="01"))
    assert "first.txt does not exist: run 00_first first" in caught.value.values["error"]
    with refused("notebook.needs", path=str(root / "nowhere"), notebook="02_pretrain"):
        need(root / "nowhere", "02_pretrain")


def test_a_second_run_in_the_same_folder_is_refused(root: Path) -> None:
    run(config(root))
    folder = find_latest_run(root, "tiny")
    holder = f"""
import filelock, sys
lock = filelock.FileLock({str(folder / ".lock")!r})
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        before = (folder / "manifest.json").read_bytes()
        with refused("file.locked"):
            run(config(root, only="00"))
        assert (folder / "manifest.json").read_bytes() == before
        other.stdin.close()


def test_two_runs_started_in_one_second_have_separate_folders(root: Path) -> None:
    def one() -> None:
        code = f"from esm2kit.notebook.runs.run import *; run(RunConfig('tiny', root={str(root)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_runs(root / "papermill_runs")
    assert len(found) == 2
    assert all(manifest.status == "done" for manifest in found.values())


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if "papermill_runs" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with refused("run.unwritable") as caught:
        run(config(root))
    assert "tiny-" in caught.value.values["path"]


def test_latest_run_ignores_other_tiers(root: Path) -> None:
    for name in ("tiny-20260101-000000", "tiny-20260102-000000", "tiny-big-20270101-000000"):
        (root / "papermill_runs" / name).mkdir()
    assert find_latest_run(root, "tiny").name == "tiny-20260102-000000"
    assert find_latest_run(root, "tiny-big").name == "tiny-big-20270101-000000"
    assert find_latest_run(root, "other") is None


def test_rerun_repeats_the_recorded_parameters_and_reports_differences(root: Path) -> None:
    run(config(root, parameters=["size=7"]))
    first = find_latest_run(root, "tiny")
    assert "no metric differs" in rerun(RerunConfig(first.name, root=root))
    again = find_latest_run(root, "tiny")
    assert again != first
    assert read_manifest(again).notebooks["00_first"].figures["twice"] == 14

    changed = root / "notebooks" / "00_first.ipynb"
    changed.write_text(changed.read_text().replace("2 * size", "2.001 * size"))
    with refused("rerun.figures-differ", figures=["00 twice"]):
        rerun(RerunConfig(first.name, root=root))
    shown = rerun(RerunConfig(first.name, tolerance=0.01, root=root))
    assert "within tolerance" in shown
    assert "speed" in shown, "a speed is shown and not compared"


def test_runs_are_listed_and_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no runs" in runs(RunsConfig(root=root))
    run(config(root))
    run(config(root, parameters=["size=5"]))
    names = list(read_runs(root / "papermill_runs"))
    assert main(["runs", "--root", str(root)]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names)
    assert main(["runs", names[1], names[0], "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines() if "size" in line] == [["00_first.size", "4", "5"]]
    assert ["00", "twice", "8", "10"] in [line.split() for line in shown.splitlines()]
    with refused("run.not-two", found=[names[0]]):
        runs(RunsConfig([names[0]], root))
    with refused("run.unknown", name="nosuch", near=None):
        runs(RunsConfig([names[0], "nosuch"], root))
    assert main(["runs", names[0][:-1], "--root", str(root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"did you mean {names[0]!r}?") or line.endswith(f"did you mean {names[1]!r}?")
    assert main(["runs", f"papermill_runs/{names[0]}", "--root", str(root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"found 1: {names[0]}. Example: esm2kit runs {names[0]} {names[1]}")


def test_runs_and_their_comparison_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(root))
    run(config(root, parameters=["size=5"]))
    names = list(read_runs(root / "papermill_runs"))
    capsys.readouterr()
    assert main(["runs", "--format", "json", "--root", str(root)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in listed] == names
    assert [entry["figures"]["00 twice"] for entry in listed] == [10, 8]
    assert all(entry["status"] == "done" and entry["seconds"] > 0 for entry in listed)
    assert main(["runs", names[1], names[0], "--format", "json", "--root", str(root)]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["runs"] == [names[1], names[0]]
    assert comparison["parameters"] == [{"name": "00_first.size", "before": 4, "after": 5, "beyond": True}]
    figures = {each["name"]: (each["before"], each["after"], each["beyond"]) for each in comparison["figures"]}
    assert figures["00 twice"] == (8, 10, True)
    assert figures["01 sum"] == (4.5, 5.5, True)
    assert figures["00 rows_per_s"][2] is None, "a speed is not compared"


def test_a_command_without_arguments_uses_the_defaults() -> None:
    assert parse(RunsConfig, "esm2kit runs", []) == RunsConfig()
    assert parse(RunConfig, "esm2kit run", []) == RunConfig()
    assert main(["pretrain"]) == 2
    assert "runs" in STAGES


SLOW = """
import time
for turn in range({turns}):
    print("turn", turn, flush=True)
    time.sleep({seconds})
"""


def test_a_cell_without_output_is_reported_and_one_with_output_is_not(root: Path) -> None:
    """Two cells of nine seconds, more than others take on a busy machine: one prints every half second, one nothing."""
    path = root / "notebooks" / "01_second.ipynb"
    made = nbformat.read(path, as_version=4)
    made.cells.insert(1, nbformat.v4.new_markdown_cell("A markdown cell is not counted."))
    made.cells.insert(2, nbformat.v4.new_code_cell(SLOW.format(turns=18, seconds=0.5).strip()))
    made.cells.append(nbformat.v4.new_code_cell(SLOW.format(turns=1, seconds=9).strip()))
    nbformat.write(made, path)
    shown = run(config(root))
    manifest = read_manifest(find_latest_run(root, "tiny"))
    ((notebook, cell, seconds),) = find_silent_cells(manifest, 8.5)
    assert (notebook, cell) == ("01_second", 4), "counted in code cells, without papermill's"
    assert 8.5 < seconds < 60
    line = f"no output for over 8.5 s, as on a busy machine: 01_second cell 4 ({seconds:.0f} s)"
    assert describe_silent_cells(manifest, 8.5) == line
    assert ("no output for over" in shown) == (describe_silent_cells(manifest) != "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(21414.0, "21,414"), (2384, "2,384"), (14.3679, "14.37"), (4.7e-8, "4.7e-08"), (True, "True"), ("x", "x"),
     (-1234.6, "-1,235"), (float("nan"), "nan"), (0.0, "0")],
)  # fmt: skip
def test_numbers_are_formatted_for_reading(value: Any, text: str) -> None:
    assert format_number(value) == text


def test_comparison_by_tolerance() -> None:
    def manifest(**figures: float) -> RunManifest:
        entry = NotebookRun({"work_dir": str(figures)}, "done", figures=figures)
        return RunManifest("tiny", "2026-01-01", notebooks={"02_x": entry})

    parameters, figures = compare_runs(
        manifest(same=1, near=1.0, far=1.0, tokens_per_s=5, gone=1),
        manifest(same=1, near=1.00001, far=1.1, tokens_per_s=9),
        tolerance=1e-4,
    )
    assert parameters == []
    assert {difference.name: difference.beyond for difference in figures} == {
        "02 near": False, "02 far": True, "02 tokens_per_s": None, "02 gone": True,
    }  # fmt: skip


def test_a_record_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with refused("record.absent", notebook="00_first", paths=[str(tmp_path / "nowhere")]):
        record("00_first", tmp_path, {"first": tmp_path / "nowhere"}, {})


def test_the_overview_needs_no_network_and_sorts_by_button(root: Path) -> None:
    run(config(root))
    broken = root / "papermill_runs" / "tiny-20200101-000000"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    run(config(root, only="00"))
    page = (root / "papermill_runs" / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('<th scope="col">') == page.count('<th scope="col"><button type="button">') > 6
    assert broken.name not in page
    assert json.loads((find_latest_run(root, "tiny") / "manifest.json").read_text())["tier"] == "tiny"


def test_a_run_is_not_continued_with_other_parameters(root: Path) -> None:
    """A finished notebook is not run again, so its new value would be ignored without a word."""
    run(config(root, parameters=["size=9"]))
    folder = find_latest_run(root, "tiny")
    for changes in ({"resume": True}, {"only": "01"}, {"from_notebook": "01"}):
        with refused("run.other-parameters", notebook="00_first", name="size", before=9, now=4) as caught:
            run(config(root, **changes))
        assert "-p 00_first.size=9" in str(caught.value)
        run(config(root, parameters=["00_first.size=9"], **changes))
    assert read_manifest(folder).notebooks["01_second"].figures == {"sum": 9.5}
    run(config(root, from_notebook="00", parameters=["size=5"]))
    assert read_manifest(folder).notebooks["01_second"].figures == {"sum": 5.5}, "all notebooks were run again"


def test_the_failed_notebook_is_resumed_with_its_parameters_unless_they_are_given(root: Path) -> None:
    flag, gone = root / "other_flag", root / "gone"
    flag.touch()
    with refused("run.notebook-failed"):
        run(config(root, parameters=[f"flag={flag}"]))
    with refused("run.other-parameters", notebook="01_second", name="flag", before=str(flag)):
        run(config(root, resume=True))
    run(config(root, resume=True, parameters=[f"flag={gone}"]))
    entry = read_manifest(find_latest_run(root, "tiny")).notebooks["01_second"]
    assert (entry.status, entry.parameters["flag"]) == ("done", str(gone))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"00_first: {size: 4}\n00_first: {size: 5}\n", "tier.not-yaml"),
        (b"00_first: {size: 4, size: 5}\n", "tier.not-yaml"),
        ("00_first: {size: 4} # \u00e9\n".encode("latin-1"), "tier.not-yaml"),
        (b"00: {size: 4}\n", "tier.notebook"),
        (b"00_first: {3: 4}\n", "parameter.unknown"),
    ],
)
def test_a_tier_that_can_be_misread_is_refused(text: bytes, code: str, root: Path) -> None:
    (root / "papermill_runs" / "bad.yaml").write_bytes(text)
    with refused(code) as caught:
        run(config(root, tier="bad"))
    if text.count(b"00_first") == 2:
        assert "'00_first' occurs twice" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}'])
def test_a_damaged_notebook_is_one_line(text: str, root: Path) -> None:
    path = root / "notebooks" / "01_second.ipynb"
    path.write_text(text, encoding="utf-8")
    with refused("notebook.damaged", path=str(path)):
        run(config(root, dry_run=True))


def test_nothing_compared_is_not_called_equal(root: Path) -> None:
    run(config(root))
    first = find_latest_run(root, "tiny")
    with refused("run.same", name=first.name):
        runs(RunsConfig([first.name, first.name], root))
    for tolerance in (-1.0, float("nan"), float("inf")):
        with refused("rerun.tolerance"):
            RerunConfig(first.name, tolerance=tolerance, root=root)
    manifest = read_manifest(first)
    entries = {
        name: replace(entry, figures={key: value for key, value in entry.figures.items() if key == "rows_per_s"})
        for name, entry in manifest.notebooks.items()
    }
    replace(manifest, notebooks=entries).write(first)
    with refused("rerun.no-metrics", name=first.name):
        rerun(RerunConfig(first.name, root=root))


def test_a_run_whose_manifest_is_damaged_is_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config(root))
    run(config(root))
    whole, damaged = sorted(read_runs(root / "papermill_runs"))
    path = root / "papermill_runs" / damaged / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"size": 4', '"size": 5'), encoding="utf-8")
    shown = runs(RunsConfig(root=root))
    assert whole in shown
    assert damaged not in shown
    assert f"{path} cannot be read, so this run is not listed" in caplog.messages


def test_a_metric_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    with refused("record.not-finite", notebook="02_pretrain", name="loss"):
        record("02_pretrain", tmp_path, {}, {"steps": 3, "loss": float("nan")})
