"""Measure preprocessing: against peer tools, at three sizes, and when killed. Prints Markdown, and JSON with --json.

    python -m benchmarks.data peers --work_dir scratch            # 1.1 GB; needs pyfastx (extra `peers`)
    python -m benchmarks.data growth --work_dir scratch           # 0.5, 5 and 20 million records; 30 GB of disk
    python -m benchmarks.data kills --work_dir scratch

benchmarks/synthetic.py generates the input. Each measurement runs in a separate process, so that its peak memory is
known. The tools alternate, and the median over rounds is reported. For all tools, files are read once before the clock
starts, and output is synchronised to disk (fsync) before it stops.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_peers import ACCESS, MEMORY_GB, PREPROCESS, Trio, parse_alone
from benchmarks.synthetic import write_trio
from esm2kit.core.rng import permutation
from esm2kit.pretraining.masking import mask_tokens
from esm2kit.sequences.alphabet import encode
from esm2kit.sequences.clusters import ClusterIndex, draw_sample
from esm2kit.sequences.store import SequenceStore

ROUNDS = 3

# Clusters of UniRef 2024_03 according to NVIDIA's recipe; the FASTA of UniRef90 has about 85 GB
UNIREF90, UNIREF50, UNIREF90_GIGABYTES = 187_382_018, 65_182_365, 85


def limits(trio: Trio, work: Path) -> dict[str, float]:
    """Measure MB/s of reading the input from the page cache, writing the same amount to disk, and copying memory."""
    paths = list(trio.values())
    megabytes = size_mb(paths)
    block, found = 1 << 22, {}
    began = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(block):
                pass
    found["read"] = megabytes / (time.perf_counter() - began)
    data = os.urandom(block)
    began = time.perf_counter()
    with open(work / "limit", "wb", buffering=0) as file:
        for _ in range(int(megabytes * 1e6) // block):
            file.write(data)
        os.fsync(file.fileno())
    found["write and fsync"] = megabytes / (time.perf_counter() - began)
    (work / "limit").unlink()
    source = np.ones(64 << 20, np.uint8)
    target = np.zeros_like(source)
    began = time.perf_counter()
    for _ in range(10):
        np.copyto(target, source)
    found["memory copy"] = 10 * source.size / 1e6 / (time.perf_counter() - began)
    return found


def size_mb(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def measure(*job: str) -> dict[str, float]:
    """Run a job of this file in a separate process; returns seconds, CPU seconds and peak resident MB."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.data", "job", *job], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(job)} failed")
    wall = time.monotonic() - began
    return {"seconds": wall, "cpu_seconds": usage.ru_utime + usage.ru_stime} | json.loads(output)


def job(kind: str, name: str, trio_dir: Path, out_dir: Path, number: int) -> None:
    """Run a job that `measure` started; prints its peak memory and its own measurements as JSON."""
    trio, found = trio_of(trio_dir), {}
    if kind == "preprocess":
        PREPROCESS[name](trio, out_dir)
    elif kind == "parse":
        parse_alone(name, trio["sampler_fasta"])
    elif kind == "access":
        num_rows = len(SequenceStore.open(out_dir / "train.arrow"))
        rows = np.random.default_rng(0).integers(0, num_rows, number)
        found = {"rows_per_s": number / ACCESS[name](trio, out_dir, rows)}
    elif kind == "samples":
        found = sampling_latency(out_dir, number)
    # not getrusage: a process inherits its parent's peak
    peak_kb = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    print(json.dumps(found | {"peak_rss_mb": peak_kb / 1e3}))


def trio_of(folder: Path) -> Trio:
    return {name: folder / f"{name}.{kind}" for name, kind in
            (("train_fasta", "fasta"), ("sampler_fasta", "fasta"), ("mapping", "tsv"))}  # fmt: skip


def sampling_latency(out_dir: Path, number: int) -> dict[str, float]:
    """Measure microseconds per training sample, in the order of an epoch."""
    index, store = ClusterIndex.open(out_dir), SequenceStore.open(out_dir / "train.arrow")
    num_residues, n = store.num_residues, index.num_clusters
    seconds = dict.fromkeys(("order", "draw", "residues", "tokens and mask"), 0.0)
    for position in range(number):
        marks = [time.perf_counter()]
        cluster = permutation(0, 0, position % n, n)
        marks.append(time.perf_counter())
        sample = draw_sample(0, 0, cluster, index, num_residues)
        marks.append(time.perf_counter())
        residues = store.residues(sample.row)[sample.start : sample.stop]
        marks.append(time.perf_counter())
        mask_tokens(np.concatenate([[0], encode(residues), [2]]).astype(np.uint8), sample.mask_key)
        marks.append(time.perf_counter())
        for name, first, second in zip(seconds, marks, marks[1:], strict=False):
            seconds[name] += second - first
    return {f"{name} us": total / number * 1e6 for name, total in seconds.items()}


