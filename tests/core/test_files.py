"""One process at a time, and work that goes on where a file system has no locks."""

import errno
import fcntl
import os
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
    """What the file system answers."""
    number = getattr(errno, request.param)

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(number)


@pytest.mark.parametrize("name", ["", ".lock"])
def test_a_folder_or_a_file_is_one_holders(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with hold_lock(path, "not now"):
        with refused("file.locked", path=path), hold_lock(path, "not now"):
            pass
        with refused("file.locked", path=path), hold_lock(path, "not now"):  # the refused left it as it was
            pass
    with hold_lock(path, "not now"):
        assert path.exists()


def test_without_a_refusal_it_is_waited_for(tmp_path: Path) -> None:
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


def test_where_there_are_no_locks_one_warning_says_so(
    tmp_path: Path, no_locks: str, caplog: pytest.LogCaptureFixture
) -> None:
    with lock_run(tmp_path / "my_embed.part", FIRST):
        pass
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{tmp_path / '.my_embed.part.lock'}: no locks there (")
    assert message.endswith(f"{no_locks}), so see to it that no other process works there")
    assert not list(tmp_path.iterdir())
