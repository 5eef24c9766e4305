"""Standard input and pipes as input files."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.sequences.fasta import find_fasta_files, read_fasta, strip_fasta_suffix
from esm2kit.sequences.pipes import STDIN, copy_pipes, is_pipe

TEXT = b">a\nMKV\n>b\nMKL\n"


@pytest.fixture
def pipe(tmp_path: Path) -> Callable[[bytes], Path]:
    """Make a named pipe that another thread writes to, as a shell does for `<(command)`."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes in folders")

    def make(content: bytes, name: str = "named.fasta") -> Path:
        path = tmp_path / name
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        return path

    return make


def pipe_into_stdin(monkeypatch, content: bytes, isatty: bool = False) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: isatty))


@pytest.mark.parametrize("block", [b"", b"M" * 70_000])
def test_reader_opens_a_pipe_once(pipe, block: bytes) -> None:
    records = list(read_fasta(pipe(TEXT + b">c\n" + b"M" * 5 + block + b"\n")))
    assert [record.id for record in records] == ["a", "b", "c"]
    assert records[0].sequence == "MKV"
    assert len(records[2].sequence) == 5 + len(block)


def test_copy_of_a_pipe_is_named_by_its_content(tmp_path: Path, pipe) -> None:
    plain = tmp_path / "plain.fasta"
    plain.write_bytes(TEXT)
    with copy_pipes([plain, pipe(TEXT)], tmp_path / "out", "x_input.fasta") as files:
        assert files[0] == plain
        assert files[1].read_bytes() == TEXT
    os.utime(files[1], ns=(1, 1))
    with copy_pipes([pipe(TEXT, "again.fasta")], tmp_path / "out", "x_input.fasta") as again:
        assert again == files[1:]
    assert again[0].stat().st_mtime_ns == 1, "the same content must keep its file and its time"
    with copy_pipes([pipe(TEXT + b"A", "other.fasta")], tmp_path / "out", "x_input.fasta") as other:
        assert other != again
    assert sorted((tmp_path / "out").iterdir()) == sorted([*again, *other])


def test_refused_input_leaves_no_copy(tmp_path: Path, pipe) -> None:
    with (
        pytest.raises(InputError),
        copy_pipes([pipe(TEXT)], tmp_path / "out", "x.fasta"),
    ):
        raise InputError("refused", code="any.thing")
    assert not list((tmp_path / "out").iterdir())


def test_standard_input(tmp_path: Path, monkeypatch) -> None:
    pipe_into_stdin(monkeypatch, TEXT)
    files = find_fasta_files("-")
    assert files == [STDIN]
    assert strip_fasta_suffix(files[0]) == "stdin"
    with copy_pipes(files, tmp_path, "stdin_input.fasta") as copies:
        assert [record.id for record in read_fasta(copies[0])] == ["a", "b"]


def test_refused_pipes(tmp_path: Path, monkeypatch, pipe) -> None:
    pipe_into_stdin(monkeypatch, b"", isatty=True)
    with refused("pipe.terminal"), copy_pipes([STDIN], tmp_path, "x.fasta"):
        pass
    pipe_into_stdin(monkeypatch, b"")
    with refused("pipe.empty"), copy_pipes([STDIN], tmp_path / "none", "x.fasta"):
        pass
    assert not (tmp_path / "none").exists()
    with refused("pipe.processes", processes=2), copy_pipes([STDIN], tmp_path, "x.fasta", 2):
        pass


def test_files_are_not_pipes(tmp_path: Path) -> None:
    path = tmp_path / "a-b.fasta"
    path.write_bytes(TEXT)
    assert not is_pipe(path)
    assert not is_pipe(tmp_path)
    assert not is_pipe(tmp_path / "absent")
    assert strip_fasta_suffix(tmp_path / "fd" / "63.fasta") == "63"
    with copy_pipes([path], tmp_path / "out", "x.fasta") as files:
        assert files == [path]
    assert not (tmp_path / "out").exists()


def test_companion_files_of_macos_are_skipped_and_said(tmp_path: Path, caplog) -> None:
    (tmp_path / "x.fasta").write_bytes(TEXT)
    (tmp_path / "._x.fasta").write_bytes(b"\0\x05\x16\x07")
    assert find_fasta_files(tmp_path) == [tmp_path / "x.fasta"]
    assert "._x.fasta" in caplog.text
    (tmp_path / "x.fasta").unlink()
    with refused("fasta.none"):
        find_fasta_files(tmp_path)
