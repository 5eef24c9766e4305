"""Generate synthetic UniRef-like input of any size in the format of NVIDIA's esm2nv stage, at several hundred MB/s.

A record's text depends only on its number, so the UniRef50 representatives have the same sequences in the sampler and
the train FASTA without any state. Sequences are windows of a random pool: their lengths and composition are realistic,
but they have no biological structure.

    python -m benchmarks.synthetic --num_records 500000 --out_dir somewhere
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm2kit.core.rng import mix, permutation
from esm2kit.sequences.text import copy_pieces

WRAP = 60
POOL_RESIDUES = 1 << 24
BLOCK_CLUSTERS = 8192
# residue frequencies in per cent, approximately as in UniProtKB
COMPOSITION = {
    "A": 8.3, "L": 9.7, "G": 7.1, "V": 6.9, "E": 6.7, "S": 6.6, "I": 5.9, "R": 5.5, "D": 5.5, "T": 5.4,
    "K": 5.8, "P": 4.7, "F": 3.9, "N": 4.1, "Q": 3.9, "Y": 2.9, "M": 2.4, "H": 2.3, "C": 1.4, "W": 1.1,
}  # fmt: skip


def num_members(clusters: np.ndarray) -> np.ndarray:
    """Sample cluster sizes: 63% have one member, a tail follows 1 / k^2.44 up to 20,000, the mean is 2.9 (UniRef)."""
    uniform = (mix(clusters.astype(np.uint64) + np.uint64(1 << 60)) >> np.uint64(11)) * 2.0**-53
    return np.minimum(np.floor((1 - uniform) ** (-1 / 1.44)), 20_000).astype(np.int64)


def residues_of(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each record's start in the pool and its length: log-normal, median 262, mean about 345."""
    words = mix(records.astype(np.uint64))
    low, high = (words & np.uint64(0xFFFFFFFF)) * 2.0**-32, (words >> np.uint64(32)) * 2.0**-32
    normal = np.sqrt(-2 * np.log1p(-low)) * np.cos(2 * np.pi * high)
    sizes = np.clip(np.exp(np.log(262) + 0.74 * normal), 11, 36_000).astype(np.int64)
    starts = (mix(words) % np.uint64(POOL_RESIDUES - 36_000)).astype(np.int64)
    return starts, sizes


def pool() -> np.ndarray:
    shares = np.array(list(COMPOSITION.values()))
    letters = np.frombuffer("".join(COMPOSITION).encode(), dtype=np.uint8)
    return np.random.default_rng(0).choice(letters, POOL_RESIDUES, p=shares / shares.sum())


def names(prefix: bytes, records: np.ndarray) -> np.ndarray:
    """Generate unique names such as UniRef90_04711081516, (R, len(prefix) + 11) bytes, in random order."""
    numbers = permutation(7, 0, records, 10**11)
    digits = numbers[:, None] // 10 ** np.arange(10, -1, -1) % 10 + ord("0")
    return np.hstack([np.tile(np.frombuffer(prefix, np.uint8), (records.size, 1)), digits.astype(np.uint8)])


def fasta(pool_N: np.ndarray, prefix: bytes, records: np.ndarray) -> np.ndarray:
    """Format records as FASTA with lines of 60 residues."""
    header = names(b">" + prefix, records)
    tail = np.tile(
        np.frombuffer(b" Uncharacterized protein n=1 Tax=synthetic TaxID=32630\n", np.uint8), (records.size, 1)
    )
    header = np.hstack([header, tail])
    starts, sizes = residues_of(records)
    num_lines = -(-sizes // WRAP)
    first = np.cumsum(2 * num_lines + 1) - (2 * num_lines + 1)  # a header, then lines and their ends in turn
    source = np.concatenate([pool_N, header.ravel(), np.frombuffer(b"\n", np.uint8)])
    begin = np.full(int((2 * num_lines + 1).sum()), source.size - 1)
    end = np.full_like(begin, source.size)
    begin[first] = pool_N.size + np.arange(records.size) * header.shape[1]
    end[first] = begin[first] + header.shape[1]
    of = np.repeat(np.arange(records.size), num_lines)
    nth = np.arange(of.size) - np.repeat(np.cumsum(num_lines) - num_lines, num_lines)
    place = first[of] + 1 + 2 * nth
    begin[place] = starts[of] + WRAP * nth
    end[place] = np.minimum(starts[of] + WRAP * (nth + 1), starts[of] + sizes[of])
    return copy_pieces(source, begin, end).values


def blocks(num_clusters: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Clusters, their members per cluster, and the number of the first member."""
    first_member = 0
    for first in range(0, num_clusters, BLOCK_CLUSTERS):
        clusters = np.arange(first, min(first + BLOCK_CLUSTERS, num_clusters))
        counts = num_members(clusters)
        yield clusters, counts, first_member
        first_member += int(counts.sum())


def write_trio(out_dir: Path, num_records: int) -> dict[str, Path]:
    """Write a sampler FASTA of about `num_records` records, its train FASTA and its mapping.

    Returns: the three paths, named as in PreprocessConfig.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    num_clusters = max(int(num_records / 3.9), 1)
    paths = {name: out_dir / f"{name}.{kind}" for name, kind in
             (("train_fasta", "fasta"), ("sampler_fasta", "fasta"), ("mapping", "tsv"))}  # fmt: skip
    pool_N = pool()
    with open(paths["train_fasta"], "wb") as train, open(paths["sampler_fasta"], "wb") as sampler, \
         open(paths["mapping"], "wb") as mapping:  # fmt: skip
        mapping.write(b"ur50_id\tur90_ids\n")
        for clusters, counts, first_member in blocks(num_clusters):
            members = first_member + np.arange(counts.sum())
            heads = first_member + np.cumsum(counts) - counts
            sampler.write(fasta(pool_N, b"UniRef90_", members))
            train.write(fasta(pool_N, b"UniRef50_", heads))
            ends = np.full(members.size, ord(","), np.uint8)
            ends[heads[1:] - first_member - 1] = ends[-1] = ord("\n")
            lines = np.hstack([names(b"UniRef90_", members), ends[:, None]])
            keys = np.hstack([names(b"UniRef50_", heads), np.full((clusters.size, 1), ord("\t"), np.uint8)])
            source = np.concatenate([keys.ravel(), lines.ravel()])
            starts = np.empty(2 * clusters.size, np.int64)
            stops = np.empty_like(starts)
            starts[::2] = np.arange(clusters.size) * keys.shape[1]
            stops[::2] = starts[::2] + keys.shape[1]
            starts[1::2] = keys.size + (heads - first_member) * lines.shape[1]
            stops[1::2] = starts[1::2] + counts * lines.shape[1]
            mapping.write(copy_pieces(source, starts, stops).values)
        for _, counts, first_member in blocks(num_clusters):
            sampler.write(fasta(pool_N, b"UniRef50_", first_member + np.cumsum(counts) - counts))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    written = write_trio(arguments.out_dir, arguments.num_records)
    megabytes = sum(path.stat().st_size for path in written.values()) / 1e6
    print(f"{arguments.out_dir}: {megabytes:,.0f} MB in {time.monotonic() - began:.0f} s")
