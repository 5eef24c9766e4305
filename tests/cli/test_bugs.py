"""An unexpected exception in any stage: one line, a file with the traceback, exit code 1."""

import re
from pathlib import Path

import pytest

from esm2kit.cli import main as command
from esm2kit.cli.main import main


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every stage fails in a way that nobody expects; temporary files go to tmp_path."""

    def fail(*_: object) -> int:
        raise ZeroDivisionError("division of\nresidues by é")

    monkeypatch.setattr(command, "_run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("ESM2KIT_DEBUG", raising=False)


def test_one_line_names_the_file_with_the_traceback(bug: None, capsys: pytest.CaptureFixture) -> None:
    assert main(["embed", "my.fasta"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esm2kit: unexpected ZeroDivisionError: division of residues by é.")
    assert "please report it" in line
    log = Path(re.search(r"The traceback is in (\S+)\.$", line)[1]).read_text(encoding="utf-8")
    assert log.startswith("esm2kit embed my.fasta\n")
    assert "Traceback (most recent call last)" in log
    assert '"torch": ' in log


def test_without_a_place_for_the_file_the_line_says_how_to_see_it(
    bug: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert main(["embed", "my.fasta"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Set ESM2KIT_DEBUG=1 to see the traceback.")


def test_the_traceback_is_shown_on_request(bug: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESM2KIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["embed", "my.fasta"])
