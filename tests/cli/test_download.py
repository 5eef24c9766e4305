"""`esm2kit download` on the command line: tasks, models and unknown names."""

from pathlib import Path

import pytest

from esm2kit.cli.main import main


@pytest.mark.parametrize("words", [["flip", "gb1"], ["flip/gb1"], ["--what", "flip/gb1"], ["FLIP", "GB1"]])
def test_a_task_as_one_argument_or_two(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "two_vs_rest.fasta").write_text(">a TARGET=1 SET=train\nMKT\n")
    assert main(["download", *words, "--data_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "gb1" / "two_vs_rest.fasta")


def test_flip_alone_downloads_all_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requested = []
    monkeypatch.setattr(
        "esm2kit.tasks.download.download", lambda config: requested.append((config.task, config.split)) or []
    )
    assert main(["download", "flip", "--data_dir", str(tmp_path)]) == 0
    assert main(["download", "flip", "gb1", "--split", "all", "--data_dir", str(tmp_path)]) == 0
    assert requested == [("all", None), ("gb1", "all")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gb1"], "'gb1' is a FLIP task: run `esm2kit download flip gb1`"),
        (["flip", "gb2"], "unknown FLIP task 'gb2'; did you mean 'gb1'?"),
        (["facebook", "esm2_t6_8M_UR50D"], "is neither a model nor 'flip'"),
        (["flip", "scl", "gb1"], "one FLIP task can be downloaded at a time, found scl gb1"),
        (["https://huggingface.co/lab/esm2"], "is not the name of a model on the hub"),
        (["https://huggingface.co/lab/esm2"], "Pass 'lab/esm2'"),
        (["esm2_t6_8M_UR50D", "--split", "sampled"], "--split is only for FLIP tasks"),
        (["lab/esm2", "--mirror", "http://lab.org/{file}"], "--mirror is only for FLIP tasks"),
    ],
)
def test_an_unknown_name_is_a_one_line_error(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["download", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_name_it_lists_models_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("gb1", "aav"):
        (tmp_path / name).mkdir()  # a failed download leaves an empty folder
    (tmp_path / "gb1" / "two_vs_rest.fasta").write_text(">a TARGET=1 SET=train\nMKT\n")
    assert main(["download", "--data_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "esm2_t6_8M_UR50D" for line in lines)
    assert [line for line in lines if line.endswith("downloaded")] == [
        line for line in lines if line.split()[0] == "gb1"
    ]


@pytest.mark.parametrize(("rank", "is_printed"), [(0, True), (1, False)])
def test_only_rank_0_prints_the_result(
    rank: int, is_printed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("esm2kit.cli.main.rank", lambda: rank)
    assert main(["download", "--data_dir", str(tmp_path)]) == 0
    assert bool(capsys.readouterr().out) == is_printed


def test_licences_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    class Fetched:
        revision, folder = "abc", "cache/esm2"

        def check(self) -> None:
            pass

    monkeypatch.setattr("esm2kit.models.hub.fetch", lambda name: Fetched())
    for name, licence in (
        ("esm2_t6_8M_UR50D", "by Meta, MIT licence, please cite doi:10.1126/science.ade2574"),
        ("lab/esm2", "its licence is on https://huggingface.co/lab/esm2"),
    ):
        assert main(["download", name, "--verify", "false"]) == 0
        assert f"{name}: {licence}" in caplog.messages
        assert capsys.readouterr().out.strip() == f"{name} at revision abc: cache/esm2"
    assert main(["download", "--data_dir", str(tmp_path)]) == 0
    assert "by Meta, MIT licence" in capsys.readouterr().out.splitlines()[0]
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "two_vs_rest.fasta").write_text(">a TARGET=1 SET=train\nMKT\n")
    assert main(["download", "flip", "gb1", "--data_dir", str(tmp_path)]) == 0
    assert (
        caplog.messages[-1] == "gb1: licence AFL-3.0 (FLIP's splits), please cite Wu et al. 2016, 10.7554/eLife.16965"
    )
