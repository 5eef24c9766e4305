"""Files that are whole or absent, one writer at a time: atomic writes, locks, digests and JSON."""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError

logger = logging.getLogger(__name__)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> Any:
    """Dataclasses, paths and tuples as what JSON can say."""
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
    """Write to the yielded path; it becomes `path` when the block ends well, and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # by lot: two nodes' containers give their processes the same numbers
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        fsync(part)
        os.replace(part, path)
        fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def hold_lock(path: Path, refusal: str | None) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made; it goes with the process, however that ends.

    Where the file system has no locks a warning says so, and the block runs all the same: a cluster's disk may be
    mounted without them.

    Args:
        path: what is locked.
        refusal: what to tell the user while another process holds it; None waits until it is free.
    Raises: InputError with the refusal.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT  # locks over NFS want a file open for writing
    handle = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal, code="file.locked", path=path) from None
        except OSError as error:
            logger.warning("%s: no locks there (%s), so see to it that no other process works there", path, error)
        yield
    finally:
        os.close(handle)


def fsync(path: Path) -> None:
    """Have the disk, not only its cache, hold a file's bytes or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; floats keep every digit."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")
