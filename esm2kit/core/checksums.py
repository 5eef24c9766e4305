"""Checksums of the files that esm2kit writes, to detect and locate damage before a file is used.

Each block of a file has a CRC-32, which detects every flipped bit and every short run of wrong bytes, and misses other
damage in one of 4 billion blocks. JSON files contain the SHA-256 of their content.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs, to_json, write_json
from esm2kit.core.processes import count_cores

logger = logging.getLogger(__name__)
MIN_BLOCK_BYTES = 1 << 16
LONG_CHECK_BYTES = 2 << 30  # about two seconds
MAX_BLOCKS = 4096  # per file, as its checksums are stored in a JSON file
_BYTES_PER_READ = 1 << 26
SEAL = "sha256"  # the key of the digest in a JSON file


def compute_checksums(path: Path, block_bytes: int, first_byte: int = 0) -> np.ndarray:
    """Compute the CRC-32 of each block of a file, in several threads.

    Args:
        path: The file.
        block_bytes: Bytes per block; the last block may be shorter.
        first_byte: Where the first block starts.

    Returns:
        (blocks,) uint32.
    """
    size = os.path.getsize(path)
    stride = max(_BYTES_PER_READ // block_bytes, 1) * block_bytes

    def compute(start: int) -> list[int]:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            data = memoryview(file.read(min(stride, size - start)))
        return [zlib.crc32(data[place : place + block_bytes]) for place in range(0, len(data), block_bytes)]

    with ThreadPoolExecutor(count_cores()) as pool:
        parts = list(pool.map(compute, range(first_byte, size, stride)))
    return np.array([checksum for part in parts for checksum in part], dtype=np.uint32)


@dataclass(frozen=True)
class FileChecksums:
    """The checksums of a file, to be stored in a JSON file.

    Args:
        num_bytes: Size of the file.
        block_bytes: Bytes per block.
        crc32: The CRC-32 of all blocks, eight hex digits each.
    """

    num_bytes: int
    block_bytes: int
    crc32: str

    @classmethod
    def compute(cls, path: Path) -> "FileChecksums":
        """Compute the checksums of a file."""
        size, block_bytes = os.path.getsize(path), MIN_BLOCK_BYTES
        while block_bytes * MAX_BLOCKS < size:
            block_bytes *= 2
        checksums = compute_checksums(path, block_bytes)
        return cls(size, block_bytes, checksums.astype(">u4").tobytes().hex())

    def check(self, path: Path, remedy: str) -> None:
        """Compare a file with its checksums.

        Args:
            path: The file.
            remedy: What to do if it is damaged; ends the message.

        Raises:
            InputError: The file is missing or differs.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing. Remedy: {remedy}.", code="file.missing", path=path)
        size = path.stat().st_size
        if size != self.num_bytes:
            raise_damaged(path, f"it has {size:,} bytes instead of {self.num_bytes:,}", remedy)
        log_check(path, size)
        expected = np.frombuffer(bytes.fromhex(self.crc32), dtype=">u4")
        wrong = np.flatnonzero(compute_checksums(path, self.block_bytes) != expected)
        if wrong.size:
            raise_damaged(path, describe_blocks(wrong, self.block_bytes, size), remedy)


def log_check(path: Path, num_bytes: int) -> None:
    """Log that a file is being checked, if that takes more than a moment."""
    if num_bytes > LONG_CHECK_BYTES:
        logger.info("checking %s (%.1f GB)", path, num_bytes / 1e9)


def describe_blocks(wrong: np.ndarray, block_bytes: int, num_bytes: int, first_byte: int = 0) -> str:
    """Describe where a file differs from its checksums."""
    start = first_byte + int(wrong[0]) * block_bytes
    stop = min(start + block_bytes, num_bytes)
    more = f" and in {wrong.size - 1} other blocks" if wrong.size > 1 else ""
    return f"its content differs from its checksum between bytes {start:,} and {stop:,}{more}"


def raise_damaged(path: Path, found: str, remedy: str) -> NoReturn:
    """Raise the error for a damaged file.

    Args:
        path: The file.
        found: What is wrong, a clause.
        remedy: What to do.

    Raises:
        InputError: Always.
    """
    check_git_lfs(path)
    raise InputError(f"{path} is damaged: {found}. Remedy: {remedy}.", code="file.damaged", path=path) from None


def read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz file; its zip format has a checksum per array.

    Args:
        path: The file.
        remedy: What to do if it is damaged; ends the message.

    Returns:
        Name -> array.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise InputError(f"{path} is missing. Remedy: {remedy}.", code="file.missing", path=path) from None
    except Exception as error:  # zipfile, zlib and numpy's header parser raise errors of many kinds
        raise_damaged(path, " ".join(str(error).split()) or type(error).__name__, remedy)


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object together with the digest of its content, atomically."""
    plain = to_json(value)
    write_json(path, plain | {SEAL: _digest(plain)})


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote.

    Args:
        path: The file.
        remedy: What to do if it is damaged; ends the message.

    Returns:
        The object without its digest.

    Raises:
        InputError: The file is missing, is not a JSON object, or differs from its digest.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing. Remedy: {remedy}.", code="file.missing", path=path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise_damaged(path, " ".join(str(error).split()), remedy)
    if not isinstance(found, dict):
        raise_damaged(path, "it is not a JSON object", remedy)
    if SEAL not in found:
        raise_damaged(path, "it has no checksum (version 0.1.0 of esm2kit wrote none)", remedy)
    if found.pop(SEAL) != _digest(found):
        raise_damaged(path, "its content differs from its checksum", remedy)
    return found


def read_sealed_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """Read a sealed JSON file with the `checksums` of other files in its folder, and check these files.

    Args:
        path: The file; `checksums` in it is {name: FileChecksums}.
        remedy: What to do if a file is damaged; ends the message.

    Returns:
        The object without its digest.

    Raises:
        InputError: A file is missing or damaged.
    """
    found = read_sealed_json(path, remedy)
    for name, checksums in found["checksums"].items():
        FileChecksums(**checksums).check(Path(path).with_name(name), remedy)
    return found


def _digest(value: Any) -> str:
    """Compute the SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
