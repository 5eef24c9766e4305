"""File locks: exclusive, and only a warning on file systems without locks."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.core.files import hold_lock
from esm2kit.core.process_group import Process
from esm2kit.embedding.run import lock_run

FIRST = Process(rank=0, world_size=1, local_rank=0)


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "ENOSYS"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system without locks; returns its error message."""
    number = getattr(errno, request.param)
    fcntl = pytest.importorskip("fcntl")  # what filelock calls on Unix

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(number)


@pytest.mark.parametrize("name", ["", ".lock"])
def test_a_lock_on_a_folder_or_a_file_is_exclusive(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with hold_lock(path, "not now"):
        with refused("file.locked", path=path), hold_lock(path, "not now"):
            pass
        with refused("file.locked", path=path), hold_lock(path, "not now"):  # the failed attempt has not released it
            pass
    with hold_lock(path, "not now"):
        assert path.exists()


def test_without_a_busy_message_the_lock_is_waited_for(tmp_path: Path) -> None:
    released, seen = threading.Event(), []

    def wait() -> None:
        with hold_lock(tmp_path / ".lock", None):
            seen.append(released.is_set())

    with hold_lock(tmp_path / ".lock", None):
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.05)
        released.set()
    other.join()
    assert seen == [True]


def test_a_file_system_without_locks_gives_one_warning(
    tmp_path: Path, no_locks: str, caplog: pytest.LogCaptureFixture
) -> None:
    with lock_run(tmp_path / "my_embed.part", FIRST):
        pass
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{tmp_path / '.my_embed.part.lock'}: the file system has no locks (")
    assert f"{no_locks})" in message
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_created_is_an_error_not_a_missing_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(OSError, match="directory"), hold_lock(tmp_path, "busy"):
        pass
    assert (tmp_path / ".lock").is_dir()


def test_a_lock_leaves_no_file_and_survives_the_end_of_its_holder(tmp_path: Path) -> None:
    holder = f"""
import os
from pathlib import Path
from esm2kit.core.files import hold_lock
with hold_lock(Path({str(tmp_path)!r}), "busy"):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", holder], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "left by the killed process"
    with hold_lock(tmp_path, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []
