"""`esm2kit split`: sets without similar pairs across them, the table as it was, and the leakage report."""

import csv
import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from support.errors import refused
from support.families import draw_relatives, draw_sequence, measure_identity, mutate
from support.finetune_fixtures import write_tiny_model

from esm2kit import SplitConfig, split_proteins
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.core.checksums import read_sealed_manifest
from esm2kit.sequences import similarity
from esm2kit.sequences.alignment import Criterion, are_similar
from esm2kit.splitting.leakage import find_nearest, summarise_nearest
from esm2kit.splitting.split import _describe_sizes
from esm2kit.tasks.data import load_pooled_labels
from esm2kit.tasks.grouping import find_shared_groups, plan_folds


@pytest.fixture(autouse=True)
def compare_kmers(monkeypatch):
    """Group by k-mers, which takes milliseconds, also where MMseqs2 is installed."""
    monkeypatch.setattr(similarity.shutil, "which", lambda name: None)


def draw_proteins(seed=0, families=30):
    """Sequences of families, a value per protein that is similar within a family, and a class per family."""
    generator = random.Random(seed)
    rows = []
    for _ in range(families):
        mean, kind = generator.gauss(50, 8), generator.choice(["membrane", "cytoplasm", "cytoplasm"])
        for sequence in draw_relatives(generator, generator.randint(1, 4), (60, 90)):
            rows.append((sequence, round(mean + generator.gauss(0, 2), 1), kind))
    return rows


@pytest.fixture
def inputs(tmp_path):
    rows = draw_proteins()
    fasta = "".join(f">p{number} a protein\n{row[0]}\n" for number, row in enumerate(rows))
    (tmp_path / "my.fasta").write_text(fasta)
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["Protein", "Tm (C)", "place", "set"])
        table.writerows([f"p{number}", value, kind, "old"] for number, (_, value, kind) in enumerate(rows))
    return tmp_path, rows


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find_leaks(rows, sets, identity=0.5):
    """Pairs of different sets with the identity or more over 80% of the shorter sequence, by aligning all of them."""
    leaks = []
    for one, other in combinations(range(len(rows)), 2):
        if sets[one] != sets[other]:
            equal, columns, covered = measure_identity(rows[one][0], rows[other][0])
            if equal >= identity * max(columns, 1) and covered >= 0.8 * min(len(rows[one][0]), len(rows[other][0])) > 0:
                leaks.append((one, other))
    return leaks


def test_the_table_is_as_it_was_and_no_similar_pair_is_in_different_sets(inputs, caplog):
    caplog.set_level("INFO")
    folder, rows = inputs
    made = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "out"))
    table = read_rows(made.table)
    assert list(table[0]) == ["id", "sequence", "Tm (C)", "place", "previous_set", "set", "validation"]
    assert [row["id"] for row in table] == [f"p{number}" for number in range(len(rows))]
    for row, (sequence, value, kind) in zip(table, rows, strict=True):
        assert (row["sequence"], float(row["Tm (C)"]), row["place"]) == (sequence, value, kind)
        assert (row["set"], row["validation"]) in [("train", ""), ("train", "True"), ("test", "")]
    sets = ["validation" if row["validation"] else row["set"] for row in table]
    assert made.sizes == {name: sets.count(name) for name in ("train", "validation", "test")}
    assert abs(made.sizes["test"] - 0.1 * len(rows)) <= 4
    assert not find_leaks(rows, sets)
    assert made.similar == 0
    assert made.highest_identity < 0.5
    assert "groups of at least 50% identity by shared 4-mers and alignments of" in caplog.text
    assert "not divided by labels" not in caplog.text
    assert made.verdict.endswith("% have one.")
    train, validation, test = made.sizes.values()
    assert made.verdict.startswith(f"Train has {train} proteins, validation {validation} and test {test}: no held-out ")
    page = made.page.read_text(encoding="utf-8")
    for text in (made.verdict, "by shared 4-mers", "All pairs of proteins of different sets were compared", "Tm (C)"):
        assert text in page
    report = json.loads(made.report.read_text())
    assert report["tool"] == "k-mers"
    assert [each["labelled"] for each in report["labels"]] == list(made.sizes.values())
    shuffled = np.random.default_rng(0).permutation(sets)
    assert len(find_leaks(rows, shuffled)) > 10, "the counter-example: a random split of the same sizes"


def test_the_page_of_unrelated_proteins_lists_no_pairs(tmp_path, caplog):
    caplog.set_level("INFO")
    generator = random.Random(0)
    fasta = "".join(f">{letter}\n{letter * 40 + draw_sequence(generator, 4)}\n" for letter in "ACDEFGHIKL")
    (tmp_path / "my.fasta").write_text(fasta)
    made = split_proteins(SplitConfig(tmp_path / "my.fasta", out_dir=tmp_path / "out"))
    page = made.page.read_text(encoding="utf-8")
    assert "No held-out protein has a training protein that is similar beyond chance." in page
    assert "held-out proteins closest" not in page
    assert "not divided by labels: no labels" in caplog.text


def test_a_folder_with_a_file_per_set_is_checked_and_divided(inputs):
    folder, rows = inputs
    names = ["train", "valid", "test"]
    theirs = folder / "theirs"
    theirs.mkdir()
    for place, name in enumerate(names):
        lines = [f"{sequence},{value}" for sequence, value, _ in rows[place::3]]
        (theirs / f"{name}.csv").write_text("\n".join(["seq,label", *lines]) + "\n")
    checked = split_proteins(SplitConfig(check=theirs, out_dir=folder / "checked"))
    assert checked.sizes == {name: len(rows[place::3]) for place, name in enumerate(["train", "validation", "test"])}
    assert checked.similar > 0
    again = split_proteins(SplitConfig(labels=theirs, out_dir=folder / "again"))
    assert (sum(again.sizes.values()), again.similar) == (len(rows), 0)
    (theirs / "test.csv").write_text("seq,label\nMKVLAAGG,1\n")
    with refused("split.file-exists"):  # the files of the folder are inputs
        split_proteins(SplitConfig(check=theirs, out_dir=folder / "checked"))
    (theirs / "test.csv").unlink()
    for option in ("check", "labels"):
        with refused("table.absent"):
            split_proteins(SplitConfig(**{option: theirs}, out_dir=folder / "other"))


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does(inputs):
    folder, rows = inputs

    def divide(order, name, **options):
        lines = "".join(f">p{number}\n{rows[number][0]}\n" for number in order)
        (folder / f"{name}.fasta").write_text(lines)
        config = SplitConfig(folder / f"{name}.fasta", folder / "labels.csv", folder / name, **options)
        return {row["id"]: (row["set"], row["validation"]) for row in read_rows(split_proteins(config).table)}

    order = list(range(len(rows)))
    first = divide(order, "a")
    assert divide(random.Random(0).sample(order, len(order)), "b") == first
    assert divide(order, "c", seed=1) != first


def test_labels_are_divided_evenly(tmp_path):
    """200 unrelated proteins: each set has its share of each class."""
    generator = random.Random(0)
    kinds = ["a"] * 120 + ["b"] * 60 + ["c"] * 20
    lines = "".join(f">p{i} TARGET={kind}\n{draw_sequence(generator, 40)}\n" for i, kind in enumerate(kinds))
    (tmp_path / "my.fasta").write_text(lines)
    made = split_proteins(SplitConfig(tmp_path / "my.fasta", out_dir=tmp_path / "out"))
    found = {each["name"]: each["classes"] for each in json.loads(made.report.read_text())["labels"]}
    assert made.sizes == {"train": 160, "validation": 20, "test": 20}
    for name, size in made.sizes.items():
        for kind, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(found[name][kind] - share * size) <= 1
    table = read_rows(made.table)
    assert [row["target"] for row in table] == kinds