def warm(trio: Trio) -> None:
    for path in trio.values():
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def peers(work: Path, num_records: int, num_rows: int) -> dict[str, Any]:
    trio = write_trio(work / "trio", num_records)
    megabytes = size_mb(list(trio.values()))
    runs: dict[str, dict[str, list[dict[str, float]]]] = {
        kind: {name: [] for name in PREPROCESS} for kind in ("parse", "preprocess", "access")
    }
    warm(trio)
    for _ in range(ROUNDS):
        for name in PREPROCESS:
            shutil.rmtree(work / name, ignore_errors=True)
            runs["parse"][name].append(measure("parse", name, str(work / "trio"), str(work / name), "0"))
            runs["preprocess"][name].append(measure("preprocess", name, str(work / "trio"), str(work / name), "0"))
    for _ in range(ROUNDS):
        for name in ACCESS:
            job = ("access", name, str(work / "trio"), str(work / "esm2kit"), str(num_rows))
            runs["access"][name].append(measure(*job))
    found = {"megabytes": megabytes, "records": num_records, "rows": num_rows, "limits": limits(trio, work)}
    parsed_mb = size_mb([trio["sampler_fasta"]])
    for name in PREPROCESS:
        found[name] = {
            "preprocess_mb_s": megabytes / middle(runs["preprocess"][name], "seconds"),
            "peak_rss_mb": middle(runs["preprocess"][name], "peak_rss_mb"),
            "parse_mb_s": parsed_mb / middle(runs["parse"][name], "seconds"),
            "rows_per_s": middle(runs["access"][name], "rows_per_s"),
        }
    better = {
        key: found["esm2kit"][key] / max(found[name][key] for name in ("Biopython", "pyfastx"))
        for key in ("preprocess_mb_s", "rows_per_s")
    }
    print(f"{megabytes:,.0f} MB of FASTA and mapping, {num_rows:,} random rows; medians of {ROUNDS} rounds\n")
    print("| | preprocess MB/s | peak RSS MB | parse alone MB/s | random rows/s |\n| --- | --- | --- | --- | --- |")
    for name in PREPROCESS:
        print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in found[name].values()) + " |")
    ratios = f"{better['preprocess_mb_s']:.1f}x preprocess, {better['rows_per_s']:.1f}x random rows"
    print(f"\nCompared with the better peer tool: {ratios}.")
    print(
        "Limits of this machine: "
        + ", ".join(f"{name} {value:,.0f} MB/s" for name, value in found["limits"].items())
        + "."
    )
    share = found["esm2kit"]["preprocess_mb_s"] / found["limits"]["write and fsync"]
    print(f"Preprocessing reaches {share:.0%} of the rate of writing the same amount to disk once.")
    shutil.rmtree(work)
    return found | {"better": better, "runs": runs}


