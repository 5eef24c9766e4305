"""Embed many proteins in bounded memory, kill runs by SIGKILL, and check that the output is complete and in order.

    python -m benchmarks.embed_stream --work_dir scratch [--num_proteins 100000] [--scale 0.1] [--kills 3]
    python -m benchmarks.embed_stream --work_dir scratch --shape 4 128 4       # a smaller model: a few minutes less

The proteins are synthetic. Their lengths follow UniRef's distribution (median 262) times `scale`, so that the benchmark
takes minutes on two cores. Memory use depends on the number of proteins in a window and of threads, not on `scale`. The
weights are random. The steps are:

1. Embed the first tenth of the proteins without interruption and measure the peak memory.
2. Embed all proteins. Kill `esm2kit embed` with SIGKILL at random times and rerun it until it finishes. Report the
   highest peak memory of these runs.
3. Check that the ids are complete and in order and that no row is empty. Compare the rows with those of step 1 and with
   those of a thousand random proteins that are embedded separately.
4. Read single proteins by id, from a cold page cache (as far as the system allows) and from a warm one.

Prints one line per step and a JSON summary.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.synthetic import pool, residues_of
from esm2kit.core.hardware import cpu_name
from esm2kit.core.processes import count_cores
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2

MAX_RESIDUES = 1022
SAMPLED, READ_COLD, READ_WARM = 1_000, 200, 5_000
PROGRESS = re.compile(r"embedded ([\d,]+) of ([\d,]+) residues")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir",
        type=Path,
        required=True,
        help="Parent of the folder embed_stream, which is deleted and recreated.",
    )
    parser.add_argument("--num_proteins", type=int, default=100_000)
    parser.add_argument("--scale", type=float, default=0.1, help="Factor for UniRef's lengths.")
    parser.add_argument("--size", default="esm2_t6_8M_UR50D", choices=list(SIZES))
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("LAYERS", "WIDTH", "HEADS"), help="Model shape instead of a size."
    )
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the proteins, weights and times.")
    options = parser.parse_args()
    folder = options.work_dir / "embed_stream"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = ESM2Config(*options.shape) if options.shape else SIZES[options.size]
    model = folder / "model.safetensors"
    state = ESM2.initialised(config, options.seed).state_dict()
    write_checkpoint(model, {f"model.{name}": tensor for name, tensor in state.items()}, {"model": config})

    proteins = make_proteins(options.num_proteins, options.scale)
    residues = sum(len(sequence) for _, sequence in proteins)
    fasta = write_fasta(folder / "all.fasta", proteins)
    tenth = write_fasta(folder / "tenth.fasta", proteins[: max(1, len(proteins) // 10)])
    chosen = np.random.default_rng(options.seed).choice(len(proteins), min(SAMPLED, len(proteins)), replace=False)
    sample = write_fasta(folder / "sample.fasta", [proteins[index] for index in np.sort(chosen)])
    print(f"{len(proteins):,} proteins, {residues:,} residues in {fasta}", flush=True)

    small = run_once(tenth, model, folder / "tenth", None)
    print(f"a tenth, without interruption: {small['seconds']:.0f} s, peak {small['peak_mb']:,.0f} MB", flush=True)
    lives = killed_run(fasta, model, folder / "all", options.kills, options.seed)
    run_once(sample, model, folder / "sample", None)
    reader = EmbeddingReader(folder / "all" / "all_embeddings.h5")
    others = [folder / name / f"{name}_embeddings.h5" for name in ("tenth", "sample")]
    checked = check(reader, proteins, others)
    summary = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": cpu_name(),
        "cores": count_cores(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m benchmarks.embed_stream", *sys.argv[1:]]),
        "model": dataclasses.asdict(config),
        "proteins": len(proteins),
        "residues": residues,
        "kills": len(lives) - 1,
        "killed_after_share_of_what_was_left": [life["share"] for life in lives[:-1]],
        "seconds_of_all_lives": round(sum(life["seconds"] for life in lives)),
        f"peak_mb_at_{len(proteins) // 10}": round(small["peak_mb"]),
        f"peak_mb_at_{len(proteins)}": round(max(life["peak_mb"] for life in lives)),
        **checked,
        **reading_times(reader, options.seed),
    }
    print(json.dumps(summary, indent=2))


def make_proteins(number: int, scale: float) -> list[tuple[str, str]]:
    """Generate (id, sequence) pairs with UniProt's composition and UniRef's lengths times `scale`."""
    pool_text = pool().tobytes().decode()
    starts, sizes = residues_of(np.arange(number))
    scaled = np.clip(np.rint(sizes * scale), 5, MAX_RESIDUES).astype(int)
    return [
        (f"protein_{place:07d}", pool_text[start : start + size])
        for place, (start, size) in enumerate(zip(starts.tolist(), scaled.tolist(), strict=True))
    ]


def write_fasta(path: Path, proteins: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins), encoding="utf-8")
    return path


def run_once(fasta: Path, model: Path, out_dir: Path, kill_at: tuple[float, float] | None) -> dict[str, Any]:
    """Run `esm2kit embed` until it finishes or is killed.

    Args:
        fasta: the input.
        model: the model.
        out_dir: the output folder.
        kill_at: share of the residues in the log, and seconds after it is reached, when SIGKILL is sent.

    Returns:
        {"ended": bool, "seconds", "peak_mb", "share"}, with the last share of the residues in the log.
    """
    command = [sys.executable, "-m", "esm2kit", "embed", "--fasta", str(fasta), "--model", str(model)]
    began, share, log = time.monotonic(), 0.0, ""
    process = subprocess.Popen(
        [*command, "--out_dir", str(out_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    memory = Memory(process.pid)
    memory.start()
    killed = False
    for line in process.stderr:
        log += line
        if found := PROGRESS.search(line):
            done, total = (int(number.replace(",", "")) for number in found.groups())
            share = done / total
            if kill_at and share >= kill_at[0] and not killed:
                time.sleep(kill_at[1])
                process.send_signal(signal.SIGKILL)
                killed = True
    process.wait()
    memory.join()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"esm2kit embed exited with code {process.returncode}:\n{log}")
    ended, seconds = process.returncode == 0, time.monotonic() - began
    return {"ended": ended, "seconds": seconds, "peak_mb": memory.peak_mb, "share": round(share, 3)}


class Memory(threading.Thread):
    """Reads the peak memory of a process from Linux, in MB.

    ru_maxrss of a child is not suitable: it starts at the parent's value, which includes torch and all proteins.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.peak_mb = Path(f"/proc/{pid}/status"), float("nan")

    def run(self) -> None:
        with suppress(OSError):  # the process has ended, or there is no /proc
            while found := re.search(r"VmHWM:\s+(\d+) kB", self.status.read_text(encoding="utf-8")):
                self.peak_mb = int(found[1]) / 1e3
                time.sleep(0.1)


