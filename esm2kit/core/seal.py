"""Checksums inside an HDF5 file of esm2kit: each block of it can be checked before it is used.

They are in the HDF5 user block, a space at the start of a file that HDF5 leaves to applications and that every HDF5
reader skips. So they move with the file, and checking one protein's values costs one block and not the whole file.
"""

import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.core.checksums import MIN_BLOCK_BYTES, compute_checksums, describe_blocks, log_check, raise_damaged
from esm2kit.core.errors import InputError
from esm2kit.core.files import BINARY, fsync, read_at
from esm2kit.core.processes import count_cores

MAGIC = b"esm2kit checksums 1\n"
HEADER = struct.Struct("<QQQQI")  # bytes of user block, block and file; blocks; checksum of ids and attributes
CRC = struct.Struct("<I")  # of everything before it in the user block
BLOCKS_PER_READ = 256
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # of HDF5, after the user block
# Checked when a file is opened: all of a small file, the start and the end of a large one. HDF5 itself may never return
# from damaged metadata, which is mostly there.
CHECKED_BYTES = 128 << 20


def plan_user_block(num_bytes: int) -> int:
    """Choose the user block's size, a power of two, for a file of about `num_bytes`."""
    size = 512
    while _capacity(size) * MIN_BLOCK_BYTES < num_bytes:
        size *= 2
    return size


def _capacity(user_block: int) -> int:
    """Blocks whose checksums fit a user block."""
    return (user_block - len(MAGIC) - HEADER.size - CRC.size) // 4


def checksum_contents(attributes: Mapping[str, Any], *arrays: np.ndarray) -> int:
    """CRC-32 of a file's root attributes and index arrays, as they are read: HDF5 does not check all of them."""
    crc = 0
    for name in sorted(attributes):
        value = attributes[name]
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes(), crc)
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return crc


