"""Checksums of esm2kit's own files: damage is found before a damaged file is used, and its place is reported.

Files are checked in blocks with CRC-32, which finds every flipped bit and any short run of wrong bytes, and misses
other damage once in 4 billion blocks. JSON files carry a SHA-256 of their content.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json, write_json
from esm2kit.core.processes import count_cores

MIN_BLOCK_BYTES = 1 << 16
MAX_BLOCKS = 4096  # of a file whose checksums are recorded in a JSON file
_BYTES_PER_READ = 1 << 26
SEAL = "sha256"  # a JSON file's key for the digest of its other content


def compute_checksums(path: Path, block_bytes: int, first_byte: int = 0) -> np.ndarray:
    """Compute the CRC-32 of each block of a file, in threads.

    Args:
        path: the file.
        block_bytes: bytes per block; the last block may be shorter.
        first_byte: where the first block starts.

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
        num_bytes: size of the file.
        block_bytes: bytes per block.
        crc32: the blocks' CRC-32, eight hex digits each.
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
            path: the file.
            remedy: what to do if it is damaged, as the end of a message.

        Raises:
            InputError: the file is missing or differs.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing: {remedy}", code="file.missing", path=path)
        size = path.stat().st_size
        if size != self.num_bytes:
            raise damaged(path, f"it has {size:,} bytes instead of {self.num_bytes:,}", remedy)
        expected = np.frombuffer(bytes.fromhex(self.crc32), dtype=">u4")
        wrong = np.flatnonzero(compute_checksums(path, self.block_bytes) != expected)
        if wrong.size:
            raise damaged(path, describe_blocks(wrong, self.block_bytes, size), remedy)


def describe_blocks(wrong: np.ndarray, block_bytes: int, num_bytes: int) -> str:
    """Describe where a file differs from its checksums."""
    start = int(wrong[0]) * block_bytes
    stop = min(start + block_bytes, num_bytes)
    more = f" and in {wrong.size - 1} other blocks" if wrong.size > 1 else ""
    return f"its content differs from its checksum between bytes {start:,} and {stop:,}{more}"


def damaged(path: Path, found: str, remedy: str) -> InputError:
    """The error for a damaged file of esm2kit.

    Args:
        path: the file.
        found: what is wrong, a clause.
        remedy: what to do.
    """
    return InputError(f"{path} is damaged ({found}): {remedy}", code="file.damaged", path=path)


def read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz file, whose zip format has a checksum for each.

    Args:
        path: the file.
        remedy: what to do if it is damaged, as the end of a message.

    Returns:
        Name -> array.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {remedy}", code="file.missing", path=path) from None
    except Exception as error:  # zipfile, zlib and numpy's header parser raise errors of many kinds
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__, remedy) from None


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object together with the digest of its content, atomically."""
    plain = to_json(value)
    write_json(path, plain | {SEAL: _digest(plain)})


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote.

    Args:
        path: the file.
        remedy: what to do if it is damaged, as the end of a message.

    Returns:
        The object without its digest.

    Raises:
        InputError: the file is missing, is not a JSON object, or differs from its digest.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {remedy}", code="file.missing", path=path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, " ".join(str(error).split()), remedy) from None
    if not isinstance(found, dict) or found.pop(SEAL, None) != _digest(found):
        raise damaged(path, "its content differs from its checksum", remedy)
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