def test_a_table_with_sequences_in_the_notation_of_a_spreadsheet(tmp_path):
    """Semicolons, decimal commas, a row without a sequence, and names that are repeated."""
    generator = random.Random(0)
    texts = [draw_sequence(generator, 40) for _ in range(40)]
    rows = [f"p{i % 30};{i},5;{text if i != 7 else ''}" for i, text in enumerate(texts)]
    (tmp_path / "my.csv").write_text("name;Tm (C);protein sequence\n" + "\n".join(rows) + "\n")
    made = split_proteins(SplitConfig(tmp_path / "my.csv", out_dir=tmp_path / "out"))
    table = read_rows(made.table)
    assert [row["sequence"] for row in table] == [text for i, text in enumerate(texts) if i != 7]
    assert [row["Tm (C)"] for row in table] == [f"{i}.5" for i in range(40) if i != 7]
    assert [row["id"] for row in table] == [f"p{i % 30}" for i in range(40) if i != 7]
    assert "Left out without a sequence: 1 row." in " ".join(json.loads(made.report.read_text())["notes"])


def test_fractions_and_two_sets(inputs):
    folder, rows = inputs
    made = split_proteins(SplitConfig(folder / "my.fasta", out_dir=folder / "out", fractions="0.5,0.5"))
    assert list(made.sizes) == ["train", "test"]
    assert abs(made.sizes["test"] - len(rows) / 2) <= 4
    for wrong in ("0.8,0.1", "80,10,10", "0,0.5,0.5", "a", "", "0.5,0.5,0,0", "1,0,0", "1.1,-0.1"):
        with refused("split.fractions", found=wrong):
            SplitConfig(folder / "my.fasta", fractions=wrong)


def test_folds_have_no_similar_pairs(inputs):
    folder, rows = inputs
    made = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "out", folds=4))
    table = read_rows(made.table)
    assert list(table[0])[-1] == "fold"
    folds = [row["fold"] for row in table]
    assert sorted(made.sizes) == ["1", "2", "3", "4"]
    assert max(made.sizes.values()) - min(made.sizes.values()) <= 4
    first, second, third, fourth = made.sizes.values()
    sizes = f"Fold 1 has {first} proteins, fold 2 {second}, fold 3 {third} and fold 4 {fourth}: no held-out protein of "
    assert made.verdict.startswith(sizes)
    assert not find_leaks(rows, folds)
    assert find_leaks(rows, np.random.default_rng(0).permutation(folds))


def test_many_folds_are_described_by_their_smallest_and_largest():
    def describe(sizes):
        sets = [{"name": str(number), "proteins": size} for number, size in enumerate(sizes, 1)]
        return _describe_sizes({"is_folds": True, "sets": sets})

    assert describe([1200, 1]) == "Fold 1 has 1,200 proteins and fold 2 1"
    assert describe([20, 15, 16, 17, 18, 19]) == "Each of 6 folds has 15 to 20 proteins"
    assert describe([7] * 10) == "Each of 10 folds has 7 proteins"


def test_proteins_that_are_all_similar_are_refused_unless_the_split_is_random(tmp_path):
    generator = random.Random(0)
    wild_type = draw_sequence(generator, 60)
    variants = sorted({mutate(generator, wild_type, 0.95) for _ in range(60)})
    (tmp_path / "my.fasta").write_text("".join(f">v{i}\n{text}\n" for i, text in enumerate(variants)))
    with refused("split.identity", identity=0.5):
        split_proteins(SplitConfig(tmp_path / "my.fasta", out_dir=tmp_path / "out"))
    with refused("folds.too-few-groups", folds=3, groups=1):
        split_proteins(SplitConfig(tmp_path / "my.fasta", out_dir=tmp_path / "out", folds=3))
    made = split_proteins(SplitConfig(tmp_path / "my.fasta", out_dir=tmp_path / "out", method="random"))
    assert made.sizes["test"] == round(len(variants) / 10)
    assert made.similar == len(variants) - made.sizes["train"]
    report = json.loads(made.report.read_text())
    assert report["compared"] is None
    assert report["method"] == "random, equal sequences in one set"


