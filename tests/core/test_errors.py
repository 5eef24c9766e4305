"""Errors: how a process hands one on."""

import pickle
from pathlib import Path

import pytest

from esm2kit.core.errors import ERROR_FILE, InputError, record_error, recorded_error


def test_an_error_arrives_whole_through_a_file_and_through_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = InputError("letter J at residue 3", code="fasta.letter", residue=3, path=Path("a.fasta"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.values) == (str(error), error.code, error.values)
    monkeypatch.delenv(ERROR_FILE, raising=False)
    record_error(error)  # nobody asks for it
    assert recorded_error(tmp_path / "error.json") is None
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    record_error(error)
    found = recorded_error(tmp_path / "error.json")
    assert (str(found), found.code) == (str(error), error.code)
    assert found.values == {"residue": 3, "path": "a.fasta"}
    record_error(KeyError("x"))
    assert str(recorded_error(tmp_path / "error.json")) == "KeyError: 'x'"
