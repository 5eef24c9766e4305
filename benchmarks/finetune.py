"""Fine-tune the 8M model from random weights on gb1 three_vs_rest with the published recipe.

    python benchmarks/finetune.py --data_dir flip --out_dir finetune_gb1

Schmirler et al. 2024 (10.1038/s41467-024-51844-2, figure S7) report a test Spearman correlation of 0.857 +- 0.008 for
this experiment; FLIP's one-hot ridge reaches 0.755. The recipe (table S12) trains all weights with lr 2e-5, batch size
8 and 20 epochs, with five validations per epoch, and scores the best checkpoint on the test set. Each seed has
different initial weights.

`--workers` seeds run in parallel with one thread each, and interrupted runs resume. The log is
`<out_dir>/seed=<n>/log.txt`, and metrics.csv is in the same folder. `--max_steps 60` is a trial with 300 proteins per
set, which prints the speed and the estimated time of the full experiment.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PUBLISHED, RIDGE, MARGIN = 0.857, 0.755, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, default=Path("finetune_gb1"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, help="Updates of a trial, instead of 20 epochs.")
    parser.add_argument(
        "--micro_batch_size", type=int, default=4, help="Sequences per micro-batch; does not change the result."
    )
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--workers", type=int, default=2, help="Seeds that run in parallel.")
    parser.add_argument("--size", default="8M", help="Size of the model. The published figure is that of 8M.")
    parser.add_argument("--no_benchmark", action="store_true", help="Leave out the baselines of the first seed.")
    parser.add_argument("--compile", default="auto", choices=("auto", "true", "false"))
    arguments = parser.parse_args()
    waiting, running, started = list(arguments.seeds), {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < arguments.workers:
            seed = waiting.pop(0)
            running[seed] = start(arguments, seed)
        for seed, process in list(running.items()):
            if process.poll() is not None:
                del running[seed]
                message = last_line(folder_of(arguments, seed) / "log.txt")
                print(f"seed {seed}: exit code {process.returncode}; {message}", flush=True)
        time.sleep(1)
    summarise(arguments, time.monotonic() - started)


def folder_of(arguments: argparse.Namespace, seed: int) -> Path:
    return arguments.out_dir / f"seed={seed}"


def start(arguments: argparse.Namespace, seed: int) -> subprocess.Popen:
    """Start `esm2kit finetune` for one seed; only the first seed's report includes the baselines."""
    folder = folder_of(arguments, seed)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "task": "gb1",
        "split": "three_vs_rest",
        "data_dir": arguments.data_dir,
        "out_dir": folder,
        "model": arguments.size,
        "untrained_seed": seed,
        "seeds": [seed],
        "preset": "schmirler",
        "global_batch_size": 8,
        "micro_batch_size": arguments.micro_batch_size,
        "accelerator": arguments.accelerator,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "benchmark": seed == arguments.seeds[0] and arguments.max_steps is None and not arguments.no_benchmark,
        "max_steps": arguments.max_steps or "null",
    }
    if arguments.max_steps is not None:
        settings |= {"limit": 300, "val_check_interval": max(1, arguments.max_steps // 3)}
    command = [sys.executable, "-m", "esm2kit", "finetune", *(f"--{name}={value}" for name, value in settings.items())]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no output"


def summarise(arguments: argparse.Namespace, seconds: float) -> None:
    done = {}
    for seed in arguments.seeds:
        path = folder_of(arguments, seed) / "finetune.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"finished": False}
        if run["finished"]:
            done[seed] = run
    scores = [run["test"]["spearman"]["value"] for run in done.values()]
    if not scores:
        sys.exit("no seed has finished: see the logs")
    mean, spread = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
    summary = {
        "test_spearman": dict(zip(map(str, done), scores, strict=True)),
        "mean": mean,
        "spread": spread,
        "published": PUBLISHED if arguments.size == "8M" else None,
        "onehot_ridge": RIDGE,
        "within_margin": abs(mean - PUBLISHED) <= MARGIN if arguments.size == "8M" else None,
        "beats_ridge": mean > RIDGE,
        "updates": {str(seed): run["runs"][0]["step"] for seed, run in done.items()},
        "seconds_here": round(seconds),
    }
    if arguments.max_steps is not None:
        rates = [rate(folder_of(arguments, seed) / "metrics.csv") for seed in done]
        seconds_per_seed = 20 * 2691 * 267 / statistics.fmean(rates)
        summary = {
            "trial": True,
            "tokens_per_s_of_a_seed": rates,
            "hours_of_a_whole_seed": seconds_per_seed / 3600,
        } | summary
    print(json.dumps(summary, indent=2))


def rate(path: Path) -> float:
    """Compute the median tokens/s of a run's logged updates, without the first one."""
    with open(path, encoding="utf-8", newline="") as file:
        return statistics.median(
            [float(row["tokens_per_s"]) for row in csv.DictReader(file) if row["tokens_per_s"]][1:]
        )


if __name__ == "__main__":
    main()