def test_the_report_says_what_a_split_of_someone_else_leaks(tmp_path):
    """Ten test proteins: three equal a training protein, two are relatives of one, five are unrelated."""
    generator = random.Random(0)
    train = [draw_sequence(generator, 80) for _ in range(20)]
    relatives = [mutate(generator, sequence, 0.8) for sequence in train[3:5]]
    test = [*train[:3], *relatives, *(draw_sequence(generator, 80) for _ in range(5))]
    names = [f"train{number}" for number in range(20)] + [f"test{number}" for number in range(10)]
    for kind, write in (("fasta", write_flip), ("csv", write_table)):
        path = tmp_path / f"theirs.{kind}"
        write(path, names, [*train, *test])
        before = path.read_bytes()
        made = split_proteins(SplitConfig(check=path, out_dir=tmp_path / kind))
        assert path.read_bytes() == before
        assert made.table is None
        assert not (tmp_path / kind / "split.csv").exists()
        assert made.sizes == {"train": 20, "test": 10}
        assert made.similar == 5
        assert made.highest_identity == 1
        report = read_sealed_manifest(made.report, "")
        assert report["nearest_summary"]["split"]["full_identity"] == 3
        assert report["nearest_summary"]["split"]["without_nearest"] == 5
        assert report["duplicates"] == {"sequences": 3, "proteins": 6, "in_several_sets": 3}
        assert report["groups"]["in_several_sets"] == 5
        nearest = {each["id"]: each for each in report["nearest"]}
        for number, relative in enumerate(relatives, 3):
            found = nearest[f"test{number}"]
            equal, columns, covered = measure_identity(train[number], relative)
            assert found["nearest"] == f"train{number}"
            # of equal lengths the alignment without gaps counts too
            same = sum(one == other for one, other in zip(train[number], relative, strict=True)) / 80
            assert found["identity"] == pytest.approx(max(same, equal / columns))
            assert covered >= 64
        assert "50% of the held-out proteins have a training protein" in made.page.read_text()


def write_flip(path, names, sequences):
    lines = [
        f">{name} TARGET=1.5 SET={name[:-1].rstrip('01')}\n{text}\n"
        for name, text in zip(names, sequences, strict=True)
    ]
    path.write_text("".join(lines))


def write_table(path, names, sequences):
    rows = [f"{name};{text};{name[:-1].rstrip('01')};1,5" for name, text in zip(names, sequences, strict=True)]
    path.write_text("name;sequence;set;y\n" + "\n".join(rows) + "\n")


def write_plain(path, rows):
    """Write proteins with a value and no sets."""
    lines = [f"p{number},{sequence},{value}" for number, (sequence, value, _) in enumerate(rows)]
    path.write_text("\n".join(["id,sequence,Tm", *lines]) + "\n")


def test_check_of_folds_and_of_a_table_with_a_fasta(inputs):
    folder, _ = inputs
    made = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "out", folds=3))
    again = split_proteins(SplitConfig(check=made.table, out_dir=folder / "again"))
    assert again.sizes == made.sizes
    assert again.similar == 0
    numbers = [row["fold"] for row in read_rows(made.table)]
    lines = [f"p{number},{fold}" for number, fold in enumerate(numbers)]
    (folder / "folds.csv").write_text("\n".join(["id,cv", *lines]) + "\n")
    apart = split_proteins(
        SplitConfig(folder / "my.fasta", check=folder / "folds.csv", set="cv", out_dir=folder / "apart")
    )
    assert apart.sizes == made.sizes
    with refused("split.no-sets", columns=("id", "cv")):
        split_proteins(SplitConfig(folder / "my.fasta", check=folder / "folds.csv", out_dir=folder / "no"))


def test_the_nearest_protein_of_equal_length_may_be_shifted():
    generator = random.Random(1)
    first = draw_sequence(generator, 120)
    second = first[:48] + first[51:] + draw_sequence(generator, 3)  # a deletion, and three residues more at the end
    equal, columns, _ = measure_identity(first, second)
    assert sum(one == other for one, other in zip(first, second, strict=True)) / 120 < 0.5 < equal / columns
    assert are_similar(first, second, Criterion(0.5, 0.8, 2))
    found = find_nearest([first, second], np.array(["train", "test"]), 0.8, 10, 0, "compared")
    assert found.identity_N.tolist() == pytest.approx([equal / columns])
    assert summarise_nearest(found, 0.5)["similar"] == 1


