"""HDF5 files of embeddings: created empty, written by byte offset, and read in any layout and with any key."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.embedding.hdf5 import EmbeddingReader, Entry, Skeleton, create_file, seal_file

WIDTH = 5


def write_file(
    path: Path, skeleton: Skeleton, num_residues: list[int], keys: list[str] | None = None
) -> list[np.ndarray]:
    """Write a file with random values in reverse order; return the values of each protein."""
    generator = np.random.default_rng(sum(num_residues))
    starts = np.zeros(len(num_residues), dtype=np.int64)
    keys = keys or [str(index) for index in range(len(num_residues))]
    rows = [
        Entry(f"protein é {index}", key, count)
        for index, (key, count) in enumerate(zip(keys, num_residues, strict=True))
    ]
    attributes = {"model_name": "esm2_small", "layer": 6, "provenance": '{"stage": "embed"}'}
    create_file(path, skeleton, iter(rows), len(rows), sum(num_residues), attributes, starts)
    values = {}
    handle = os.open(path, os.O_WRONLY)
    for index in reversed(range(len(rows))):
        count = 1 if skeleton.level == "protein" else num_residues[index]
        value = values.setdefault(keys[index], generator.normal(size=(count, skeleton.width)).astype(skeleton.dtype))
        os.pwrite(handle, value.tobytes(), int(starts[index]))
    os.close(handle)
    seal_file(path)
    return [values[key] for key in keys]


@settings(max_examples=25, deadline=None)
@given(
    num_residues=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    level=st.sampled_from(["protein", "residue"]),
    layout=st.sampled_from(["datasets", "packed"]),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_values_are_read_back(tmp_path_factory, num_residues, level, layout, dtype) -> None:
    folder = tmp_path_factory.mktemp("embeddings")
    expected = write_file(folder / "a.h5", Skeleton(level, layout, WIDTH, dtype, "index"), num_residues)
    with EmbeddingReader(folder / "a.h5") as reader:
        assert reader.ids == tuple(f"protein é {index}" for index in range(len(num_residues)))
        assert (reader.level, reader.embed_dim, len(reader)) == (level, WIDTH, len(num_residues))
        assert tuple(reader) == reader.ids
        with refused("embeddings.id", found=0):
            reader[0]
        for index, value in enumerate(expected):
            found = reader[f"protein é {index}"]
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, value[0] if level == "protein" else value)
        reversed_ids = reader.ids[::-1]
        starts, offsets, kind = reader.locate_rows(reversed_ids)
        assert kind == dtype  # the stored type, which is not converted
        assert offsets.tolist() == np.cumsum([0] + [len(value) for value in expected[::-1]]).tolist()
        raw = (folder / "a.h5").read_bytes()
        for start, value in zip(starts, expected[::-1], strict=True):
            np.testing.assert_array_equal(np.frombuffer(raw, kind, value.size, start), value.ravel())
        if level == "protein":
            np.testing.assert_array_equal(reader.matrix(), np.concatenate(expected))
            np.testing.assert_array_equal(reader.matrix(reversed_ids), np.concatenate(expected[::-1]))


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a.h5", Skeleton("residue", "datasets", WIDTH, "float32", "index"), [3, 1, 2])
    with h5py.File(tmp_path / "a.h5") as file:  # as biotrainer and protspace read it
        assert {file[key].attrs["original_id"]: file[key].shape for key in file} == {
            "protein é 0": (3, WIDTH),
            "protein é 1": (1, WIDTH),
            "protein é 2": (2, WIDTH),
        }
        assert list(file) == ["0", "1", "2"]
        assert file.attrs["model_name"] == "esm2_small"


def test_rows_with_equal_keys_share_a_dataset(tmp_path: Path) -> None:
    expected = write_file(
        tmp_path / "a.h5", Skeleton("residue", "datasets", WIDTH, "float32", "hash"), [2, 3, 2], ["f0", "ab", "f0"]
    )
    reader = EmbeddingReader(tmp_path / "a.h5")
    assert len(reader) == 3
    assert sorted(reader._file) == ["ab", "f0"]
    for index in range(3):
        np.testing.assert_array_equal(reader[f"protein é {index}"], expected[index])


def test_ids_are_read_from_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm2kit.embedding.hdf5.IDS_PER_BLOCK", 4)
    for layout in ("datasets", "packed"):
        for count in (3, 4, 5, 8, 13):
            expected = write_file(
                tmp_path / "a.h5", Skeleton("residue", layout, WIDTH, "float32", "index"), list(range(1, count + 1))
            )
            with EmbeddingReader(tmp_path / "a.h5") as reader:
                assert reader.ids == tuple(f"protein é {index}" for index in range(count))
                np.testing.assert_array_equal(reader[reader.ids[-1]], expected[-1])


def test_each_of_many_proteins_has_its_own_values(tmp_path: Path) -> None:
    """More proteins than fit into one node of the B-tree of names and one block of the heap of HDF5."""
    expected = write_file(tmp_path / "a.h5", Skeleton("protein", "datasets", WIDTH, "float32", "index"), [1] * 20_000)
    with EmbeddingReader(tmp_path / "a.h5") as reader:
        for index in np.random.default_rng(0).integers(0, 20_000, 200).tolist():
            np.testing.assert_array_equal(reader[f"protein é {index}"], expected[index][0])


def test_invalid_files_and_ids_are_refused(tmp_path: Path) -> None:
    with refused("embeddings.absent"):
        EmbeddingReader(tmp_path / "a.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with refused("embeddings.damaged"):
        EmbeddingReader(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["0"] = np.zeros(3)
    with refused("embeddings.format", found="no"):
        EmbeddingReader(tmp_path / "other.h5")
    write_file(tmp_path / "cut.h5", Skeleton("protein", "datasets", WIDTH, "float32", "index"), [1] * 50)
    os.truncate(tmp_path / "cut.h5", 3000)
    with refused("file.damaged", path=tmp_path / "cut.h5"):
        EmbeddingReader(tmp_path / "cut.h5")
    write_file(tmp_path / "r_hiddens.h5", Skeleton("residue", "datasets", WIDTH, "float32", "index"), [2, 1])
    reader = EmbeddingReader(tmp_path / "r_hiddens.h5")
    with refused("embeddings.level", found="residue"):
        reader.matrix()
    with refused("embeddings.missing-ids"):
        reader.locate_rows(["protein é 0", "nobody"])
    with pytest.raises(KeyError, match="has no protein"):
        reader["nobody"]


@pytest.mark.parametrize("layout", ["datasets", "packed"])
def test_a_changed_value_is_found_where_it_is_and_not_elsewhere(layout: str, tmp_path: Path, monkeypatch) -> None:
    """With blocks so small that each protein has its own, and only the file's first block checked at opening."""
    monkeypatch.setattr("esm2kit.core.seal.MIN_BLOCK_BYTES", 64)
    path = tmp_path / "a.h5"
    expected = write_file(path, Skeleton("residue", layout, 100, "float32", "index"), [3] * 20)
    with EmbeddingReader(path) as reader:
        starts, _, _ = reader.locate_rows()
        for name, value in zip(reader.ids, expected, strict=True):
            np.testing.assert_array_equal(reader[name], value)
    with open(path, "r+b") as file:
        file.seek(int(starts[7]) + 700)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setattr("esm2kit.core.seal.CHECKED_BYTES", 64)
    with EmbeddingReader(path) as reader:
        np.testing.assert_array_equal(reader[reader.ids[3]], expected[3])
        np.testing.assert_array_equal(reader[reader.ids[12]], expected[12])
        for use in (lambda: reader[reader.ids[7]], reader.check, reader.locate_rows):
            with refused("file.damaged", path=path):
                use()
        starts, offsets, _ = reader.locate_rows(reader.ids[8:])
        assert offsets[-1] == 36


