"""The sequence store: rows read back in any process, and errors for other files."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.sequences.store import ROWS_PER_BATCH, SCHEMA, SequenceStore, StoreWriter, read_batches, regroup_batches
from esm2kit.sequences.text import copy_pieces

NUM_RECORDS = 2 * ROWS_PER_BATCH + 77


def write_store(path: Path, records: list[tuple[str, str]]) -> None:
    whole = pa.record_batch([pa.array(column) for column in zip(*records, strict=True)], schema=SCHEMA)
    with StoreWriter(path) as writer:
        for batch in regroup_batches([whole]):
            writer.write(batch)


@pytest.fixture(scope="module")
def records() -> list[tuple[str, str]]:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 60, NUM_RECORDS)
    letters = "".join(random.choice(list("LAGVSERTIDPKQNFYMHWC"), int(sizes.sum())))
    stops = np.cumsum(sizes)
    return [
        (f"id{row}", letters[stop - size : stop]) for row, (size, stop) in enumerate(zip(sizes, stops, strict=True))
    ]


@pytest.fixture(scope="module")
def store(records, tmp_path_factory) -> SequenceStore:
    path = tmp_path_factory.mktemp("store") / "train.arrow"
    write_store(path, records)
    return SequenceStore.open(path)


def letters(residues: np.ndarray) -> str:
    return residues.tobytes().decode()


def test_every_row_is_read_back(store, records):
    assert len(store) == NUM_RECORDS
    assert [(store.id(row), letters(store.residues(row))) for row in range(len(store))] == records
    assert store.num_residues.tolist() == [len(sequence) for _, sequence in records]


def test_residues_are_a_read_only_view_of_the_file(store):
    residues = store.residues(ROWS_PER_BATCH + 3)
    assert residues.dtype == np.uint8
    assert residues.base is not None
    assert np.shares_memory(residues, store.residues(ROWS_PER_BATCH + 3))
    with pytest.raises(ValueError, match="read-only"):
        residues[0] = 65


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, NUM_RECORDS - 1), max_size=40))
def test_gather_several_rows(store, records, rows):
    values, offsets = store.gather(np.array(rows, dtype=np.int64))
    pieces = [letters(values[start:stop]) for start, stop in pairwise(offsets)]
    assert pieces == [records[row][1] for row in rows]
    assert store.residue_counts(np.array(rows, dtype=np.int64)).tolist() == [len(piece) for piece in pieces]


@pytest.mark.parametrize("row", [-1, NUM_RECORDS])
def test_a_row_out_of_range_is_an_error(store, row):
    with pytest.raises(IndexError):
        store.residues(row)
    with pytest.raises(IndexError):
        store.gather(np.array([0, row]))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=12), num_rows=st.integers(1, 12))
def test_regroup_batches_preserves_the_rows(sizes, num_rows):
    rows = [str(row) for row in range(sum(sizes))]
    starts = np.cumsum([0, *sizes])
    whole = pa.record_batch([rows, rows], schema=SCHEMA)
    batches = [whole.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    grouped = list(regroup_batches(batches, num_rows))
    assert [name for batch in grouped for name in batch.column("id").to_pylist()] == rows
    assert all(batch.num_rows == num_rows for batch in grouped[:-1])
    assert not grouped or 0 < grouped[-1].num_rows <= num_rows


def test_the_file_does_not_depend_on_the_input_batches(records, tmp_path):
    whole = pa.record_batch([pa.array(column) for column in zip(*records, strict=True)], schema=SCHEMA)
    files = []
    for piece in (777, 20_000, NUM_RECORDS):
        path = tmp_path / f"{piece}.arrow"
        with StoreWriter(path) as writer:
            for batch in regroup_batches(whole.slice(start, piece) for start in range(0, NUM_RECORDS, piece)):
                writer.write(batch)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_batches_are_read_in_order(store, records):
    batches = list(read_batches(store.path))
    assert [batch.num_rows for batch in batches] == [ROWS_PER_BATCH, ROWS_PER_BATCH, 77]
    assert [name for batch in batches for name in batch.column("id").to_pylist()] == [name for name, _ in records]


def _residues_of(job: tuple[SequenceStore, int]) -> str:
    store, row = job
    return letters(store.residues(row))


def test_another_process_opens_the_file_again(store, records):
    assert len(pickle.dumps(store)) < 1000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_residues_of, [(store, 5), (store, ROWS_PER_BATCH)])) == [
            records[5][1],
            records[ROWS_PER_BATCH][1],
        ]


def test_other_files_are_an_error(store, tmp_path):
    whole = store.path.read_bytes()
    other = pa.BufferOutputStream()
    with pa.ipc.new_file(other, pa.schema([("id", pa.string())])):
        pass
    for content, found in (
        (whole[: len(whole) // 2], "not a readable Arrow file"),
        (b"", "not a readable Arrow file"),
        (b">a\nMKV\n", "not a readable Arrow file"),
        (other.getvalue().to_pybytes(), "an Arrow file without sequences"),
    ):
        path = tmp_path / "train.arrow"
        path.write_bytes(content)
        with pytest.raises(InputError, match=found):
            SequenceStore.open(path)
    with refused("store.damaged"):
        SequenceStore.open(tmp_path / "absent.arrow")


def test_an_unfinished_store_is_an_error(records, tmp_path):
    path = tmp_path / "train.arrow"
    with pytest.raises(KeyboardInterrupt), StoreWriter(path) as writer:  # noqa: PT012
        writer.write(pa.record_batch([pa.array(["a"]), pa.array(["MKV"])], schema=SCHEMA))
        raise KeyboardInterrupt
    with refused("store.damaged"):
        SequenceStore.open(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_copy_pieces_takes_any_pieces_in_any_order(data):
    values = np.arange(data.draw(st.integers(0, 50)), dtype=np.uint8)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, values.size), st.integers(0, values.size)), max_size=20))
    starts = np.array([min(pair) for pair in pairs], dtype=np.int64)
    stops = np.array([max(pair) for pair in pairs], dtype=np.int64)
    copied, offsets = copy_pieces(values, starts, stops)
    expected = [values[start:stop].tolist() for start, stop in zip(starts, stops, strict=True)]
    assert [copied[a:b].tolist() for a, b in pairwise(offsets)] == expected