def test_nearest_proteins_are_those_of_all_alignments():
    rows = draw_proteins(3, 20)
    sequences = [row[0] for row in rows]
    sets = np.array(["train", "train", "test"] * len(rows))[: len(rows)]
    found = find_nearest(sequences, sets, 0.8, 1000, 0, "compared")
    assert found.row_N.tolist() == np.flatnonzero(sets == "test").tolist()
    train = np.flatnonzero(sets == "train").tolist()
    for row, identity in zip(found.row_N.tolist(), found.identity_N.tolist(), strict=True):
        best = 0.0
        for other in train:
            equal, columns, covered = measure_identity(sequences[row], sequences[other])
            if covered >= 0.8 * min(len(sequences[row]), len(sequences[other])):
                best = max(best, equal / columns)
        if best > 0.5:  # lower ones may be by chance
            assert identity == pytest.approx(best, abs=0.08)
    few = find_nearest(sequences, sets, 0.8, 4, 0, "compared")
    assert len(few.row_N) == 4
    assert {*few.row_N.tolist()} < {*found.row_N.tolist()}
    summary = summarise_nearest(found, 0.5)
    assert sum(summary["histogram"]) == summary["held_out"] == len(found.row_N)
    assert summary["similar"] == sum(identity >= 0.5 for identity in found.identity_N)


def test_files_are_sealed_reused_and_not_replaced_by_others(inputs, capsys):
    folder, _ = inputs
    command = ["split", f"{folder}/my.fasta", "--labels", f"{folder}/labels.csv", "--out_dir", f"{folder}/out"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in result["files"]} == {"split.csv", "leakage.html", "leakage.json"}
    written = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.*")}
    assert main(command) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.*")} == written
    assert json.loads(capsys.readouterr().out) == result
    with refused("split.file-exists"):
        split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "out", seed=1))
    assert main([*command, "--seed", "1", "--restart", "true"]) == 0
    assert check(CheckConfig(folder / "out")).endswith("agree with their checksums")
    with open(folder / "out" / "split.csv", "a", encoding="utf-8") as file:
        file.write("p,MKV,1,a,train,\n")
    with refused("check.damaged"):
        check(CheckConfig(folder / "out"))


def test_a_finished_split_is_found_from_another_folder_and_with_other_blanks(inputs, monkeypatch):
    folder, _ = inputs
    first = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "out"))
    written = first.report.stat().st_mtime_ns
    monkeypatch.chdir(folder)
    again = SplitConfig(Path("my.fasta"), Path("labels.csv"), folder / "out", fractions="0.80, 0.1, 0.1")
    assert split_proteins(again) == first
    assert first.report.stat().st_mtime_ns == written


def test_a_table_can_be_divided_repeatedly(tmp_path):
    """The sets of each earlier division are kept, and a name that two columns have is refused."""
    table, divisions = tmp_path / "first.csv", []
    write_plain(table, draw_proteins()[:30])
    for number in range(3):
        found = split_proteins(SplitConfig(labels=table, out_dir=tmp_path / str(number), method="random", seed=number))
        table = found.table
        divisions.append([row["set"] for row in read_rows(table)])
    rows = read_rows(table)
    earlier = ("previous_previous_set", "previous_set", "set")
    assert [[row[name] for row in rows] for name in earlier] == divisions
    assert divisions[0] != divisions[1] != divisions[2]
    table.write_text(table.read_text().replace("previous_previous_set", "note").replace("previous_set", "note"))
    with refused("table.repeated-column", column="note"):
        split_proteins(SplitConfig(labels=table, out_dir=tmp_path / "3", method="random"))


def test_small_sets_are_explained_by_their_least_size(tmp_path):
    """20 proteins: 10% are 2, and a set gets a fifth of the proteins; similar proteins have no part in it."""
    table = tmp_path / "a.csv"
    write_plain(table, draw_proteins(1)[:20])
    found = split_proteins(SplitConfig(labels=table, out_dir=tmp_path, method="random"))
    report = json.loads(found.report.read_text())
    assert found.sizes == {"train": 12, "validation": 4, "test": 4}
    assert report["warnings"] == []
    assert "Each set gets at least 5 proteins, or a fifth of fewer than 25." in report["notes"]
    large = split_proteins(
        SplitConfig(labels=table, out_dir=tmp_path, method="random", fractions="0.6,0.4", restart=True)
    )
    assert not any("Each set gets" in note for note in json.loads(large.report.read_text())["notes"])


