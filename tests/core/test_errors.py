"""Errors: their codes, the snapshot of their messages, and how a worker reports an error to its parent."""

import pickle
import re
from pathlib import Path

import pytest
from support.error_snapshot import SNAPSHOT, find_errors, format_snapshot

from esm2kit.cli.main import main
from esm2kit.core.errors import ERROR_FILE, InputError, read_recorded_error, record_error


def test_every_error_has_a_code() -> None:
    form = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.[a-z0-9]+(-[a-z0-9]+)*")
    wrong = {error.place: error.code for error in find_errors() if error.code is None or not form.fullmatch(error.code)}
    assert not wrong, 'write InputError(message, code="area.what", ...) with a literal, lower-case, hyphenated code'


def test_messages_match_the_format_snapshot() -> None:
    current = format_snapshot()
    assert SNAPSHOT.read_text() == current, (
        "check the new messages, then run `python tests/support/error_snapshot.py --write`"
    )


def test_an_error_file_and_pickle_preserve_code_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("letter J at residue 3", code="fasta.letter", residue=3, path=Path("a.fasta"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.values) == (str(error), error.code, error.values)
    monkeypatch.delenv(ERROR_FILE, raising=False)
    record_error(error)  # no error file is requested
    assert read_recorded_error(tmp_path / "error.json") is None
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    record_error(error)
    found = read_recorded_error(tmp_path / "error.json")
    assert (str(found), found.code) == (str(error), error.code)
    assert found.values == {"residue": 3, "path": "a.fasta"}
    record_error(KeyError("x"))
    assert str(read_recorded_error(tmp_path / "error.json")) == "KeyError: 'x'"


def test_an_error_file_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert main(["nostage"]) == 2
    assert "unknown stage 'nostage'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{"message": "<NONE>"}', "{"])
def test_an_error_file_in_another_format_is_ignored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text(text)
    assert read_recorded_error(path) is None
