"""Compare the groups of k-mers with alignments and with MMseqs2's groups, and the sets that are made of them.

Prints, per identity and method: the number of groups, the pairs of different sets that were aligned, the number of
groups after similar ones of different sets were merged, and the time. If MMseqs2 is installed: how many of the pairs
that are in one group by either method are in one group by both.
"""

import argparse
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np

from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.similarity import group_by_identity
from esm2kit.tasks.split import SHARES, assign_sets

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def count_pairs(groups: list) -> int:
    """Count the pairs of proteins that are in one group."""
    return sum(size * (size - 1) // 2 for size in Counter(groups).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", type=Path, nargs="+", default=[SAMPLE / "ur90_ur50_sampler.fasta"])
    parser.add_argument("--identity", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--methods", nargs="+", default=["kmers", "mmseqs"])
    parser.add_argument("--most", type=int, default=None, help="proteins, as a random sample")
    parser.add_argument("--max_cells", type=float, default=3e9)
    arguments = parser.parse_args()
    sequences = sorted({record.sequence for path in arguments.fasta for record in read_fasta(path)})
    if arguments.most:
        chosen = np.random.default_rng(0).choice(len(sequences), min(arguments.most, len(sequences)), replace=False)
        sequences = [sequences[row] for row in sorted(chosen)]
    print(f"{len(sequences):,} sequences of {np.median([len(each) for each in sequences]):.0f} residues in the median")
    methods = [method for method in arguments.methods if method != "mmseqs" or shutil.which("mmseqs")]
    for identity in arguments.identity:
        found = {}
        for method in methods:
            start, used = time.perf_counter(), time.process_time()
            groups = group_by_identity(sequences, identity, method=method)
            grouped = time.perf_counter() - start
            found[method] = groups.numbers.tolist()
            assigned = assign_sets(
                sequences, np.zeros(len(sequences), int), SHARES, "identity", identity, method=method,
                max_cells=int(arguments.max_cells),
            )  # fmt: skip
            check = assigned.check
            print(
                f"identity {identity} {groups.tool}: {groups.numbers.max() + 1} groups in {grouped:.1f} s; sets: "
                f"{check.num_aligned:,} of {check.num_pairs:,} pairs aligned, complete {check.complete}, "
                f"{assigned.groups.max() + 1} groups; {time.perf_counter() - start:.1f} s in all, "
                f"{time.process_time() - used:.1f} s of this process"
            )
        if len(found) == 2:
            first, second = found.values()
            both = count_pairs(list(zip(first, second, strict=True)))
            either = count_pairs(first) + count_pairs(second) - both
            only = {name: count_pairs(groups) - both for name, groups in found.items()}
            print(f"identity {identity}: {both:,} of {either:,} pairs of a group are those of both; only {only}")


if __name__ == "__main__":
    main()
