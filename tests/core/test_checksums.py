"""Checksums of files and of JSON: damage anywhere is found, and undamaged files pass."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.core import checksums
from esm2kit.core.checksums import FileChecksums, compute_checksums, read_sealed_json, write_sealed_json

REMEDY = "make it again"


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
@pytest.mark.parametrize("first_byte", [0, 37])
def test_checksums_are_those_of_zlib(size: int, first_byte: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checksums, "_BYTES_PER_READ", 300)
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    expected = [zlib.crc32(data[start : start + 100]) for start in range(first_byte, size, 100)]
    assert compute_checksums(tmp_path / "file", 100, first_byte).tolist() == expected


def test_a_large_file_has_a_bounded_number_of_blocks(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(checksums.MIN_BLOCK_BYTES * checksums.MAX_BLOCKS + 1)
    found = FileChecksums.compute(tmp_path / "file")
    assert len(found.crc32) // 8 == checksums.MAX_BLOCKS // 2 + 1
    found.check(tmp_path / "file", REMEDY)


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 199_999])
def test_the_place_of_the_damage_is_reported(place: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytearray(200_000)
    path.write_bytes(data)
    found = FileChecksums.compute(path)
    found.check(path, REMEDY)
    data[place] ^= 4
    path.write_bytes(data)
    start = place // 65_536 * 65_536
    with refused("file.damaged", path=path) as error:
        found.check(path, REMEDY)
    assert f"between bytes {start:,} and {min(start + 65_536, 200_000):,}" in str(error.value)
    path.write_bytes(data[:-1])
    with refused("file.damaged", path=path):
        found.check(path, REMEDY)
    path.unlink()
    with refused("file.missing", path=path):
        found.check(path, REMEDY)


@given(st.data())
def test_a_json_file_with_any_byte_changed_is_damaged_or_says_the_same(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    value = {"loss": 3.25, "names": ["a", "é"], "nested": {"step": 12, "done": True, "none": None}}
    write_sealed_json(path, value)
    assert read_sealed_json(path, REMEDY) == value
    written, content = json.loads(path.read_bytes()), bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if json.loads(decoded(content)) == written:
        assert read_sealed_json(path, REMEDY) == value
    else:
        with refused("file.damaged"):
            read_sealed_json(path, REMEDY)


def decoded(content: bytes) -> bytes:
    """JSON as it is, or JSON that equals nothing that was written."""
    try:
        json.loads(content)
    except ValueError:
        return b"0"
    return content


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", "nonsense", '{"a": 1}', '{"a": 1, "sha256": "0"}'])
def test_what_is_no_sealed_json_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with refused("file.damaged"):
        read_sealed_json(tmp_path / "file.json", REMEDY)
    with refused("file.missing"):
        read_sealed_json(tmp_path / "absent.json", REMEDY)
