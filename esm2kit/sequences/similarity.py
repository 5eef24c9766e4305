"""Group similar sequences, so that a split can keep close relatives in one set.

MMseqs2 aligns them if it is installed. Otherwise sequences are compared by the k-mers that they share. In both cases
groups are connected components: every pair that is found similar is in one group.
"""

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from esm2kit.core.errors import InputError
from esm2kit.core.processes import count_cores

logger = logging.getLogger(__name__)

K = 4  # residues per k-mer: 160,000 possible ones, so that unrelated proteins share few
# Probability that two random k-mers are equal: the sum of squared residue frequencies in UniProt to the power K
CHANCE = 0.0587**K
MIN_IDENTITY = 0.4  # below it k-mers do not separate relatives from unrelated proteins
MAX_SEQUENCES = 10_000  # compared by k-mers, whose time grows with the square
MIN_ALIGNED = 30  # residues; MMseqs2's prefilter finds few hits between shorter sequences
COVERAGE = 0.8  # of the shorter sequence, in alignments
_BLOCK = 256


class Groups(NamedTuple):
    """Groups of similar sequences.

    Args:
        numbers: (S,) group of each sequence.
        method: how they were found, as words of a sentence.
    """

    numbers: np.ndarray
    method: str


def group_by_identity(sequences: Sequence[str], identity: float) -> Groups:
    """Group sequences so that similar ones are in one group.

    The groups do not depend on the order of the sequences.

    Args:
        sequences: S different sequences in upper case.
        identity: share of equal residues from which two sequences are similar, over at least 80% of the shorter one.

    Returns:
        The groups, and the method: MMseqs2, or k-mers if it is not installed, fails, or the sequences are peptides.

    Raises:
        InputError: MMseqs2 cannot be used, and there are too many sequences for k-mers or the identity is below their
            range.
    """
    mmseqs, fix = shutil.which("mmseqs"), "Install MMseqs2 (conda install -c bioconda mmseqs2), or set"
    if mmseqs and np.median([len(sequence) for sequence in sequences]) >= MIN_ALIGNED:
        try:
            numbers = _group_by_mmseqs(mmseqs, sequences, identity)
            return Groups(numbers, f"groups of at least {identity:.0%} identity by MMseqs2")
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            outputs = [getattr(error, "stderr", None), getattr(error, "output", None), str(error)]
            output = next(text.strip() for text in outputs if text and text.strip())
            logger.warning("MMseqs2 failed (%s): comparing k-mers instead", output.splitlines()[-1])
    if mmseqs:  # it failed, or these are peptides
        fix = "Set"
    too_many = len(sequences) > MAX_SEQUENCES
    if too_many or identity < MIN_IDENTITY:
        found = f"{len(sequences):,} sequences" if too_many else f"an identity of {identity:g}"
        limit = f"at most {MAX_SEQUENCES:,} sequences" if too_many else f"at least {MIN_IDENTITY:g}"
        raise InputError(
            f"{found}: without MMseqs2, {limit} can be grouped. {fix} split_by to random.",
            code="identity.limit",
            sequences=len(sequences),
            identity=identity,
        )
    return Groups(group_by_kmers(sequences, identity), f"groups of about {identity:.0%} identity by shared {K}-mers")


def group_by_kmers(sequences: Sequence[str], identity: float) -> np.ndarray:
    """Group sequences: the connected components of the pairs that `find_similar_pairs` finds.

    Args:
        sequences: S sequences.
        identity: as for the pairs.

    Returns:
        (S,) number of the component of each sequence.
    """
    rows, others = find_similar_pairs(sequences, identity)
    graph = sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, others)), shape=(len(sequences),) * 2)
    return connected_components(graph, directed=False)[1]


def find_similar_pairs(sequences: Sequence[str], identity: float) -> np.ndarray:
    """Find the pairs of sequences that share many k-mers.

    At an identity of p a share of p^K of the k-mers survives independent substitutions. Two sequences are similar if
    they share that part of the k-mers of the one that has fewer, in addition to those that two random sequences of
    their sizes share.

    Args:
        sequences: S sequences.
        identity: p.

    Returns:
        (2, N) the places of the sequences of each pair, in both orders.
    """
    index: dict[str, int] = {}
    columns, counts = [], []
    for sequence in sequences:
        kmers = {sequence[place : place + K] for place in range(len(sequence) - K + 1)}
        columns += [index.setdefault(kmer, len(index)) for kmer in kmers]
        counts.append(len(kmers))
    sizes = np.array(counts)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(sequences), max(len(index), 1))
    has_kmer_SK = sparse.csr_matrix((np.ones(len(columns), dtype=np.int32), columns, offsets), shape=shape)
    by_kmer_KS = has_kmer_SK.T.tocsr()
    pairs = []
    for start in range(0, len(sequences), _BLOCK):
        shared = (has_kmer_SK[start : start + _BLOCK] @ by_kmer_KS).tocoo()
        first, second = sizes[shared.row + start], sizes[shared.col]
        required = identity**K * np.minimum(first, second) + CHANCE * first * second
        similar = shared.data >= np.maximum(required, 1)
        pairs.append(np.stack([shared.row[similar] + start, shared.col[similar]]))
    return np.concatenate(pairs, axis=1)


def _group_by_mmseqs(program: str, sequences: Sequence[str], identity: float) -> np.ndarray:
    """Group sequences by MMseqs2's alignments; its input is sorted, so that their order does not matter."""
    order = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row]), sequences[row]))
    with tempfile.TemporaryDirectory(prefix="esm2kit-") as folder:
        fasta, result = Path(folder) / "in.fasta", Path(folder) / "out"
        fasta.write_text("".join(f">{row}\n{sequences[row]}\n" for row in order), encoding="ascii")
        command = [program, "easy-cluster", fasta, result, Path(folder) / "tmp", "--min-seq-id", identity]
        # mode 1: connected components; coverage of the target, which each of two sequences is in turn
        command += ["--cluster-mode", 1, "--single-step-clustering", "-c", COVERAGE, "--cov-mode", 1]
        command += ["--alignment-mode", 3, "--threads", count_cores(), "-v", 1]
        subprocess.run(
            list(map(str, command)), capture_output=True, check=True, text=True, encoding="utf-8", errors="replace"
        )
        lines = (Path(folder) / "out_cluster.tsv").read_text(encoding="utf-8").splitlines()
    numbers = np.full(len(sequences), -1)
    for representative, member in (line.split("\t") for line in lines):
        numbers[int(member)] = int(representative)
    if (numbers < 0).any():
        raise ValueError(f"no cluster for {(numbers < 0).sum()} sequences")
    return numbers