def write_seal(path: Path, user_block: int, contents: int) -> None:
    """Write the checksums of a complete file into its user block.

    Args:
        path: the file, closed.
        user_block: bytes of its user block.
        contents: its `checksum_contents`.
    """
    num_bytes, block_bytes = os.path.getsize(path), MIN_BLOCK_BYTES
    while -(-(num_bytes - user_block) // block_bytes) > _capacity(user_block):
        block_bytes *= 2
    checksums = compute_checksums(path, block_bytes, user_block)
    data = (
        MAGIC
        + HEADER.pack(user_block, block_bytes, num_bytes, checksums.size, contents)
        + checksums.astype("<u4").tobytes()
    )
    with open(path, "r+b") as file:
        file.write(data + CRC.pack(zlib.crc32(data)))
    fsync(path)


def checksum_skeleton(path: Path, starts_P: np.ndarray, bytes_P: np.ndarray) -> int:
    """Compute the CRC-32 of all bytes of a file that are neither values nor user block.

    Args:
        path: the file.
        starts_P: the byte at which each protein's values start.
        bytes_P: bytes of each protein's values.

    Returns:
        The checksum.
    """
    content, crc, position = np.memmap(path, np.uint8, "r"), 0, 512
    while position < content.size and content[position : position + len(SIGNATURE)].tobytes() != SIGNATURE:
        position *= 2
    for protein in np.argsort(starts_P, kind="stable").tolist():
        start = int(starts_P[protein])
        if start > position:
            crc = zlib.crc32(content[position:start], crc)
        position = max(position, start + int(bytes_P[protein]))
    return zlib.crc32(content[position:], crc)


def has_seal(path: Path) -> bool:
    """Return whether a file has checksums, without opening it as HDF5."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class Seal:
    """The checksums of a file, and which of its blocks have been checked; HDF5 is not needed to read them.

    Args:
        path: the file; `has_seal` is true for it.
        remedy: what to do if it is damaged; ends the message.

    Raises:
        InputError: the checksums are damaged, or the file has another size.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self.remedy = Path(path), remedy
        self._file = os.open(path, os.O_RDONLY | BINARY)
        try:
            self._read()
        except InputError:
            self.close()
            raise

    def _read(self) -> None:
        start = len(MAGIC) + HEADER.size
        data = read_at(self._file, start, 0)
        if len(data) < start:
            raise_damaged(self.path, "its checksums are missing", self.remedy)
        self.first_byte, self.block_bytes, self.num_bytes, num_blocks, self.contents = HEADER.unpack(data[len(MAGIC) :])
        size, stop = os.fstat(self._file).st_size, start + 4 * num_blocks
        data += read_at(self._file, stop + CRC.size - start, start) if stop < size else b""
        if len(data) < stop + CRC.size or CRC.unpack(data[stop:])[0] != zlib.crc32(data[:stop]):
            raise_damaged(self.path, "its checksums do not agree with each other", self.remedy)
        if size != self.num_bytes:
            raise_damaged(self.path, f"it has {size:,} bytes instead of {self.num_bytes:,}", self.remedy)
        self.checksums = np.frombuffer(data[start:stop], dtype="<u4")
        self.checked, self._changed = np.zeros(num_blocks, dtype=bool), self._get_change_time()

    def _get_change_time(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_mtime_ns, status.st_size

    def _forget_if_changed(self) -> None:
        """Check all blocks again if something wrote to the file after it was opened."""
        if (changed := self._get_change_time()) != self._changed:
            self._changed, self.checked[:] = changed, False

    def check_metadata(self) -> None:
        """Check the blocks that hold most of HDF5's metadata, as `check`."""
        near = CHECKED_BYTES // self.block_bytes
        blocks = np.arange(self.checksums.size)
        self._check_blocks(blocks[(blocks < near) | (blocks >= blocks.size - near)])

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def check(self, start: int, stop: int) -> None:
        """Check the blocks of a range of bytes that have not been checked before.

        Args:
            start: first byte, counted from the start of the file.
            stop: end of the range.

        Raises:
            InputError: a block differs from its checksum.
        """
        self._forget_if_changed()
        first, last = (start - self.first_byte) // self.block_bytes, (stop - 1 - self.first_byte) // self.block_bytes
        if not self.checked[first : last + 1].all():
            self._check_blocks(np.arange(first, last + 1))

    def check_ranges(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Check the blocks of many ranges, as `check`."""
        self._forget_if_changed()
        # +1 where a range's first block is, -1 after its last one: positive sums are blocks in use
        edges = np.zeros(self.checksums.size + 1, dtype=np.int64)
        np.add.at(edges, (starts - self.first_byte) // self.block_bytes, 1)
        np.add.at(edges, (stops - 1 - self.first_byte) // self.block_bytes + 1, -1)
        self._check_blocks(np.flatnonzero(edges[:-1].cumsum() > 0))

    def check_all(self) -> None:
        """Check every block, as `check`."""
        log_check(self.path, self.num_bytes)
        self._forget_if_changed()
        self._check_blocks(np.arange(self.checksums.size))

    def _check_blocks(self, blocks: np.ndarray) -> None:
        blocks = blocks[~self.checked[blocks]]
        parts = np.array_split(blocks, -(-blocks.size // BLOCKS_PER_READ)) if blocks.size else []
        if len(parts) < 2:
            wrong = [self._find_wrong(part) for part in parts]
        else:
            with ThreadPoolExecutor(count_cores()) as pool:
                wrong = list(pool.map(self._find_wrong, parts))
        found = np.concatenate(wrong) if wrong else blocks
        if found.size:
            place = describe_blocks(found, self.block_bytes, self.num_bytes, self.first_byte)
            raise_damaged(self.path, place, self.remedy)
        self.checked[blocks] = True

    def _find_wrong(self, blocks: np.ndarray) -> np.ndarray:
        """Which of some ascending blocks differ from their checksums."""
        wrong = []
        for block in blocks.tolist():
            data = read_at(self._file, self.block_bytes, self.first_byte + block * self.block_bytes)
            if zlib.crc32(data) != self.checksums[block]:
                wrong.append(block)
        return np.array(wrong, dtype=np.int64)
