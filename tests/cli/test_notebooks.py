"""`esm2kit notebooks`: copies the walkthrough, and never replaces what the user changed."""

import shlex
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.cli import notebooks
from esm2kit.cli.main import main
from esm2kit.cli.notebooks import RECORD, NotebooksConfig, copy_notebooks, find_walkthrough
from esm2kit.notebook.runs import run as runs
from esm2kit.notebook.runs.run import RunConfig, find_root
from esm2kit.notebook.runs.tiers import plan_tier


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_the_checkout(root: Path, tmp_path: Path) -> None:
    text = copy_notebooks(NotebooksConfig(tmp_path / "mine"))
    copied = files_of(tmp_path / "mine")
    del copied[RECORD]
    assert text.splitlines()[0] == f"{tmp_path / 'mine'}: {len(copied)} files copied"
    assert len([name for name in copied if name.startswith("notebooks/0")]) == 8
    for name in ("data/sample/tasks/domain_of_life/sampled.fasta", "data/README.md", "papermill_runs/full.yaml"):
        assert name in copied
    assert all(data == (root / name).read_bytes() for name, data in copied.items())
    plan = plan_tier(tmp_path / "mine", tmp_path / "mine" / "papermill_runs" / "sample.yaml")
    assert len(plan) == 8


def test_the_commands_of_the_text_are_right_for_a_folder_with_blanks(tmp_path: Path) -> None:
    text = copy_notebooks(NotebooksConfig(tmp_path / "my notebooks"))
    command = next(line for line in text.splitlines() if line.startswith("cd "))
    assert shlex.split(command) == ["cd", str(tmp_path / "my notebooks")]


def test_files_that_the_user_changed_are_kept_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["notebooks", str(tmp_path)]) == 0
    before = files_of(tmp_path)
    notebook, tier = tmp_path / "notebooks" / "03_embed.ipynb", tmp_path / "papermill_runs" / "mine.yaml"
    notebook.write_text("my notes")
    tier.write_text("03_embed: {}\n")
    (tmp_path / "notebooks" / "05_finetune.ipynb").unlink()
    capsys.readouterr()
    assert main(["notebooks", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 file copied" in shown
    assert "kept your changes: notebooks/03_embed.ipynb" in shown
    assert shown.count("kept") == 1
    assert notebook.read_text() == "my notes"
    after = files_of(tmp_path)
    assert after.pop("papermill_runs/mine.yaml") == b"03_embed: {}\n"
    assert {name for name in before if before[name] != after[name]} == {"notebooks/03_embed.ipynb"}


def test_files_of_an_older_version_are_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, mine = (tmp_path / name for name in ("old", "new", "mine"))
    for folder, text in ((old, "1"), (new, "2")):
        folder.mkdir()
        for name in ("a", "b", "c"):
            (folder / name).write_text(name + text)
    for folder in (old, new, new):
        monkeypatch.setattr(
            notebooks, "find_walkthrough", lambda folder=folder: {name: folder / name for name in "abc"}
        )
        shown = copy_notebooks(NotebooksConfig(mine))
        if folder == old:
            (mine / "b").write_text("my own")
    assert [(mine / name).read_text() for name in "abc"] == ["a2", "my own", "c2"]
    assert "kept your changes: b;" in shown
    (mine / RECORD).write_text("not JSON")
    (mine / "c").write_text("c1")
    assert "kept your changes: c;" in copy_notebooks(NotebooksConfig(mine)), "without a record nothing is replaced"


def test_a_checkout_is_not_copied_onto_itself(root: Path, tmp_path: Path) -> None:
    with refused("notebooks.source", path=root):
        copy_notebooks(NotebooksConfig(root))
    assert not (root / RECORD).exists()
    (tmp_path / "file").write_text("")
    with refused("output.unwritable"):
        copy_notebooks(NotebooksConfig(tmp_path / "file"))


def test_runs_use_the_notebooks_of_the_current_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    copy_notebooks(NotebooksConfig(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path / "mine")
    assert RunConfig().root == tmp_path / "mine"
    monkeypatch.chdir(tmp_path / "mine" / "notebooks")
    assert find_root() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert find_root() == root
    monkeypatch.setattr(runs, "CHECKOUT", tmp_path / "site-packages")
    assert main(["run", "sample"]) == 2
    assert "Run `esm2kit notebooks DIR`" in capsys.readouterr().err
    assert not (tmp_path / "papermill_runs").exists()


def test_a_damaged_notebook_is_reported_in_one_line(tmp_path: Path) -> None:
    copy_notebooks(NotebooksConfig(tmp_path))
    (tmp_path / "notebooks" / "01_preprocess.ipynb").write_text('{"cells": [')
    with refused("notebook.damaged", path=str(tmp_path / "notebooks" / "01_preprocess.ipynb")):
        plan_tier(tmp_path, tmp_path / "papermill_runs" / "sample.yaml")


def test_an_installation_without_the_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebooks, "__file__", str(tmp_path / "esm2kit" / "cli" / "notebooks.py"))
    with refused("notebooks.absent", path=tmp_path / "esm2kit"):
        find_walkthrough()


@pytest.mark.parametrize(("module", "install"), [("papermill", '"esm2kit[notebooks]"'), ("yaml", "pyyaml")])
def test_a_missing_package_of_the_notebooks_names_their_extra(
    module: str, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    lines = ['papermill>=2.7; extra == "notebooks"', "pyyaml>=6", 'pyyaml-tools; extra == "notebooks"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr("esm2kit.cli.main._run", fail)
    assert main(["run"]) == 2
    assert f"Run `pip install {install}`" in capsys.readouterr().err