def test_wrong_inputs_are_refused_in_one_line(inputs):
    folder, _ = inputs
    fasta = folder / "my.fasta"
    with refused("split.no-input"):
        SplitConfig()
    with refused("split.check-and-labels"):
        SplitConfig(check=fasta, labels=folder / "labels.csv")
    with refused("split.set-without-check", set="cv"):
        SplitConfig(fasta, set="cv")
    with refused("split.folds-and-fractions", folds=3):
        SplitConfig(fasta, folds=3, fractions="0.9,0.1")
    with refused("option.range", name="identity", found=0.2):
        SplitConfig(fasta, identity=0.2)
    with refused("split.absent", name="labels"):
        SplitConfig(fasta, folder / "no.csv").check_inputs()
    with refused("table.no-column", column="nosuch"):
        split_proteins(SplitConfig(fasta, folder / "labels.csv", folder / "out", target="nosuch"))
    with refused("split.target", column="previous_set"):
        split_proteins(SplitConfig(fasta, folder / "labels.csv", folder / "out", target="previous_set"))
    (folder / "one.csv").write_text("sequence,set\n" + "MKVLAGSTREWWHQPNDFMKVL,train\n" * 3)
    with refused("split.one-set"):
        split_proteins(SplitConfig(check=folder / "one.csv", out_dir=folder / "out"))


def test_labels_of_residues_are_copied_and_not_read_as_numbers(tmp_path):
    """FLIP's binding residues: a digit per residue in a split, and the sequences in another file."""
    generator = random.Random(0)
    sequences = [draw_sequence(generator, generator.choice([40, 400])) for _ in range(30)]
    labels = ["".join(generator.choices("0123", k=len(sequence))) for sequence in sequences]
    (tmp_path / "sequences.fasta").write_text("".join(f">b{i}\n{text}\n" for i, text in enumerate(sequences)))
    sets = ["train", "test", "train"] * 10
    lines = [f">b{i} SET={sets[i]} VALIDATION={i % 6 == 0}\n{text}\n" for i, text in enumerate(labels)]
    (tmp_path / "binding.fasta").write_text("".join(lines))
    made = split_proteins(SplitConfig(check=tmp_path / "binding.fasta", out_dir=tmp_path / "out"))
    assert made.sizes == {"train": 15, "validation": 5, "test": 10}
    assert json.loads(made.report.read_text())["labels"] == []


def test_a_limited_comparison_is_said(inputs, monkeypatch):
    folder, _ = inputs
    monkeypatch.setattr("esm2kit.splitting.split.MAX_CELLS", 0)
    made = split_proteins(SplitConfig(folder / "my.fasta", out_dir=folder / "out"))
    report = json.loads(made.report.read_text())
    assert not report["compared"]["complete"]
    assert "were aligned, first those that share most 4-mers" in " ".join(report["notes"])


def test_from_a_split_to_a_benchmark(inputs):
    """The table is read as it is: by its sets, and by its folds, of which none shares a group with another."""
    folder, _ = inputs
    write_tiny_model(folder / "m.safetensors")
    few = ["--model", f"{folder}/m.safetensors", "--target", "Tm (C)", "--seeds", "0", "--resamples", "100"]
    few += ["--untrained", "false", "--baselines", '["mean"]']
    made = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "sets"))
    assert main(["benchmark", "--labels", str(made.table), "--out_dir", f"{folder}/report", *few]) == 0
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["task"]["sizes"] == made.sizes
    made = split_proteins(SplitConfig(folder / "my.fasta", folder / "labels.csv", folder / "folds", folds=3))
    data = load_pooled_labels(made.table, target="Tm (C)", others=["fold"])
    plan = plan_folds(data, "fold", source=made.table)
    assert {name: int((plan.fold_RP[0] == number).sum()) for number, name in enumerate(plan.names)} == made.sizes
    assert not find_shared_groups(plan.group_P, plan.fold_RP[0]).size
    assert not plan.notes
    out = f"{folder}/folds_report"
    assert main(["benchmark", "--labels", str(made.table), "--folds", "fold", "--out_dir", out, *few]) == 0
    assert json.loads((folder / "folds_report" / "report.json").read_text())["task"]["split"] == "fold"
