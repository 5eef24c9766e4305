"""The data in data/: complete files in the documented formats, and no leakage between splits."""

import hashlib
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from Bio.SeqIO.FastaIO import SimpleFastaParser
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from esm2kit.sequences.alphabet import RESIDUE_LETTERS, STANDARD_RESIDUES

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
SAMPLE = DATA / "sample"
GOLDEN = DATA / "golden"
TASKS = {task["name"]: task for task in yaml.safe_load((SAMPLE / "tasks" / "tasks.yaml").read_text())["tasks"]}
PROTEIN_TASKS = [name for name, task in TASKS.items() if task["level"] == "protein"]
RESIDUE_TASKS = [name for name, task in TASKS.items() if task["level"] == "residue"]
SETS = {("train", "False"): "train", ("train", "True"): "validation", ("test", "False"): "test"}


def read_fasta(path: Path) -> dict[str, str]:
    """Read a FASTA file with Biopython, as header -> sequence; headers must be unique."""
    with open(path, encoding="utf-8") as lines:
        records = list(SimpleFastaParser(lines))
    assert len(dict(records)) == len(records), f"a header is repeated in {path.name}"
    return dict(records)


def read_task(name: str) -> dict[str, tuple[str, str, str]]:
    """Read a task as protein id -> (set, residues, label); the label is TARGET, or one letter per residue."""
    folder = SAMPLE / "tasks" / name
    sequences = read_fasta(folder / "sequences.fasta") if name in RESIDUE_TASKS else {}
    proteins = {}
    for header, letters in read_fasta(folder / "sampled.fasta").items():
        match = re.fullmatch(r"(\S+)(?: TARGET=(\S+))? SET=(train|test) VALIDATION=(True|False)", header)
        assert match, f"{name}: header {header!r} is not of FLIP's form"
        identifier, target, *where = match.groups()
        assert (target is None) == (name in RESIDUE_TASKS)
        content = (sequences[identifier], letters) if target is None else (letters, target)
        proteins[identifier] = (SETS[tuple(where)], *content)
    assert not sequences or set(sequences) == set(proteins)
    return proteins


@pytest.fixture(scope="module")
def train() -> dict[str, str]:
    return read_fasta(SAMPLE / "uniref50_train_filt.fasta")


@pytest.fixture(scope="module")
def valid() -> dict[str, str]:
    return read_fasta(SAMPLE / "uniref50_valid.fasta")


@pytest.fixture(scope="module")
def sampler() -> dict[str, str]:
    return read_fasta(SAMPLE / "ur90_ur50_sampler.fasta")


@pytest.fixture(scope="module")
def mapping() -> list[tuple[str, list[str]]]:
    header, *rows = (SAMPLE / "mapping.tsv").read_text().splitlines()
    assert header == "ur50_id\tur90_ids"
    return [(row.split("\t")[0], row.split("\t")[1].split(",")) for row in rows]


def test_sample_stays_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 1_500_000


def test_readme_lists_every_file_with_its_sha256() -> None:
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (DATA / "README.md").read_text(), re.M))
    shipped = [path for folder in (SAMPLE, GOLDEN) for path in folder.rglob("*") if path.is_file()]
    assert {
        path.relative_to(DATA).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in shipped
    } == listed


def test_mapping_rows_follow_the_train_fasta(train: dict[str, str], mapping: list[tuple[str, list[str]]]) -> None:
    assert [ur50 for ur50, _ in mapping] == list(train)


def test_sampler_contains_exactly_the_ids_of_the_mapping(
    train: dict[str, str], sampler: dict[str, str], mapping: list[tuple[str, list[str]]]
) -> None:
    ur90 = [member for _, members in mapping for member in members]
    assert len(ur90) == len(set(ur90)), "a UR90 id is in two clusters"
    assert set(sampler) == set(ur90) | set(train)
    assert all(sampler[ur50] == sequence for ur50, sequence in train.items())


def test_representative_is_a_member_of_its_cluster(
    train: dict[str, str], sampler: dict[str, str], mapping: list[tuple[str, list[str]]]
) -> None:
    assert all(any(sampler[member] == train[ur50] for member in members) for ur50, members in mapping)


def test_validation_and_training_share_no_protein(valid: dict[str, str], sampler: dict[str, str]) -> None:
    accessions = {identifier.split("_", 1)[1] for identifier in sampler}
    assert len(valid) >= 60
    assert not {identifier.split("_", 1)[1] for identifier in valid} & accessions
    assert not set(valid.values()) & set(sampler.values())


