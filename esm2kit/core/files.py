"""Atomic writes, file locks, reads at a position, SHA-256 digests and JSON."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from esm2kit.core.errors import InputError

logger = logging.getLogger(__name__)
# Windows converts line breaks in files that are opened without this flag; other systems do not have it.
BINARY = getattr(os, "O_BINARY", 0)
_SEEK = threading.Lock()
# What zipfile raises for an archive that is damaged; a RuntimeError is an encrypted member, or a version or compression
# that it does not read.
UNREADABLE_ZIP = (zipfile.BadZipFile, RuntimeError)
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

    The lock is a file without content, which is removed at the end. Some cluster file systems are mounted without lock
    support. There the block runs without a lock, after a warning.

    Args:
        path: The lock file, or a folder, whose lock file is `.lock`.
        busy_message: Message of the error if another process holds the lock; None waits for the lock instead.

    Raises:
        InputError: Another process holds the lock.
        OSError: The lock file cannot be created.
    """
    path = Path(path)
    file = path / ".lock" if path.is_dir() else path
    # a file that marks the lock by its existence, filelock's replacement for a missing lock, would outlive a kill
    lock = FileLock(file, timeout=0 if busy_message else -1, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy_message, code="file.locked", path=path) from None
    except OSError as error:
        if error.filename is not None:  # the file cannot be opened, which is no matter of locks
            raise
        logger.warning("%s: the file system has no locks (%s). Make sure that no other process uses it.", path, error)
    try:
        yield
    finally:
        # Before the release: filelock ignores a lock on a removed file. Windows cannot remove an open file; there
        # filelock removes it after the release.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, from the system's cache to the disk."""
    path = Path(path)
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and NTFS journals its entries
        return
    # Windows flushes only files that are open for writing; elsewhere reading is enough, and allowed for more files
    handle = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | BINARY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_at(handle: int, num_bytes: int, position: int) -> bytes:
    """Read bytes at a position of an open file; threads can share the file descriptor.

    Args:
        handle: File descriptor, opened with `BINARY`.
        num_bytes: Number of bytes; fewer are returned at the end of the file.
        position: First byte, counted from the start of the file.

    Returns:
        The bytes.
    """
    if hasattr(os, "pread"):
        return os.pread(handle, num_bytes, position)
    with _SEEK:  # Windows has no such call: move, then read
        os.lseek(handle, position, os.SEEK_SET)
        return os.read(handle, num_bytes)


def read_into(handle: int, buffer: memoryview, position: int) -> int:
    """Fill a buffer with bytes at a position of an open file, as `read_at`.

    Args:
        handle: File descriptor, opened with `BINARY`.
        buffer: Bytes to overwrite.
        position: First byte, counted from the start of the file.

    Returns:
        Number of bytes read; it can be less than the buffer has.
    """
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], position)
    data = read_at(handle, len(buffer), position)
    buffer[: len(data)] = data
    return len(data)


def write_at(handle: int, data: memoryview, position: int) -> int:
    """Write bytes at a position of an open file; threads can share the file descriptor.

    Args:
        handle: File descriptor, opened with `BINARY`.
        data: Bytes to write.
        position: First byte, counted from the start of the file.

    Returns:
        Number of bytes written; fewer than given on an almost full disk.
    """
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, position)
    with _SEEK:
        os.lseek(handle, position, os.SEEK_SET)
        return os.write(handle, data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, floats with all their digits."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
