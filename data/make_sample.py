"""Create the pretraining set in data/sample: real proteins in the format of NVIDIA's esm2nv stage.

    python data/make_sample.py [--out data/sample] [--seed 0]

Requires Biopython and the Debian packages `mmseqs2` and `mmseqs2-examples`; takes about a minute on one core. Clusters
UniProtKB records at 90% and then 50% identity, as UniRef does, and selects complete families of related 50% clusters,
the largest first, until the files reach their size. The result depends only on the package's files, the version of
MMseqs2 and the seed. data/README.md describes the result and the reasons for the selection.
"""

import argparse
import gzip
import math
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from Bio.SeqIO.FastaIO import SimpleFastaParser

EXAMPLES = Path("/usr/share/doc/mmseqs2/example-data")
MIN_RESIDUES, MAX_RESIDUES = 40, 400
MAX_FILE_RESIDUES = 830_000  # in the four files together: about 0.93 MB with headers, line ends and mapping
VALID_SHARE = 0.08  # of the 50% clusters
FAMILY_EVALUE, FAMILY_COVERAGE = 1e-5, 0.7
STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


class Protein(NamedTuple):
    """A UniProtKB record: accession, protein name, organism (`OS=`) and residues."""

    accession: str
    name: str
    organism: str
    sequence: str


def read_uniprot(folder: Path = EXAMPLES) -> dict[str, Protein]:
    """Read the package's records by accession, without duplicates, in the order of the files."""
    proteins: dict[str, Protein] = {}
    for file_name in ("DB.fasta.gz", "QUERY.fasta.gz"):
        with gzip.open(folder / file_name, "rt", encoding="utf-8") as lines:
            for header, sequence in SimpleFastaParser(lines):
                accession = header.split("|")[1]
                name, _, rest = header.split(" ", 1)[1].partition(" OS=")
                organism = rest.split(" GN=")[0].split(" PE=")[0]
                proteins.setdefault(accession, Protein(accession, name, organism, sequence.upper()))
    return proteins


def write_fasta(path: Path, records: Iterable[tuple[str, str]], columns: int = 80) -> None:
    """Write records as `>id` and lines of at most `columns` residues."""
    with open(path, "w", encoding="utf-8") as file:
        for identifier, sequence in records:
            rows = (sequence[start : start + columns] for start in range(0, len(sequence), columns))
            file.write(f">{identifier}\n" + "\n".join(rows) + "\n")


def mmseqs(*arguments: str | float | Path) -> None:
    """Run an MMseqs2 command on one thread, so that the result is reproducible."""
    subprocess.run(["mmseqs", *map(str, arguments), "--threads", "1", "-v", "1"], check=True)


def cluster(sequences: dict[str, str], min_identity: float, work: Path) -> dict[str, list[str]]:
    """Cluster with MMseqs2: representative -> members sorted by id, including the representative.

    A member has an identity of at least `min_identity` to its representative over 80% of the member
    (`-c 0.8 --cov-mode 1`).
    """
    query = work / "cluster.fasta"
    write_fasta(query, sequences.items())
    mmseqs(
        *("easy-cluster", query, work / "cluster", work / "tmp"),
        *("--min-seq-id", min_identity, "-c", 0.8, "--cov-mode", 1),
    )
    members: dict[str, list[str]] = {}
    for line in (work / "cluster_cluster.tsv").read_text(encoding="utf-8").splitlines():
        representative, member = line.split("\t")
        members.setdefault(representative, []).append(member)
    return {representative: sorted(members[representative]) for representative in sorted(members)}


class Hit(NamedTuple):
    """A local alignment; identity and coverages are between 0 and 1."""

    query: str
    target: str
    identity: float
    query_coverage: float
    target_coverage: float


def search(queries: dict[str, str], targets: dict[str, str], work: Path, *options: str | float) -> list[Hit]:
    """Align queries with targets by MMseqs2 at high sensitivity (`-s 7`)."""
    write_fasta(work / "query.fasta", queries.items())
    write_fasta(work / "target.fasta", targets.items())
    mmseqs(
        *("easy-search", work / "query.fasta", work / "target.fasta", work / "hits.tsv", work / "tmp", "-s", 7),
        *("--format-output", "query,target,fident,qcov,tcov", *options),
    )
    rows = (line.split("\t") for line in (work / "hits.tsv").read_text(encoding="utf-8").splitlines())
    return [Hit(query, target, *map(float, numbers)) for query, target, *numbers in rows]