def killed_run(fasta: Path, model: Path, out_dir: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Rerun until a run finishes; the first `kills` runs are killed at a random time of their part of the work."""
    moments = random.Random(seed)
    lives: list[dict[str, Any]] = []
    while not lives or not lives[-1]["ended"]:
        due = len(lives) < kills
        kill_at = ((len(lives) + moments.uniform(0.1, 0.8)) / (kills + 1), moments.uniform(0, 4)) if due else None
        lives.append(run_once(fasta, model, out_dir, kill_at))
        last = lives[-1]
        outcome = "finished" if last["ended"] else f"killed after {last['share']:.0%} of the remaining residues"
        print(f"run {len(lives)}: {outcome}, {last['seconds']:.0f} s, peak {last['peak_mb']:,.0f} MB", flush=True)
    if len(lives) - 1 < kills:
        sys.exit(f"The run finished after {len(lives) - 1} of {kills} kills. Use more proteins or a larger model.")
    return lives


def check(reader: EmbeddingReader, proteins: list[tuple[str, str]], others: list[Path]) -> dict[str, Any]:
    """Check that the output is complete, in order and equal to that of uninterrupted runs; exits otherwise."""
    vectors_PD = reader.matrix()
    largest, compared = 0.0, 0
    for path in others:
        other = EmbeddingReader(path)
        largest = max(largest, float(np.abs(reader.matrix(other.ids) - other.matrix()).max()))
        compared += len(other)
    faults = {
        "ids differ from the FASTA or its order": reader.ids != [name for name, _ in proteins],
        "a row is empty or not finite": not (np.isfinite(vectors_PD).all() and vectors_PD.any(1).all()),
        f"rows differ by {largest:.1e}": largest > 1e-5,
    }
    if any(faults.values()):
        sys.exit(
            f"The output of the killed run is wrong: {', '.join(fault for fault, is_so in faults.items() if is_so)}"
        )
    return {"complete_and_in_order": True, "rows_compared": compared, "max_difference": largest}


def reading_times(reader: EmbeddingReader, seed: int) -> dict[str, float]:
    """Measure milliseconds for opening the file and for reading one protein by id (median, 99th percentile)."""
    ids = np.random.default_rng(seed).choice(reader.ids, READ_COLD + READ_WARM)
    reader.close()
    with open(reader.path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    again = EmbeddingReader(reader.path)
    result = {"open_ms": round(1e3 * (time.perf_counter() - began), 1)}
    for name, asked in (("cold", ids[:READ_COLD]), ("warm", ids[READ_COLD:])):
        times = []
        for protein in asked.tolist():
            began = time.perf_counter()
            again[protein]
            times.append(1e3 * (time.perf_counter() - began))
        median, high = np.quantile(times, (0.5, 0.99))
        result |= {f"read_{name}_median_ms": round(float(median), 3), f"read_{name}_p99_ms": round(float(high), 3)}
    return result


if __name__ == "__main__":
    main()
