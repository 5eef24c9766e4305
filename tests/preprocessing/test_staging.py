"""Input files are read once and concurrently, and a failure stops all reading."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from esm2kit.core.errors import InputError
from esm2kit.preprocessing.cluster_tables import read_cluster_tsv, read_mapping
from esm2kit.preprocessing.ingest import ingest
from esm2kit.preprocessing.staging import read_inputs, run_concurrently


def test_the_first_failure_stops_the_others() -> None:
    stopped: list[bool] = []

    def waiting(stop: threading.Event) -> None:
        stopped.append(stop.wait(60))
        raise CancelledError

    def failing(_: threading.Event) -> None:
        raise InputError("broken")

    started = time.monotonic()
    with pytest.raises(InputError, match="broken"):
        run_concurrently({"waiting": waiting, "failing": failing, "never": waiting}, workers=2)
    assert time.monotonic() - started < 30
    assert all(stopped)


def test_results_are_returned_by_name_with_any_number_of_workers() -> None:
    jobs = {str(number): lambda _, number=number: number**2 for number in range(7)}
    assert run_concurrently(jobs, 1) == run_concurrently(jobs, 3) == {str(number): number**2 for number in range(7)}


def test_ingest_stops_when_requested(tmp_path: Path) -> None:
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKV\n")
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        ingest("train_fasta", [fasta], tmp_path, stop=stop)
    assert not (tmp_path / "train_fasta.json").exists()


@pytest.mark.parametrize("read", [read_cluster_tsv, lambda *given: read_mapping(*given[:2], given[1], given[2])])
def test_reading_a_table_stops_when_requested(tmp_path: Path, read: Callable) -> None:
    table, stop = tmp_path / "table.tsv", threading.Event()
    table.write_text("a\ta\n")
    stop.set()
    with pytest.raises(CancelledError):
        read(table, tmp_path / "made.parquet", stop)
    assert not (tmp_path / "made.parquet").exists()


def test_a_finished_table_is_not_read_again(tmp_path: Path) -> None:
    fasta, table = tmp_path / "a.fasta", tmp_path / "clusters.tsv"
    fasta.write_text(">a\nMKV\n>b\nMKL\n")
    table.write_text("a\ta\na\tb\n")
    inputs = {"train_fasta": [fasta], "cluster_tsv": [table, table]}
    first = read_inputs(inputs, tmp_path, workers=2)
    table.write_text("not read")
    assert read_inputs(inputs, tmp_path, workers=1) == first
    assert first[0]["train_fasta"].num_records == 2