def components(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the connected components of a graph, largest first; equal sizes in the order of their first node."""
    root = {node: node for node in nodes}

    def find(node: str) -> str:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for left, right in edges:
        root[find(left)] = find(right)
    groups: dict[str, list[str]] = {}
    for node in sorted(root):
        groups.setdefault(find(node), []).append(node)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def unigram_perplexity(
    train: Iterable[str], valid: Iterable[str], mask_share: float = 1.0, random_share: float = 0.0
) -> float:
    """Compute the perplexity of the best prediction of `valid` from the frequencies in `train`, without context.

    This is the baseline of a language model. If all scored residues are masked (the defaults), it is the unigram
    perplexity. With ESM-2's masking (0.8, 0.1), 10% of the scored residues stay unchanged and 10% are replaced by a
    uniformly sampled residue, so a prediction that repeats the visible residue is much better. Counts standard residues
    only.
    """
    train_counts, valid_counts = Counter("".join(train)), Counter("".join(valid))
    num_train = sum(train_counts[letter] for letter in STANDARD_RESIDUES)
    num_valid = sum(valid_counts[letter] for letter in STANDARD_RESIDUES)
    frequency = {letter: train_counts[letter] / num_train for letter in STANDARD_RESIDUES}
    unchanged_share, each_random = 1 - mask_share - random_share, random_share / len(STANDARD_RESIDUES)

    def loss_when_visible(truth: str, visible: str) -> float:
        # Bayes: `visible` is unchanged, or replaces another residue
        unchanged = unchanged_share * frequency[visible]
        joint = each_random * frequency[truth] + (unchanged if truth == visible else 0)
        return -math.log(joint / (each_random + unchanged))

    def loss(truth: str) -> float:
        expected = -mask_share * math.log(frequency[truth])
        if unchanged_share > 0:
            expected += unchanged_share * loss_when_visible(truth, truth)
        if random_share > 0:
            expected += each_random * sum(loss_when_visible(truth, visible) for visible in STANDARD_RESIDUES)
        return expected

    return math.exp(sum(valid_counts[letter] * loss(letter) for letter in STANDARD_RESIDUES) / num_valid)


def make_sample(out: Path, seed: int) -> None:
    """Write the four files and families.tsv to `out`, and print a summary."""
    proteins = {
        accession: protein
        for accession, protein in read_uniprot().items()
        if MIN_RESIDUES <= len(protein.sequence) <= MAX_RESIDUES and "(Fragment" not in protein.name
    }
    residues = {accession: protein.sequence for accession, protein in proteins.items()}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        clusters_90 = cluster(residues, 0.9, work)
        clusters_50 = cluster({accession: residues[accession] for accession in clusters_90}, 0.5, work)
        representatives = {accession: residues[accession] for accession in clusters_50}
        related = search(representatives, representatives, work, "--max-seqs", 1000, "-e", FAMILY_EVALUE)
        families = components(
            representatives,
            (
                (hit.query, hit.target)
                for hit in related
                if min(hit.query_coverage, hit.target_coverage) >= FAMILY_COVERAGE
            ),
        )
        # The largest families first, until the files are full. Every member is written once, and a representative twice
        # more.
        family_of: dict[str, str] = {}
        file_residues = 0
        for family in families:
            file_residues += sum(
                2 * len(residues[row]) + sum(len(residues[member]) for member in clusters_50[row]) for row in family
            )
            if file_residues > MAX_FILE_RESIDUES:
                break
            family_of |= dict.fromkeys(family, family[0])

        shuffled = sorted(family_of)
        random.Random(seed).shuffle(shuffled)
        num_valid = round(VALID_SHARE * len(shuffled))
        valid, train = sorted(shuffled[:num_valid]), sorted(shuffled[num_valid:])
        # ESM-2's filter: no train member has 50% identity or more to a validation sequence over 80% of either sequence
        members = {member: residues[member] for row in train for member in clusters_50[row]}
        hits = search(
            *(members, {row: residues[row] for row in valid}, work),
            *("--min-seq-id", 0.5, "--alignment-mode", 3, "--max-seqs", 300),
        )
    close = {hit.query for hit in hits if max(hit.query_coverage, hit.target_coverage) >= 0.8}
    kept = [row for row in train if close.isdisjoint(clusters_50[row])]

    out.mkdir(parents=True, exist_ok=True)
    write_fasta(out / "uniref50_train_filt.fasta", ((f"UR50_{row}", residues[row]) for row in kept))
    write_fasta(out / "uniref50_valid.fasta", ((f"UR50_{row}", residues[row]) for row in valid))
    write_fasta(
        out / "ur90_ur50_sampler.fasta",
        [(f"UR90_{member}", residues[member]) for row in kept for member in clusters_50[row]]
        + [(f"UR50_{row}", residues[row]) for row in kept],
    )
    mapping = (f"UR50_{row}\t" + ",".join(f"UR90_{member}" for member in clusters_50[row]) for row in kept)
    (out / "mapping.tsv").write_text("ur50_id\tur90_ids\n" + "\n".join(mapping) + "\n", encoding="utf-8")
    splits = dict.fromkeys(kept, "train") | dict.fromkeys(valid, "valid")
    rows = (f"UR50_{row}\t{splits[row]}\t{family_of[row]}\t{proteins[row].name}" for row in sorted(splits))
    (out / "families.tsv").write_text("ur50_id\tset\tfamily\tprotein_name\n" + "\n".join(rows) + "\n", encoding="utf-8")

    train_families = {family_of[row] for row in kept}
    train_90 = [member for row in kept for member in clusters_50[row]]
    train_sequences, valid_sequences = [residues[row] for row in train_90], [residues[row] for row in valid]
    hidden = unigram_perplexity(train_sequences, valid_sequences)
    esm2 = unigram_perplexity(train_sequences, valid_sequences, mask_share=0.8, random_share=0.1)
    num_residues = sum(len(residues[row]) for row in train_90)
    related_valid = sum(family_of[row] in train_families for row in valid)
    print(f"{len(proteins)} UniProtKB records -> {len(clusters_90)} UR90 -> {len(clusters_50)} UR50 clusters")
    print(
        f"selected {len(family_of)} UR50 clusters in {len(set(family_of.values()))} families: {len(valid)} validation,"
    )
    print(f"{len(train) - len(kept)} removed as 50% identical to one of these, {len(kept)} for training")
    print(f"train: {len(kept)} clusters, {len(train_90)} UR90, {num_residues} residues")
    print(f"valid: {len(valid)} clusters, {sum(len(residues[row]) for row in valid)} residues; ", end="")
    print(f"{related_valid} have a member of their family in train")
    print(f"perplexity without context: {hidden:.4f} all masked (unigram), {esm2:.4f} with 80/10/10 masking")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Create the pretraining set in data/sample.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_sample(arguments.out, arguments.seed)
