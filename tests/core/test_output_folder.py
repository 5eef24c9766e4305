"""Every stage tries its output folder before the work: one line, nothing computed, nothing left behind."""

import os
from pathlib import Path

import pytest
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.cli.main import main
from esm2kit.core.files import check_output_folder

SETTINGS = {
    "preprocess": ["{work}/a.fasta"],
    "embed": ["{work}/a.fasta", "--model", "{work}/m.safetensors"],
    "benchmark": ["protein_value", "--data_dir", "{work}/tasks", "--model", "{work}/m.safetensors"],
    "finetune": ["protein_value", "--data_dir", "{work}/tasks", "--model", "{work}/m.safetensors"],
    "compare": ["{work}/a", "{work}/b"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "a.fasta").write_text(">a\nMKVLAAGGWTEK\n>b\nMKVVVVVVGHG\n")
    write_tiny_model(folder / "m.safetensors")
    write_tasks(folder / "tasks", 24)
    return folder


def test_a_folder_that_can_be_written_to_is_not_created(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_to(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "/proc/nowhere" and not os.path.isdir("/proc/self"):
        pytest.skip("this system has no /proc")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with refused("output.unwritable", path=Path(place)):
        check_output_folder(Path(place))


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_stage_tries_its_folder_first(
    stage: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main([stage, *(word.format(work=work) for word in SETTINGS[stage]), "--out_dir", "file/out"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "file is a file, not a folder" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