@pytest.mark.parametrize("layout", ["datasets", "packed"])
def test_vectors_are_selected_by_any_ordered_collection_of_ids(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    expected = write_file(path, Skeleton("protein", layout, WIDTH, "float32", "index"), [1] * 5)
    with EmbeddingReader(path) as reader:
        chosen = [reader.ids[3], reader.ids[0]]
        for ids in (chosen, tuple(chosen), np.array(chosen), iter(chosen), dict.fromkeys(chosen)):
            np.testing.assert_array_equal(reader.matrix(ids), np.concatenate([expected[3], expected[0]]))
        assert reader.matrix([]).shape == (0, WIDTH)
        for ids in (set(chosen), frozenset(chosen), reader.ids[0], ""):
            with refused("embeddings.ids", path=path, found=ids):
                reader.matrix(ids)


def test_a_text_is_not_read_as_one_id_per_letter(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    starts = np.zeros(2, dtype=np.int64)
    skeleton = Skeleton("protein", "packed", WIDTH, "float32", "index")
    create_file(path, skeleton, iter([Entry("1", "0", 3), Entry("2", "1", 3)]), 2, 6, {"model_name": "m"}, starts)
    seal_file(path)
    with EmbeddingReader(path) as reader, refused("embeddings.ids", found="12"):
        reader.matrix("12")


@pytest.mark.parametrize("layout", ["datasets", "packed"])
def test_a_closed_reader_is_not_called_a_damaged_file(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_file(path, Skeleton("protein", layout, WIDTH, "float32", "index"), [1] * 5)
    reader = EmbeddingReader(path)
    reader.close()
    reader.close()
    for use in (lambda: reader[reader.ids[0]], reader.matrix, lambda: reader.matrix(reader.ids[:2]), reader.check):
        with refused("embeddings.closed", path=path):
            use()


@pytest.mark.parametrize("layout", ["datasets", "packed"])
def test_a_file_that_is_changed_while_it_is_open_is_checked_again(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    expected = write_file(path, Skeleton("protein", layout, WIDTH, "float32", "index"), [1] * 5)
    with EmbeddingReader(path) as reader:
        np.testing.assert_array_equal(reader[reader.ids[0]], expected[0][0])
        os.utime(path, (1, 1))
        np.testing.assert_array_equal(reader[reader.ids[1]], expected[1][0])
        starts, _, _ = reader.locate_rows()
        with open(path, "r+b") as file:
            file.seek(int(starts[2]))
            file.write(b"1234")
        os.utime(path, (2, 2))  # the clock of a file system may be coarse
        with refused("file.damaged", path=path):
            reader[reader.ids[2]]
        os.truncate(path, 600)
        with refused("file.damaged", path=path):
            reader.matrix()


def test_a_reader_can_be_copied_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    expected = write_file(path, Skeleton("residue", "packed", WIDTH, "float32", "index"), [4, 2])
    with EmbeddingReader(path) as reader, pickle.loads(pickle.dumps(reader)) as copy:
        np.testing.assert_array_equal(copy[reader.ids[1]], expected[1])


def test_a_folder_instead_of_a_file_lists_its_files(tmp_path: Path) -> None:
    write_file(tmp_path / "in_hiddens.h5", Skeleton("residue", "packed", WIDTH, "float32", "index"), [4, 2])
    with refused("embeddings.folder", path=tmp_path) as caught:
        EmbeddingReader(tmp_path)
    assert "in_hiddens.h5" in str(caught.value)
