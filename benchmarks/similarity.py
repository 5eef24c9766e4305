"""Compare the groups of k-mers with alignments and with MMseqs2's groups, and the sets that are made of them.

Prints, per identity and method: the number of groups, the pairs of different sets that were aligned, the number of
groups after similar ones of different sets were merged, the time and the largest memory so far. If MMseqs2 is
installed: how many of the pairs that are in one group by either method are in one group by both, before and after.
--synthetic makes families of random proteins with substitutions, insertions, deletions and fragments.
"""

import argparse
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np

from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.similarity import group_by_identity
from esm2kit.tasks.split import SHARES, assign_to_sets, separate_groups

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def count_pairs(groups: list) -> int:
    """Count the pairs of proteins that are in one group."""
    return sum(size * (size - 1) // 2 for size in Counter(groups).values())


def draw_families(num_sequences: int, seed: int = 0) -> list[str]:
    """Draw families of 1 to 20 relatives of random founders of 50 to 600 residues."""
    generator = np.random.default_rng(seed)
    letters, found = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), set()
    while len(found) < num_sequences:
        founder = generator.choice(letters, int(generator.integers(50, 600)))
        for _ in range(int(generator.integers(1, 21))):
            kept = generator.random(len(founder)) < generator.choice([0.9, 0.7, 0.5])
            member = np.where(kept, founder, generator.choice(letters, len(founder)))
            start, stop = sorted(generator.integers(0, len(founder), 2))
            kind = generator.integers(4)
            if kind == 0:  # a fragment
                member = member[start // 2 : start // 2 + len(founder) // 2]
            elif kind == 1:  # a deletion
                member = np.delete(member, slice(start, min(stop, start + 20)))
            elif kind == 2:  # an insertion
                member = np.insert(member, start, generator.choice(letters, 10))
            found.add(member.tobytes().decode())
    return sorted(found)[:num_sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", type=Path, nargs="+", default=[SAMPLE / "ur90_ur50_sampler.fasta"])
    parser.add_argument("--synthetic", type=int, default=0, help="number of synthetic proteins instead of a FASTA")
    parser.add_argument("--identity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--methods", nargs="+", default=["kmers", "mmseqs"])
    parser.add_argument("--most", type=int, default=None, help="proteins, as a random sample")
    parser.add_argument("--max_cells", type=float, default=3e9)
    arguments = parser.parse_args()
    sequences = draw_families(arguments.synthetic)
    sequences = sequences or sorted({record.sequence for path in arguments.fasta for record in read_fasta(path)})
    if arguments.most:
        chosen = np.random.default_rng(0).choice(len(sequences), min(arguments.most, len(sequences)), replace=False)
        sequences = [sequences[row] for row in sorted(chosen)]
    print(f"{len(sequences):,} sequences of {np.median([len(each) for each in sequences]):.0f} residues in the median")
    methods = [method for method in arguments.methods if method != "mmseqs" or shutil.which("mmseqs")]
    for identity in arguments.identity:
        found = [compare(sequences, identity, method, int(arguments.max_cells)) for method in methods]
        for when, groups in zip(("before", "after"), zip(*found, strict=True), strict=True):
            if len(groups) < 2:
                continue
            first, second = groups
            both = count_pairs(list(zip(first, second, strict=True)))
            only = [count_pairs(groups) - both for groups in (first, second)]
            print(f"{when} the sets were compared: {both:,} pairs in one group by both, {only} by one only", flush=True)


def compare(sequences: list[str], identity: float, method: str, max_cells: int) -> tuple[list, list]:
    """Group the sequences and divide them into sets; return the groups before and after the sets were compared."""
    start, used = time.perf_counter(), time.process_time()
    groups = group_by_identity(sequences, identity, method=method)
    first, grouped, grouped_used = groups.numbers.tolist(), time.perf_counter() - start, time.process_time() - used
    rows, strata = np.arange(len(sequences)), np.zeros(len(sequences), int)

    def assign(group_P: np.ndarray) -> np.ndarray:
        return assign_to_sets(group_P, sequences, strata, SHARES, 0)

    _, check = separate_groups(groups, rows, assign, max_cells)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"identity {identity} {groups.tool}: {max(first) + 1:,} groups in {grouped:.0f} s ({grouped_used:.0f} s of "
        f"this process); {check.num_aligned:,} of {check.num_pairs:,} pairs of different sets aligned, all compared: "
        f"{check.complete}, {groups.numbers.max() + 1:,} groups in {time.perf_counter() - start:.0f} s "
        f"({time.process_time() - used:.0f} s of this process), {memory:.1f} GB",
        flush=True,
    )
    return first, groups.numbers.tolist()


if __name__ == "__main__":
    main()
