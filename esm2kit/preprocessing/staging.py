"""Read all input files once and concurrently: FASTA files into stores and keys, cluster tables into Parquet."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.preprocessing.cluster_tables import cluster_table_path, mapping_table_paths, read_cluster_tsv, read_mapping
from esm2kit.preprocessing.ingest import StagedFasta, ingest

Job = Callable[[threading.Event], Any]


def read_inputs(
    inputs: dict[str, list[Path]], work: Path, workers: int
) -> tuple[dict[str, StagedFasta], dict[Path, str]]:
    """Read the input files, except those that an earlier call has finished.

    Args:
        inputs: Role -> files.
        work: Output folder.
        workers: Number of files to read concurrently.

    Returns:
        The staged FASTA files by role, and the SHA-256 of each cluster table.

    Raises:
        InputError: A file is invalid.
    """
    jobs: dict[str, Job] = {}
    # the largest files first
    for role in ("sampler_fasta", "train_fasta", "valid_fasta", "test_fasta"):
        if role in inputs:
            # with a mapping, train_fasta only lists the representatives; sampler_fasta has their sequences
            keep = role != "train_fasta" or "mapping" not in inputs
            jobs[role] = lambda stop, role=role, keep=keep: ingest(role, inputs[role], work, keep, stop)
    tables: dict[str, Path] = {}
    for path in inputs.get("mapping", []):
        tables["mapping"] = path
        jobs["mapping"] = lambda stop, path=path: _read_table_once(path, stop, read_mapping, *mapping_table_paths(work))
    for level, path in enumerate(inputs.get("cluster_tsv", [])):
        name, table = f"cluster_tsv {level}", cluster_table_path(work, level)
        tables[name] = path
        jobs[name] = lambda stop, path=path, table=table: _read_table_once(path, stop, read_cluster_tsv, table)
    results = run_concurrently(jobs, workers)
    sha256 = {path: results.pop(name) for name, path in tables.items()}
    return results, sha256


def _read_table_once(path: Path, stop: threading.Event, read: Callable[..., str], *written: Path) -> str:
    """Read a table unless its marker shows that it has been read completely; returns its SHA-256."""
    marker = written[-1].with_suffix(".json")
    if not marker.exists():
        write_sealed_json(marker, {"sha256_of_table": read(path, *written, stop)})
    return read_sealed_json(marker, f"delete {marker.parent} and run the command again")["sha256_of_table"]


def run_concurrently(jobs: dict[str, Job], workers: int) -> dict[str, Any]:
    """Run jobs in threads; if one fails, stop the others and raise its error.

    Args:
        jobs: Name -> function that takes an event, which is set when the job should stop.
        workers: Number of threads; most of the work is done outside Python's global lock.

    Returns:
        Name -> result of the job.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        running = {name: pool.submit(job, stop) for name, job in jobs.items()}
        try:
            for done in as_completed(running.values()):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {name: job.result() for name, job in running.items()}


def build_input_stamps(
    inputs: dict[str, list[Path]], staged: dict[str, StagedFasta], sha256: dict[Path, str]
) -> dict[str, list[dict[str, Any]]]:
    """List path, size, modification time and SHA-256 of all input files by role, for the manifest."""
    stamps = {
        role: [{key: file[key] for key in ("path", "bytes", "mtime_ns", "sha256")} for file in records.files]
        for role, records in staged.items()
    }
    for role in inputs.keys() - stamps.keys():
        stamps[role] = []
        for path in inputs[role]:
            status = path.stat()
            stamp = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            stamps[role].append(stamp | {"sha256": sha256[path]})
    return stamps
