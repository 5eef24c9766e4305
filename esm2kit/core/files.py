"""Atomic writes, file locks, SHA-256 digests and JSON."""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError

logger = logging.getLogger(__name__)
GIT_LFS_START = b"version https://git-lfs.github.com/spec/"


def sha256_file(path: Path) -> str:
    """Compute the hex SHA-256 digest of a file without loading the complete file into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_git_lfs(path: Path) -> None:
    """Check that a file is not a git-lfs pointer, the short text in place of a large file that was not downloaded.

    Args:
        path: any file; a missing one passes.

    Raises:
        InputError: the file is a pointer.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(len(GIT_LFS_START))
    if start == GIT_LFS_START:
        raise InputError(
            f"{path}: this is a git-lfs pointer, not the file itself. Run 'git lfs pull' in its repository, or "
            "download the file again.",
            code="file.git-lfs",
            path=path,
        )


def to_json(value: Any) -> Any:
    """Convert dataclasses, paths, tuples and numpy or torch scalars to JSON types, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        return value.item()
    return value


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file atomically: it appears under its name only if the block completes without an error.

    Args:
        path: Final path; its folder is created.

    Yields:
        A temporary path in the same folder to write to. It is renamed to `path` after the block, or removed if
        the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name, as processes in containers on two nodes may have the same id
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        fsync(part)
        os.replace(part, path)
        fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_output_folder(folder: Path) -> None:
    """Check that files can be written to a folder, before any work; nothing is created.

    Args:
        folder: The folder, which need not exist.

    Raises:
        InputError: A file is in its place, or the folder cannot be created or written to.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(
            f"{folder}: {existing} is a file, not a folder. Choose another folder.",
            code="output.unwritable",
            path=folder,
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".esm2kit-", dir=existing))
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}). Choose another folder.",
            code="output.unwritable",
            path=folder,
            errno=error.errno,
        ) from None


@contextmanager
def hold_lock(path: Path, busy_message: str | None) -> Iterator[None]:
    """Hold an exclusive lock during the block; the system releases it when the process ends, however it ends.

    Some cluster file systems are mounted without lock support. There the block runs without a lock, after a warning.

    Args:
        path: A folder, or a file, which is created if it does not exist.
        busy_message: Message of the error if another process holds the lock; None waits for the lock instead.

    Raises:
        InputError: Another process holds the lock.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT  # NFS requires write access
    handle = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if busy_message is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(busy_message, code="file.locked", path=path) from None
        except OSError as error:
            logger.warning(
                "%s: the file system has no locks (%s). Make sure that no other process uses it.", path, error
            )
        yield
    finally:
        os.close(handle)


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, from the system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, floats with all their digits."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
