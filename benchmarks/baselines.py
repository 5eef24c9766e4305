"""Score baselines without a language model on FLIP: majority or mean, one-hot ridge, one-hot CNN.

    python benchmarks/baselines.py --flip flip

Prints the machine and the date, then one line per score: the mean over seeds with its 95% interval over proteins, the
spread over seeds, and the expected value (from data/golden/published.yaml or an earlier run of this script). The ridge
follows FLIP 2021. The residue CNN is conv7-32-conv7 on one-hot residues, trained for six epochs.
"""

import argparse
import datetime
import math
import time
from pathlib import Path

import torch

from esm2kit.benchmarking.baselines.fit import fit_baseline
from esm2kit.benchmarking.scores import number_proteins, score_fitted
from esm2kit.core.hardware import cpu_name
from esm2kit.tasks.data import load_task
from esm2kit.tasks.metrics import sample_counts

# (task, split, metric, baseline) -> expected value and tolerance
FIGURES = {
    ("gb1", "one_vs_rest", "spearman", "onehot_ridge"): (0.279, 0.005),
    ("gb1", "two_vs_rest", "spearman", "onehot_ridge"): (0.594, 0.005),
    ("gb1", "three_vs_rest", "spearman", "onehot_ridge"): (0.755, 0.005),
    ("gb1", "two_vs_rest", "rmse", "mean"): (1.252, 0.0005),
    ("secondary_structure", "sampled", "accuracy", "majority"): (0.384, 0.01),
    ("secondary_structure", "sampled", "accuracy", "onehot_cnn"): (0.663, 0.01),
    ("conservation", "sampled", "accuracy", "majority"): (0.140, 0.01),
    ("conservation", "sampled", "accuracy", "onehot_cnn"): (0.202, 0.01),
    ("bind", "from_publication", "mcc", "onehot_cnn"): (0.0, 0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flip", type=Path, required=True, help="Folder with FLIP's task folders.")
    parser.add_argument("--tasks", nargs="*", help="Tasks to run. Default: all.")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="Seeds of the CNN.")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds, threads = arguments.seeds, arguments.threads
    print(
        f"{cpu_name()}, {threads} threads, torch {torch.__version__}, {datetime.date.today()}, seeds {seeds}",
        flush=True,
    )
    outside = 0
    for (task, split, metric, name), (expected, within) in FIGURES.items():
        if arguments.tasks and task not in arguments.tasks:
            continue
        start = time.perf_counter()
        data = load_task(task, split, arguments.flip)
        found = fit_baseline(name, data, tuple(seeds))
        counts_RP = sample_counts(int(number_proteins(data).max()) + 1)
        score = score_fitted(found.fitted, data, counts_RP)[metric]
        value, low, high = score.interval
        holds = abs(value - expected) <= within
        between = f"[{low:.4f}, {high:.4f}]" if math.isfinite(low) else "for every bootstrap replicate"
        outside += not holds
        print(
            f"{task} {split} {name}: {metric} {value:.4f} {between}, seed spread {score.seed_spread:.4f};"
            f" expected {expected} +- {within}: {'as expected' if holds else 'NOT AS EXPECTED'}"
            f" ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    raise SystemExit(outside)


if __name__ == "__main__":
    main()
