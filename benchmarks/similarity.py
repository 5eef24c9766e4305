"""Compare the pairs of relatives that shared 4-mers find with edit distances and with MMseqs2's groups.

Prints, per identity: the share of pairs with that identity or more that 4-mers find, the share of pairs 20 points below
it that they find as well, and the number of groups of either method. Only pairs of similar length are compared, because
an edit distance counts the residues that the longer sequence has in addition.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.similarity import find_similar_pairs, group_by_identity, group_by_kmers

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", type=Path, nargs="+", default=[SAMPLE / "ur90_ur50_sampler.fasta"])
    arguments = parser.parse_args()
    sequences = sorted({record.sequence for path in arguments.fasta for record in read_fasta(path)})
    lengths = np.array([len(sequence) for sequence in sequences])
    alike_SS = np.minimum.outer(lengths, lengths) > 0.8 * np.maximum.outer(lengths, lengths)
    pair_SS = np.triu(alike_SS, 1)
    identity_SS = cdist(sequences, sequences, scorer=Levenshtein.normalized_similarity)
    print(f"{len(sequences)} sequences, {pair_SS.sum():,} pairs of similar length")
    for identity in (0.5, 0.6, 0.7, 0.8):
        start = time.perf_counter()
        found_SS = np.zeros(pair_SS.shape, dtype=bool)
        found_SS[tuple(find_similar_pairs(sequences, identity))] = True
        seconds = time.perf_counter() - start
        above, below = pair_SS & (identity_SS >= identity), pair_SS & (identity_SS < identity - 0.2)
        line = f"identity {identity}: found {found_SS[above].mean():.4f} of {above.sum():,} pairs above, "
        line += f"{found_SS[below].mean():.6f} of {below.sum():,} pairs below {identity - 0.2:.1f}; "
        print(line + f"{group_by_kmers(sequences, identity).max() + 1} groups in {seconds:.1f} s", end="")
        if shutil.which("mmseqs"):
            start = time.perf_counter()
            groups = len(set(group_by_identity(sequences, identity).numbers.tolist()))
            print(f"; MMseqs2 {groups} groups in {time.perf_counter() - start:.1f} s", end="")
        print()


if __name__ == "__main__":
    main()