@pytest.mark.parametrize("name", ["uniref50_train_filt.fasta", "uniref50_valid.fasta", "ur90_ur50_sampler.fasta"])
def test_every_record_is_a_protein(name: str) -> None:
    for identifier, sequence in read_fasta(SAMPLE / name).items():
        assert re.fullmatch(r"UR[59]0_[A-Z0-9]+", identifier)
        assert 40 <= len(sequence) <= 400
        assert set(sequence) <= set(RESIDUE_LETTERS)
        assert len(set(sequence)) >= 8, f"{identifier} is not a natural protein"


def test_families_list_every_cluster(train: dict[str, str], valid: dict[str, str]) -> None:
    rows = [line.split("\t") for line in (SAMPLE / "families.tsv").read_text().splitlines()]
    assert rows[0] == ["ur50_id", "set", "family", "protein_name"]
    assert {row[0]: row[1] for row in rows[1:]} == dict.fromkeys(train, "train") | dict.fromkeys(valid, "valid")
    assert all(len(row) == 4 and row[3] for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_task_metadata_match_the_folder(name: str) -> None:
    task = TASKS[name]
    assert task["level"] in ("residue", "protein")
    assert task["target"] in ("class", "value")
    assert task["metric"] in ("accuracy", "spearman")
    assert isinstance(task["computed"], bool)
    assert task["source"]
    assert task["licence"]
    assert task["description"]
    assert (SAMPLE / "tasks" / name / f"{task['split']}.fasta").is_file()
    assert all((SAMPLE / "tasks" / name / file).is_file() for file in task["files"].values())


def test_tasks_cover_every_kind() -> None:
    kinds = {(task["level"], task["target"]) for task in TASKS.values()}
    assert kinds >= {("residue", "class"), ("protein", "class"), ("protein", "value")}
    folders = {path.name for path in (SAMPLE / "tasks").iterdir() if path.is_dir()}
    assert folders == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_task_splits_share_no_sequence(name: str) -> None:
    proteins = read_task(name)
    sizes = Counter(where for where, _, _ in proteins.values())
    assert sizes["train"] >= 200
    assert sizes["validation"] >= 30
    assert sizes["test"] >= 80
    assert len({sequence for _, sequence, _ in proteins.values()}) == len(proteins)
    for _, sequence, _ in proteins.values():
        assert set(sequence) <= set(STANDARD_RESIDUES)
        assert 50 <= len(sequence) <= 250


@pytest.mark.parametrize("name", TASKS)
def test_task_proteins_are_not_in_validation(name: str, valid: dict[str, str]) -> None:
    assert not {sequence for _, sequence, _ in read_task(name).values()} & set(valid.values())


def kmers(sequence: str, size: int = 12) -> set[str]:
    return {sequence[start : start + size] for start in range(len(sequence) - size + 1)}


@pytest.mark.parametrize("name", TASKS)
def test_task_splits_share_no_long_segment(name: str) -> None:
    """MMseqs2 separated homologous proteins; many shared 12-mers would show that it failed.

    The threshold is a fifth of a sequence, as short shared segments, such as purification tags of PDB chains, do occur.
    """
    segments: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for where, sequence, _ in read_task(name).values():
        segments[where] |= kmers(sequence)
    for left, right in combinations(segments, 2):
        for identifier, (where, sequence, _) in read_task(name).items():
            if where == right:
                shared = kmers(sequence) & segments[left]
                assert len(shared) <= len(sequence) / 5, f"{identifier} of {right} shares a segment with {left}"


@pytest.mark.parametrize("name", RESIDUE_TASKS)
def test_residue_labels_and_masks_match_their_sequence(name: str) -> None:
    masks = read_fasta(SAMPLE / "tasks" / name / "mask.fasta")
    proteins = read_task(name)
    assert set(masks) == set(proteins)
    scored: Counter[str] = Counter()
    for identifier, (_, sequence, labels) in proteins.items():
        assert len(sequence) == len(labels) == len(masks[identifier])
        assert re.fullmatch("01+0", masks[identifier]), "only the ends of a chain have no state"
        scored.update(label for label, mask in zip(labels, masks[identifier], strict=True) if mask == "1")
    assert set(scored) == set(TASKS[name]["classes"])
    assert min(scored.values()) > 0.2 * scored.total(), f"the classes are too unequal: {scored}"


def test_domains_of_life_are_balanced_and_match_the_organisms() -> None:
    rows = [line.split("\t") for line in (SAMPLE / "tasks/domain_of_life/organisms.tsv").read_text().splitlines()]
    assert rows[0] == ["id", "organism", "ncbi_taxid", "domain"]
    proteins = read_task("domain_of_life")
    assert {row[0]: row[3] for row in rows[1:]} == {name: target for name, (_, _, target) in proteins.items()}
    assert all(row[2].isdecimal() for row in rows[1:])
    by_genus = {}
    for _, organism, _, domain in rows[1:]:
        by_genus.setdefault(organism.split()[0], set()).add(domain)
    assert all(len(domains) == 1 for genus, domains in by_genus.items() if genus[0].isupper())
    sizes = Counter((where, target) for where, _, target in proteins.values())
    for where in ("train", "validation", "test"):
        assert len({sizes[where, domain] for domain in TASKS["domain_of_life"]["classes"]}) == 1


def test_helix_contents_are_shares_that_vary() -> None:
    values = [float(target) for _, _, target in read_task("helix_content_pdb").values()]
    assert all(0 <= value <= 1 for value in values)
    assert len(set(values)) > len(values) / 2
    assert not set(read_task("helix_content_pdb")) & set(read_task("secondary_structure_pdb"))


def test_readme_states_the_unigram_baselines(valid: dict[str, str], sampler: dict[str, str]) -> None:
    sys.path.insert(0, str(DATA))
    try:
        from make_sample import unigram_perplexity
    finally:
        sys.path.remove(str(DATA))
    ur90 = [sequence for identifier, sequence in sampler.items() if identifier.startswith("UR90_")]
    hidden = unigram_perplexity(ur90, valid.values())
    esm2 = unigram_perplexity(ur90, valid.values(), mask_share=0.8, random_share=0.1)
    readme = (DATA / "README.md").read_text()
    assert f"| all masked (unigram) | {hidden:.2f} |" in readme
    assert f"| ESM-2's masking, 80/10/10 | {esm2:.2f} |" in readme


def test_readme_states_the_cluster_sizes() -> None:
    rows = (DATA / "sample" / "mapping.tsv").read_text().splitlines()[1:]
    sizes = [len(set(row.split("\t")[1].split(","))) for row in rows]
    numbers = [sum(min(size, 4) == number for size in sizes) for number in (1, 2, 3, 4)]
    counts = " / ".join(map(str, numbers))
    line = f"There are {counts} clusters with 1 / 2 / 3 / 4 or more members; the largest has {max(sizes)}."
    assert line in (DATA / "README.md").read_text()


def composition(sequences: list[str]) -> np.ndarray:
    """Compute the share of each standard residue, (P, 20)."""
    return np.array(
        [[sequence.count(letter) / len(sequence) for letter in STANDARD_RESIDUES] for sequence in sequences]
    )


def read_sets(name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Read a task as set -> (sequences, labels)."""
    rows = sorted(read_task(name).values())
    return {
        where: tuple(map(list, zip(*(row[1:] for row in rows if row[0] == where), strict=True)))
        for where in SETS.values()
    }


def test_readme_states_the_task_baselines() -> None:
    """The baselines are the most common label, and the composition of each sequence."""
    readme = (DATA / "README.md").read_text()

    sets = read_sets("secondary_structure_pdb")
    counts = Counter()
    for sequence, labels in zip(*sets["train"], strict=True):
        counts.update(zip(sequence[1:-1], labels[1:-1], strict=True))
    best = {residue: max("HEC", key=lambda label: counts[residue, label]) for residue in STANDARD_RESIDUES}
    test = [pair for rows in zip(*sets["test"], strict=True) for pair in zip(rows[0][1:-1], rows[1][1:-1], strict=True)]
    majority = sum(label == "H" for _, label in test) / len(test)
    alone = sum(best[residue] == label for residue, label in test) / len(test)
    assert f"| secondary_structure_pdb | accuracy | {majority:.3f} | {alone:.3f} |" in readme

    sets = read_sets("domain_of_life")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(composition(sets["train"][0]), sets["train"][1])
    accuracy = classifier.score(composition(sets["test"][0]), sets["test"][1])
    assert f"| domain_of_life | accuracy | 0.333 | {accuracy:.3f} |" in readme

    sets = read_sets("helix_content_pdb")
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=1.0))
    ridge.fit(composition(sets["train"][0]), np.array(sets["train"][1], dtype=float))
    rho = spearmanr(ridge.predict(composition(sets["test"][0])), np.array(sets["test"][1], dtype=float)).statistic
    assert f"| helix_content_pdb | Spearman | none | {rho:.3f} |" in readme


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.name)
def test_golden_values_have_sources(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "source" in path.read_text(encoding="utf-8")
    assert values


def test_golden_rows_have_all_columns() -> None:
    for table in yaml.safe_load((GOLDEN / "published.yaml").read_text())["flip"]:
        for row in table.get("rows", ()):
            assert set(table["columns"]) <= set(row)


def test_golden_slices_match_their_inputs() -> None:
    for entry in yaml.safe_load((GOLDEN / "esm2_t6_8M.yaml").read_text())["golden"]:
        assert entry["shape"][:2] == [len(entry["input_ids"]), len(entry["input_ids"][0])]
        assert [len(row) for row in entry["values"]] == [3, 3, 3]