def growth(work: Path, sizes: list[int], num_draws: int) -> dict[str, Any]:
    rows = []
    print(f"\nmemory_limit_gb {MEMORY_GB}\n")
    print("| records | MB | seconds | MB/s | peak RSS MB | output MB | order, sample, residues, mask: us |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in sizes:
        trio = write_trio(work / "trio", size)
        warm(trio)
        out_dir = work / "out"
        run = measure("preprocess", "esm2kit", str(work / "trio"), str(out_dir), "0")
        latencies = measure("samples", "esm2kit", str(work / "trio"), str(out_dir), str(num_draws))
        row = {"records": size, "megabytes": size_mb(list(trio.values())), **run}
        row["output_megabytes"] = size_mb(list(out_dir.iterdir()))
        row |= {name: value for name, value in latencies.items() if name.endswith(" us")}
        rows.append(row)
        latency = ", ".join(f"{value:.1f}" for name, value in latencies.items() if name.endswith(" us"))
        rate = row["megabytes"] / run["seconds"]
        print(f"| {size:,} | {row['megabytes']:,.0f} | {run['seconds']:,.1f} | {rate:,.0f} | {run['peak_rss_mb']:,.0f} "
              f"| {row['output_megabytes']:,.0f} | {latency} |", flush=True)  # fmt: skip
        shutil.rmtree(work)
    print(uniref(rows[-1]))
    return {"rows": rows}


def uniref(row: dict[str, float]) -> str:
    """Extrapolate to all of UniRef from the largest measured size."""
    rate, output = row["megabytes"] / row["seconds"], row["output_megabytes"] / row["megabytes"]
    text = UNIREF90_GIGABYTES * (1 + 2 * UNIREF50 / UNIREF90)
    lines = [
        "\nExtrapolation to all of UniRef50/90 at the rates of the last row:",
        f"text: {UNIREF90_GIGABYTES} GB x (1 + 2 x {UNIREF50:,} / {UNIREF90:,}) = {text:.0f} GB: UniRef90 and the",
        "UniRef50 representatives in the sampler, the latter again in the train FASTA;",
        f"time: {text:.0f} GB / {rate:.0f} MB/s = {text * 1e3 / rate / 60:.0f} min;",
        f"disk: {text:.0f} GB x {output:.2f} = {text * output:.0f} GB, twice that while clusters are truncated;",
        f"memory: memory_limit_gb, including {UNIREF90 + UNIREF50:,} records x 1.25 bytes = "
        f"{(UNIREF90 + UNIREF50) * 1.25 / 1e9:.2f} GB to mark and renumber the retained records.",
    ]
    return "\n".join(lines)


def kills(work: Path, num_records: int, number: int) -> dict[str, Any]:
    write_trio(work / "trio", num_records)
    out_dir, chance = work / "out", random.Random(0)
    job = [sys.executable, "-m", "benchmarks.data", "job", "preprocess", "esm2kit"]
    job += [str(work / "trio"), str(out_dir), "0"]
    began = time.monotonic()
    subprocess.run(job, check=True, stdout=subprocess.DEVNULL)
    took, expected = time.monotonic() - began, fingerprint(out_dir)
    same = landed = 0
    for _ in range(number):
        shutil.rmtree(out_dir)
        process = subprocess.Popen(job, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(chance.random() * took)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            landed += 1
        process.wait()
        subprocess.run(job, check=True, stdout=subprocess.DEVNULL)
        found = fingerprint(out_dir)
        same += found == expected
        for name in sorted(name for name in found | expected if found.get(name) != expected.get(name)):
            print(f"differs: {name}")
    print(f"\nkilled at {number} random moments of {took:.1f} s ({landed} before the end): {same} reruns of {number} "
          "wrote identical files")  # fmt: skip
    shutil.rmtree(work)
    if same < number:
        raise SystemExit("the output of a rerun differs")
    return {"kills": number, "before_the_end": landed, "same": same}


def fingerprint(out_dir: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file; the manifest's time, commit and digest are excluded."""
    found = {}
    for path in sorted(out_dir.iterdir()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            content = json.dumps(json.loads(content) | {"created": None, "git_commit": None, "sha256": None}).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def middle(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def machine() -> dict[str, Any]:
    from esm2kit.core.hardware import (
        cpu_name,
    )  # imported here: it imports torch, which would add memory to every measured process

    return {"cpu": cpu_name(), "cores": os.cpu_count(), "date": datetime.now(UTC).date().isoformat()}


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        kind, name, trio_dir, out_dir, number = sys.argv[2:]
        return job(kind, name, Path(trio_dir), Path(out_dir), int(number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["peers", "growth", "kills"])
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="Temporary folder. It must not exist, and is deleted at the end."
    )
    parser.add_argument("--num_records", type=int, default=2_000_000, help="Records for `peers`; `kills` uses a tenth.")
    parser.add_argument("--num_rows", type=int, default=1_000_000, help="Random rows to read.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500_000, 5_000_000, 20_000_000])
    parser.add_argument("--num_draws", type=int, default=100_000)
    parser.add_argument("--num_kills", type=int, default=20)
    parser.add_argument("--json", type=Path, help="Output file for the results.")
    given = parser.parse_args()
    if given.work_dir.exists():
        parser.error(f"{given.work_dir} already exists. Choose a folder that may be created and deleted.")
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n", flush=True)
    if given.part == "peers":
        found = peers(given.work_dir, given.num_records, given.num_rows)
    elif given.part == "growth":
        found = growth(given.work_dir, given.sizes, given.num_draws)
    else:
        found = kills(given.work_dir, given.num_records // 10, given.num_kills)
    if given.json:
        given.json.write_text(
            json.dumps({"part": given.part, "machine": machine()} | found, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
