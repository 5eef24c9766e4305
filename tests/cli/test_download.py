"""`esm2kit download` on the command line: what it takes for a task, for a model, and for neither."""

from pathlib import Path

import pytest

from esm2kit.cli import download as catalogue
from esm2kit.cli.main import main


@pytest.mark.parametrize("words", [["flip", "gb1"], ["flip/gb1"], ["--what", "flip/gb1"]])
def test_a_task_in_one_word_or_two(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "two_vs_rest.fasta").write_text(">a TARGET=1 SET=train\nMKT\n")
    assert main(["download", *words, "--data_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "gb1" / "two_vs_rest.fasta")


def test_flip_alone_is_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(catalogue, "download", lambda config: asked.append((config.task, config.split)) or [])
    assert main(["download", "flip", "--data_dir", str(tmp_path)]) == 0
    assert main(["download", "flip", "gb1", "--split", "all", "--data_dir", str(tmp_path)]) == 0
    assert asked == [("all", None), ("gb1", "all")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gb1"], "gb1 is a FLIP task: `esm2kit download flip gb1`"),
        (["flip", "gb2"], "unknown FLIP task 'gb2'; did you mean 'gb1'?"),
        (["facebook", "esm2_t6_8M_UR50D"], "is no model and not flip"),
    ],
)
def test_what_is_neither_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["download", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_name_it_lists_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gb1").mkdir()
    assert main(["download", "--data_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "esm2_t6_8M_UR50D" for line in lines)
    assert [line for line in lines if line.endswith("here")] == [line for line in lines if line.split()[0] == "gb1"]
