"""`esm2kit split` of pairs: neither protein of a held-out pair resembles one of train, and the result is read back."""

import csv
import json
import random

import numpy as np
import pytest
from support.errors import refused
from support.families import LETTERS, measure_identity

from esm2kit import SplitConfig, split_proteins
from esm2kit.sequences import similarity
from esm2kit.tasks.data import load_labels
from esm2kit.tasks.pairs import assign_pair_sets


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Write 300 pairs of 60 proteins in 20 families: a table with sequences, one with names, and their FASTA."""
    monkeypatch.setattr(similarity.shutil, "which", lambda name: None)  # groups by k-mers take milliseconds
    generator = random.Random(0)
    proteins = {}
    for family in range(20):
        ancestor = "".join(generator.choice(LETTERS) for _ in range(60))
        for member in range(3):
            letters = [generator.choice(LETTERS) if generator.random() < 0.1 else letter for letter in ancestor]
            proteins[f"p{family}_{member}"] = "".join(letters)
    chosen = [(*generator.sample(list(proteins), 2), str(generator.randrange(2))) for _ in range(300)]
    rows = [f"{a},{b},{proteins[a]},{proteins[b]},{target}" for a, b, target in chosen]
    (tmp_path / "full.csv").write_text("\n".join(["protein_a,protein_b,seq_a,seq_b,label", *rows]) + "\n")
    rows = [f"{a},{b},{target}" for a, b, target in chosen]
    (tmp_path / "names.csv").write_text("\n".join(["protein1,protein2,label", *rows]) + "\n")
    (tmp_path / "my.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins.items()))
    records = [f">{a} INTERACTOR={b} TARGET={target} SET=train\n{proteins[a]}\n" for a, b, target in chosen]
    second = [f">{name}\n{sequence}\n" for name, sequence in proteins.items()]
    (tmp_path / "pairs.fasta").write_text("".join([*records, *second]))
    return tmp_path, proteins, chosen


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def name_set(row):
    return "validation" if row["validation"] else row["set"]


def test_no_protein_of_a_held_out_pair_resembles_one_of_another_set(pairs):
    folder, proteins, chosen = pairs
    made = split_proteins(SplitConfig(labels=folder / "full.csv", out_dir=folder / "out"))
    rows = read_rows(made.table)
    assert list(rows[0]) == ["protein_a", "protein_b", "seq_a", "seq_b", "label", "set", "validation"]
    sets_of = {}
    for row in rows:
        for name in ("protein_a", "protein_b"):
            sets_of.setdefault(row[name], set()).add(name_set(row))
    assert all(len(found) == 1 for found in sets_of.values())
    for one, first in sets_of.items():
        for other, second in sets_of.items():
            if first != second:
                equal, columns, covered = measure_identity(proteins[one], proteins[other])
                assert not (equal >= 0.5 * max(columns, 1) and covered >= 0.8 * 60), (one, other)
    # the sets are those of benchmark --split_by identity, and a pair is kept where both proteins have one
    texts = [[proteins[pair[place]] for pair in chosen] for place in (0, 1)]
    expected = assign_pair_sets(*texts, np.zeros(len(chosen)), "identity", 0.5, 0).sets.tolist()
    kept = [(*pair, name) for pair, name in zip(chosen, expected, strict=True) if name]
    assert [(row["protein_a"], row["protein_b"], row["label"], name_set(row)) for row in rows] == kept
    counts = {name: expected.count(name) for name in ("train", "validation", "test")}
    assert min(counts.values()) > 0
    report = json.loads(made.report.read_text())
    assert report["pairs"] == counts | {"left_out": 300 - len(kept)}
    text = f"{len(kept)} of 300 pairs have both proteins in one set (train {counts['train']}, validation "
    assert text in made.verdict
    assert made.verdict.startswith(f"Train has {made.sizes['train']} proteins, validation ")
    assert sum(made.sizes.values()) == 60
    task = load_labels(made.table, target_type="class")
    assert task.pairs is not None
    assert task.sets.tolist() == [pair[-1] for pair in kept]


def test_the_three_forms_of_pairs_have_the_same_sets(pairs):
    folder, proteins, _ = pairs
    tables = []
    for number, options in enumerate(
        ({"labels": "full.csv"}, {"labels": "names.csv", "fasta": "my.fasta"}, {"fasta": "pairs.fasta"})
    ):
        config = SplitConfig(out_dir=folder / str(number), **{key: folder / name for key, name in options.items()})
        tables.append(read_rows(split_proteins(config).table))
    full, named, fasta = tables
    assert [(row["label"], name_set(row)) for row in full] == [(row["label"], name_set(row)) for row in named]
    assert [(row["label"], name_set(row)) for row in full] == [(row["target"], name_set(row)) for row in fasta]
    for row, other in zip(named, fasta, strict=True):
        assert (row["sequence_a"], row["sequence_b"]) == (proteins[row["protein1"]], proteins[row["protein2"]])
        assert (other["id_a"], other["id_b"]) == (row["protein1"], row["protein2"])
        assert (other["sequence_a"], other["sequence_b"]) == (row["sequence_a"], row["sequence_b"])


def test_what_does_not_fit_pairs_is_refused(pairs):
    folder, _, _ = pairs
    full = folder / "full.csv"
    with refused("split.pairs-folds", folds=5):
        split_proteins(SplitConfig(labels=full, folds=5, out_dir=folder / "out"))
    with refused("split.pairs-check", path=full):
        split_proteins(SplitConfig(check=full, out_dir=folder / "out"))
    with refused("split.pairs-target", target="label"):
        split_proteins(SplitConfig(labels=full, target="label", out_dir=folder / "out"))
    (folder / "few.csv").write_text("\n".join(full.read_text().splitlines()[:12]) + "\n")
    with refused("split.pairs-empty"):
        split_proteins(SplitConfig(labels=folder / "few.csv", out_dir=folder / "out"))
