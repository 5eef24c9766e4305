"""Pairs of proteins: how files are read, splits without relatives, symmetric features, and predictions of new pairs."""

import csv
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.baselines.fit import fit_baseline, list_baselines
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import check_report, write_comparison
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.pair_features import combine_vectors
from esm2kit.benchmarking.report import Report
from esm2kit.finetuning.config import FinetuneConfig, PredictConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.finetuning.predict import predict
from esm2kit.sequences.similarity import group_by_identity
from esm2kit.tasks.data import load_labels, load_task
from esm2kit.tasks.metrics import build_class_scorer, sample_counts, score_seeds
from esm2kit.tasks.pair_files import find_pair_columns
from esm2kit.tasks.pairs import build_keys, count_shared, sample_pair_counts

SETS = ("train", "train", "train", "val", "test")


def draw_proteins(count=40, seed=0):
    """Proteins of two kinds, told apart by their last residues; a pair interacts if the kinds are equal."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, 2, count)
    starts = ["".join(generator.choice(list("ACDEFGHIKMNPQRSTVY"), 30)) for _ in range(count)]
    return {
        f"P{i}": (f"{start}{'LW'[kind] * 15}", int(kind))
        for i, (start, kind) in enumerate(zip(starts, kinds, strict=True))
    }


def draw_pairs(proteins, count=250, seed=0):
    generator = np.random.default_rng(seed)
    names = list(proteins)
    chosen = [generator.choice(len(names), 2, replace=False) for _ in range(count)]
    return [(names[a], names[b], "yes" if proteins[names[a]][1] == proteins[names[b]][1] else "no") for a, b in chosen]


def write_sequences(path, proteins, pairs, header="sequence_a,sequence_b,target,set", swap=False):
    rows = []
    for number, (a, b, target) in enumerate(pairs):
        a, b = (b, a) if swap else (a, b)
        rows.append(f"{proteins[a][0]},{proteins[b][0]},{target},{SETS[number % 5]}")
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def write_names(path, pairs, header="protein1,protein2,interacts"):
    path.write_text("\n".join([header, *(",".join(pair) for pair in pairs)]) + "\n")
    return path


def write_fasta(path, proteins):
    path.write_text("".join(f">{name}\n{sequence}\n" for name, (sequence, _) in proteins.items()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_tiny_model(folder / "tiny.safetensors")
    proteins = draw_proteins()
    pairs = draw_pairs(proteins)
    write_sequences(folder / "pairs.csv", proteins, pairs)
    write_names(folder / "names.csv", pairs)
    write_fasta(folder / "my.fasta", proteins)
    return folder


def run(folder, name, **options):
    config = {"model": str(folder / "tiny.safetensors"), "seeds": [0], "resamples": 100, "untrained": False}
    config |= {"device": "cpu", "out_dir": folder / name}
    return benchmark(BenchmarkConfig(**config | options))


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(
    ("columns", "sequences", "ids"),
    [
        (["sequence_a", "sequence_b", "y"], (0, 1), None),
        (["Seq1", "y", "Seq2"], (0, 2), None),
        (["protein1", "protein2"], None, (0, 1)),
        (["Uniprot ID A", "Uniprot ID B", "protein_sequence_1", "protein_sequence_2"], (2, 3), (0, 1)),
        (["interactor_b", "interactor_a"], None, (1, 0)),
        (["id", "sequence", "target"], None, None),
        (["a", "b"], None, None),
        (["seq1", "protein2"], None, None),
        (["sequence", "protein1", "protein2"], None, None),
        (["replicate 1", "replicate 2"], None, None),
    ],
)
def test_the_columns_of_a_pair(columns, sequences, ids):
    found = find_pair_columns(columns)
    assert found == ((sequences, ids) if sequences or ids else None)


def test_three_forms_of_pairs_are_the_same_task(folder, tmp_path):
    proteins = draw_proteins()
    pairs = draw_pairs(proteins)
    table = load_task(str(folder / "pairs.csv"))
    lines = [
        f">{a} INTERACTOR={b} TARGET={target} SET={SETS[number % 5]} SEQINTERACTOR={proteins[b][0]}\n{proteins[a][0]}\n"
        for number, (a, b, target) in enumerate(pairs)
    ]
    (tmp_path / "own.fasta").write_text("".join(lines))
    fasta = load_task(str(tmp_path / "own.fasta"))
    write_fasta(tmp_path / "my.fasta", proteins)
    named = write_names(tmp_path / "named.csv", pairs, "protein1,protein2,interacts,set")
    text = named.read_text().splitlines()
    named.write_text("\n".join([text[0], *(f"{line},{SETS[i % 5]}" for i, line in enumerate(text[1:]))]) + "\n")
    joined = load_labels(named, tmp_path / "my.fasta")
    for data in (table, fasta, joined):
        assert data.sequences == [proteins[a][0] for a, _, _ in pairs]
        assert data.pairs.second == [proteins[b][0] for _, b, _ in pairs]
        assert [data.task.labels[target] for target in data.targets] == [target for _, _, target in pairs]
        assert data.sets.tolist() == table.sets.tolist()
    assert (fasta.pairs.first_ids, fasta.pairs.second_ids) == (joined.pairs.first_ids, joined.pairs.second_ids)


def test_the_second_protein_of_a_fasta_may_be_a_record_of_its_own(tmp_path):
    lines = [f">p{i} INTERACTOR=q{i % 3} TARGET={i}.5 SET={SETS[i % 5]}\nMKV{'ACDEF'[i % 5]}L\n" for i in range(20)]
    lines += [f">q{i}\nMKKK{'ACD'[i]}\n" for i in range(3)]
    (tmp_path / "own.fasta").write_text("".join(lines))
    data = load_task(str(tmp_path / "own.fasta"))
    assert data.pairs.second[:4] == ["MKKKA", "MKKKC", "MKKKD", "MKKKA"]
    assert data.task.target == "value"
    (tmp_path / "own.fasta").write_text("".join(lines[:-1]))
    with refused("pairs.no-sequence", record="p2", found="q2"):
        load_task(str(tmp_path / "own.fasta"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_identity_split_has_no_relative_of_train_in_a_test_pair(tmp_path, seed):
    """C3 of Park and Marcotte: neither protein of a test pair resembles one of train, or of validation."""
    generator = np.random.default_rng(seed)
    letters_of = list("ACDEFGHIKLMNPQRSTVWY")
    proteins = {f"P{i}": ("".join(generator.choice(letters_of, 60)), i % 2) for i in range(24)}
    for name in list(proteins):  # a relative of each, with 6 of 60 residues changed
        letters = list(proteins[name][0])
        for place in generator.choice(60, 6, replace=False):
            letters[place] = "G" if letters[place] != "G" else "A"
        proteins[f"{name}r"] = ("".join(letters), proteins[name][1])
    pairs = draw_pairs(proteins, 600, seed)
    labels = write_names(tmp_path / "names.csv", pairs)
    data = load_labels(labels, write_fasta(tmp_path / "my.fasta", proteins), split_by="identity", split_seed=seed)
    assert set(data.sets) == {"train", "validation", "test"}
    assert len(data.ids) < 600
    assert (count_shared(data.pairs, data.sets)[data.sets == "test"] == 0).all()
    unique = sorted({*data.sequences, *data.pairs.second})
    number_of = dict(zip(unique, group_by_identity(unique, 0.5).numbers.tolist(), strict=True))
    groups = {
        name: {
            number_of[sequence] for row in data.rows(name) for sequence in (data.sequences[row], data.pairs.second[row])
        }
        for name in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(groups.values(), 2):
        assert not one & other
    assert any("pairs of proteins in different sets left out" in note for note in data.notes)
    random = load_labels(labels, tmp_path / "my.fasta", split_by="random", split_seed=seed)
    assert count_shared(random.pairs, random.sets)[random.sets == "test"].max() == 2
    keys = np.array(random.keys)
    assert not set(keys[random.sets == "train"]) & set(keys[random.sets == "test"])


def test_the_three_classes_of_test_pairs_are_counted(tmp_path):
    sequence = {name: f"MKV{name * 5}L" for name in "ACDEFGHI"}
    rows = [("A", "C", 1, "train"), ("D", "A", 0, "train"), ("C", "E", 1, "val"), ("A", "D", 1, "val")]
    rows += [("C", "A", 1, "test"), ("A", "F", 0, "test"), ("E", "C", 1, "test"), ("F", "G", 0, "test")]
    lines = [f"{sequence[a]},{sequence[b]},{target},{name}" for a, b, target, name in rows]
    (tmp_path / "own.csv").write_text("\n".join(["seq1,seq2,target,set", *lines]) + "\n")
    data = load_task(str(tmp_path / "own.csv"))
    assert count_shared(data.pairs, data.sets).tolist() == [2, 2, 1, 2, 2, 1, 1, 0]
    assert "test pairs by the number of their proteins that train has (equal sequences): 0: 1, 1: 2, 2: 1" in data.notes
    assert "2 test pairs also occur in train or validation, in either order" in data.notes
    assert "1 pair with different targets in different records" in data.notes  # A D in both orders
    assert build_keys(["A", "C"], ["C", "A"], ordered=False) == ["A/C", "A/C"]
    assert build_keys(["A", "C"], ["C", "A"], ordered=True) == ["A/C", "C/A"]


def test_symmetric_features_do_not_depend_on_the_order_bit_for_bit():
    first, second = torch.randn(2, 50, 7)
    assert torch.equal(combine_vectors(first, second, "symmetric"), combine_vectors(second, first, "symmetric"))
    assert combine_vectors(first, second, "symmetric").shape == (50, 21)
    concat = combine_vectors(first, second, "concat")
    assert torch.equal(concat[:, :7], first)
    assert torch.equal(concat[:, 7:], second)


@pytest.mark.parametrize("probe", ["logistic", "fnn"])
def test_interactions_are_found_that_counts_cannot_explain(folder, probe):
    report = run(folder, f"found-{probe}", task=str(folder / "pairs.csv"), probe=probe)
    rows = {row.name: row for row in report.rows}
    assert set(rows) > {"majority", "degree", "composition"}
    assert report.headline(report.first).value > 0.9
    assert report.headline(rows["degree"]).value < 0.75
    assert report.task.pair_features == "symmetric"
    assert sum(report.task.shared_test.values()) == report.task.sizes["test"] == 50
    assert report.first.by_shared["2"]["accuracy"].value > 0.9
    assert "Scores by proteins that train has" in report.html.read_text()
    assert Report.read(report.json).first.by_shared == report.first.by_shared
    assert check_report(report.json)


def test_a_pair_is_predicted_equally_in_both_orders(folder):
    run(folder, "orders", task=str(folder / "pairs.csv"), baselines=["composition"])
    proteins = draw_proteins(20, seed=7)
    pairs = [(a, b, "?") for a, b in itertools.combinations(proteins, 2)]
    write_sequences(folder / "new.csv", proteins, pairs, "seq1,seq2,note,set")
    write_sequences(folder / "swapped.csv", proteins, pairs, "seq1,seq2,note,set", swap=True)
    tables = []
    for name in ("new", "swapped"):
        found = predict(PredictConfig(folder / "orders", folder / f"{name}.csv", folder / f"{name}.tsv", device="cpu"))
        assert found["num_proteins"] == 190
        assert found["verdict"].startswith("Predicted 190 pairs: ")
        tables.append(read_rows(folder / f"{name}.tsv"))
    for one, other in zip(*tables, strict=True):
        assert (one["prediction"], one["p_yes"], one["p_no"]) == (other["prediction"], other["p_yes"], other["p_no"])
    right = sum(row["prediction"] == ("yes" if proteins[a][1] == proteins[b][1] else "no")
                for row, (a, b, _) in zip(tables[0], pairs, strict=True))  # fmt: skip
    assert right > 180
    named = [(f"new{i}", f"other{i}") for i in range(3)]
    (folder / "absent.csv").write_text("\n".join(["protein_a,protein_b", *map(",".join, named)]) + "\n")
    with refused("labels.no-match", found="new0"):
        predict(PredictConfig(folder / "orders", folder / "my.fasta", folder / "x.tsv", pairs=folder / "absent.csv"))
    with refused("predict.no-pairs"):
        predict(PredictConfig(folder / "orders", folder / "my.fasta", folder / "x.tsv", device="cpu"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pairs_are_read_from_a_pipe(folder, tmp_path):
    """The FASTA of a pipe is read once, and a table of pairs, which is read several times, is refused."""
    run(folder, "piped", task=str(folder / "pairs.csv"), baselines=[])
    proteins = draw_proteins()
    lines = [
        f">{a} INTERACTOR={b} SEQINTERACTOR={proteins[b][0]}\n{proteins[a][0]}\n" for a, b, _ in draw_pairs(proteins, 9)
    ]
    (tmp_path / "pairs.fasta").write_text("".join(lines))
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("".join(lines),), daemon=True).start()
    for name in ("pairs.fasta", "pipe"):
        predict(PredictConfig(folder / "piped", tmp_path / name, tmp_path / f"{name}.tsv", device="cpu"))
    assert read_rows(tmp_path / "pipe.tsv") == read_rows(tmp_path / "pairs.fasta.tsv")
    assert len(read_rows(tmp_path / "pipe.tsv")) == 9
    with refused("labels.pipe"):
        predict(PredictConfig(folder / "piped", folder / "my.fasta", tmp_path / "x.tsv", pairs=tmp_path / "pipe"))


def test_predictions_of_the_test_pairs_are_those_of_the_report(folder):
    report = run(folder, "same", task=str(folder / "pairs.csv"), baselines=[])
    data = load_task(str(folder / "pairs.csv"))
    predict(PredictConfig(folder / "same", folder / "pairs.csv", folder / "same.tsv", device="cpu"))
    with np.load(report.json.parent / "predictions.npz") as stored:
        predicted = stored[f"predicted/{report.first.name}"][0]
    rows, test = read_rows(folder / "same.tsv"), data.rows("test")
    assert [rows[row]["prediction"] for row in test] == [data.task.labels[place] for place in predicted]
    probability, truth = [float(rows[row]["p_yes"]) for row in test], data.targets[test]
    metrics = report.first.metrics
    assert metrics["binary_auroc"].value == pytest.approx(roc_auc_score(truth, probability))
    assert metrics["binary_ap"].value == pytest.approx(average_precision_score(truth, probability))


def test_names_with_a_fasta_are_split_and_predicted(folder):
    given = {"fasta": folder / "my.fasta", "labels": folder / "names.csv"}
    report = run(folder, "named", **given, baselines=["degree"], split_by="random")
    assert report.headline(report.first).value > 0.9
    again = run(folder, "again", task=str(folder / "named" / "split.csv"), baselines=[])
    assert again.headline(again.first).value == report.headline(report.first).value
    (pair,) = write_comparison([report, again], folder / "compared").pairs
    assert pair.comparison.difference == 0.0
    config = PredictConfig(folder / "named", folder / "my.fasta", folder / "named.tsv", pairs=folder / "names.csv")
    predict(config)
    rows = read_rows(folder / "named.tsv")
    expected = [line.split(",") for line in (folder / "names.csv").read_text().splitlines()[1:]]
    assert [(row["protein_a"], row["protein_b"]) for row in rows] == [(a, b) for a, b, _ in expected]
    assert np.mean([row["prediction"] == target for row, (_, _, target) in zip(rows, expected, strict=True)]) > 0.9


def test_ordered_pairs_are_found_by_concat_only(folder, tmp_path):
    """The target is the kind of the first protein, which a symmetric model cannot know."""
    proteins = draw_proteins(seed=3)
    pairs = [(a, b, "LW"[proteins[a][1]]) for a, b, _ in draw_pairs(proteins, 300, seed=3)]
    path = write_sequences(tmp_path / "ordered.csv", proteins, pairs)
    scores = {
        how: (lambda report: report.headline(report.first).value)(
            run(folder, f"order-{how}", task=str(path), baselines=[], pair_features=how)
        )
        for how in ("concat", "symmetric")
    }
    assert scores["concat"] > 0.95
    assert scores["symmetric"] < 0.85


def test_the_degree_baseline_knows_how_often_each_protein_interacts(tmp_path):
    """Targets that are the product of two proteins' rates are predicted; the baseline has no other information."""
    generator = np.random.default_rng(0)
    sequences = ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 20)) for _ in range(30)]
    effect = generator.normal(size=30)
    rows = ["sequence_a,sequence_b,target,set"]
    for number in range(900):
        a, b = generator.integers(0, 30, 2)
        rows.append(f"{sequences[a]},{sequences[b]},{10 + effect[a] + effect[b]:.6f},{SETS[number % 5]}")
    path = tmp_path / "own.csv"
    path.write_text("\n".join(rows) + "\n")
    data = load_task(str(path))
    assert list_baselines(data) == ("mean", "degree", "composition")
    fitted = fit_baseline("degree", data).fitted
    truth = data.targets[data.rows("test")]
    assert stats.pearsonr(truth, fitted.test_SM[0]).statistic > 0.97
    # of a protein that train does not have, only the mean is known
    new = np.isin(data.pairs.groups_P2, np.unique(data.pairs.groups_P2[data.sets == "train"])).sum(1)
    assert new.min() == 2
    text = [row.replace(",test", ",drop") for row in rows]
    text.append("MKKKKKKKKV,MWWWWWWWWV,3,test")
    text.append(f"MKKKKKKKKV,{sequences[0]},4,test")
    path.write_text("\n".join(line for line in text if not line.endswith("drop")) + "\n")
    data = load_task(str(path))
    predicted = fit_baseline("degree", data).fitted.test_SM[0]
    train = data.targets[data.rows("train")]
    number = data.pairs.groups_P2[data.rows("test")[1], 1]
    own = [y for y, groups in zip(train, data.pairs.groups_P2[data.rows("train")], strict=True) if number in groups]
    assert predicted[0] == pytest.approx(train.mean())
    assert predicted[1] == pytest.approx((sum(own) + train.mean()) / (len(own) + 1))


def test_the_degree_baseline_of_classes_is_that_of_independent_proteins(folder):
    data = load_task(str(folder / "pairs.csv"))
    fitted, train = fit_baseline("degree", data).fitted, data.rows("train")
    share = data.targets[train].mean()

    def rate(group):
        rows = [row for row in train if group in data.pairs.groups_P2[row]]
        return (data.targets[rows].sum() + share) / (len(rows) + 1)

    for row, predicted in zip(data.rows("test"), fitted.test_SM[0], strict=True):
        first, second = map(rate, data.pairs.groups_P2[row])
        assert predicted == (first * second / share > (1 - first) * (1 - second) / (1 - share))


def test_a_pair_counts_as_often_as_both_of_its_proteins():
    groups_P2 = np.array([[7, 3], [3, 9], [7, 7], [9, 7]])
    counts_RP, proteins_RG = sample_pair_counts(groups_P2, 50, seed=4), sample_counts(3, 50, 4)  # 3, 7 and 9
    expected = [proteins_RG[:, 1] * proteins_RG[:, 0], proteins_RG[:, 0] * proteins_RG[:, 2], proteins_RG[:, 1]]
    np.testing.assert_array_equal(counts_RP.T, [*expected, proteins_RG[:, 2] * proteins_RG[:, 1]])


def test_few_test_pairs_without_a_common_protein(folder, tmp_path):
    """Most bootstrap replicates of two such pairs have none; the probabilities are scored with the others."""
    proteins = draw_proteins()
    pairs = draw_pairs(proteins, 60)
    rows = [
        f"{proteins[a][0]},{proteins[b][0]},{y},{('train', 'val')[n % 5 == 4]}" for n, (a, b, y) in enumerate(pairs)
    ]
    rows += [f"{'ACDEFGHIK' * 4}{n},{'MNPQRSTVW' * 4}{n},yes,test" for n in ("L", "W")]
    path = tmp_path / "few.csv"
    path.write_text("\n".join(["sequence_a,sequence_b,target,set", *rows]) + "\n")
    report = run(folder, "few", task=str(path), baselines=[])
    before = report.first.uncertainty["before"]
    for name in ("ece", "brier", "nll"):
        assert 0 <= before[name]["low"] <= before[name]["value"] <= before[name]["high"] < 10
    assert "How sure are the predictions?" in report.html.read_text()


def test_intervals_of_pairs_contain_the_truth_where_those_of_independent_pairs_do_not():
    """Correct predictions depend on the proteins: 200 simulated test sets, intervals of nominally 95%."""
    generator = np.random.default_rng(0)
    covered = {"proteins": 0, "pairs": 0}
    for seed in range(200):
        effect = generator.normal(size=30)
        pairs_P2 = generator.integers(0, 30, (200, 2))
        pairs_P2 = pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]]
        number = len(pairs_P2)
        right = effect[pairs_P2].sum(1) + generator.normal(size=number) > 0  # the true accuracy is one half
        scorer = build_class_scorer(np.ones(number, int), right.astype(int), np.arange(number), number, 2)
        for unit in covered:
            counts = sample_pair_counts(pairs_P2, 200, seed) if unit == "proteins" else sample_counts(number, 200, seed)
            interval = score_seeds([scorer], counts)["accuracy"].interval
            covered[unit] += interval.low <= 0.5 <= interval.high
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.95)
    assert low <= covered["proteins"] <= high
    assert covered["pairs"] < 140


@pytest.mark.parametrize("probe", ["logistic", "fnn"])
def test_the_layer_of_pairs_is_chosen_as_that_of_proteins(folder, probe):
    """The row equals that of a run with the chosen layer; each candidate's validation score that of its own run."""
    options = {"task": str(folder / "pairs.csv"), "probe": probe, "epochs": 8, "baselines": []}
    swept = run(folder, f"swept-{probe}", **options, repr_layer="0,2", pooling=["mean", "max"])
    sweep, found = swept.layer_sweep, {}
    for point in sweep.points:
        place = {"repr_layer": point.layer, "pooling": [point.pooling]}
        single = run(folder, f"single-{probe}-{point.layer}-{point.pooling}", **options, **place)
        assert single.first.validation == pytest.approx(point.value, abs=0.021), (
            "one of 50 pairs may differ by rounding"
        )
        found[point.layer, point.pooling] = single
    assert sweep.best.value == max(point.value for point in sweep.points)
    assert f"], {sweep.proteins} pairs). " in sweep.sentence
    assert f" on {sweep.proteins} validation pairs. " in swept.html.read_text(encoding="utf-8")
    assert swept.first.metrics == found[sweep.best.layer, sweep.best.pooling].first.metrics
    table = folder / f"new-{probe}.tsv"
    pairs = {"pairs": folder / "names.csv", "device": "cpu"}
    predict(PredictConfig(folder / f"swept-{probe}", folder / "my.fasta", table, **pairs))
    one = folder / f"new-{probe}-single.tsv"
    place = f"single-{probe}-{sweep.best.layer}-{sweep.best.pooling}"
    predict(PredictConfig(folder / place, folder / "my.fasta", one, **pairs))
    assert read_rows(table) == read_rows(one)


def test_what_does_not_work_with_pairs_is_refused(folder, tmp_path):
    pairs = {"task": str(folder / "pairs.csv")}
    with refused("pairs.stage", stage="fine-tuning"):
        finetune(FinetuneConfig(**pairs, model=str(folder / "tiny.safetensors"), out_dir=tmp_path))
    for options in (
        {"probe": "light_attention"},
        {"pooling": ["mean", "attention"]},
        {"allow_missing": True},
        {"folds": "fold"},
    ):
        with refused("pairs.option"):
            run(folder, "refused", **pairs, **options)
    with refused("folds.pairs-connected", pairs=250, largest=250, folds=3):
        run(folder, "refused", **pairs, folds=3)
    assert not (folder / "refused" / "embeddings").exists()  # before the proteins are embedded
    with refused("baseline.unknown", name="onehot_cnn"):
        run(folder, "refused", **pairs, baselines=["onehot_cnn"])
    (tmp_path / "own.csv").write_text("seq1,seq2,x,z,set\nMK,MV,1,2,train\n")
    with refused("labels.which-target", allowed=("x", "z")):
        load_task(str(tmp_path / "own.csv"))
    (tmp_path / "own.csv").write_text("protein1,protein2,seq1,seq2,target,set\nA,B,MK,MV,1,train\nA,C,MKK,MV,1,test\n")
    with refused("pairs.two-sequences", record="A"):
        load_task(str(tmp_path / "own.csv"))
    (tmp_path / "t.csv").write_text(
        "id,sequence,target,set\n" + "".join(f"p{i},MKV{'ACDE'[i % 4]},{i},{SETS[i % 5]}\n" for i in range(40))
    )
    run(folder, "single", task=str(tmp_path / "t.csv"), baselines=[])
    with refused("predict.single-model"):
        predict(PredictConfig(folder / "single", folder / "my.fasta", folder / "x.tsv", pairs=folder / "names.csv"))


def test_pairs_in_a_workbook_and_with_gaps(folder, tmp_path):
    book = openpyxl.Workbook()
    proteins = draw_proteins()
    book.active.title = "all pairs"
    book.active.append(["Protein A", "Protein B", "Kd (nM)"])
    for number, (a, b, _) in enumerate(draw_pairs(proteins, 60)):
        book.active.append([a, b if number else "unknown", number + 0.5 if number != 3 else None])
    book.save(tmp_path / "my.xlsx")
    data = load_labels(tmp_path / "my.xlsx", folder / "my.fasta", split_by="random")
    assert (data.task.target, data.task.unit, len(data.ids)) == ("value", "nM", 58)
    assert any("1 row without a protein; 1 row without a value" in note for note in data.notes)
    assert load_labels(Path(f"{tmp_path / 'my.xlsx'}:all pairs"), folder / "my.fasta").sha256 == data.sha256
    with refused("labels.repeated"):  # with a column of names, the proteins are single ones, each with several rows
        load_labels(tmp_path / "my.xlsx", folder / "my.fasta", id="Protein A", target="Kd (nM)")


def test_a_subset_keeps_both_proteins(folder):
    data = load_task(str(folder / "pairs.csv"))
    part = data.subset(np.array([5, 2]))
    assert part.pairs.second == [data.pairs.second[5], data.pairs.second[2]]
    assert part.pairs.groups_P2.tolist() == data.pairs.groups_P2[[5, 2]].tolist()
    small = data.limit_proteins(10)
    assert len(small.pairs.second) == len(small.ids) == 30


def test_intervals_of_values_are_described_for_pairs(folder, tmp_path):
    proteins = draw_proteins()
    pairs = [
        (a, b, str(proteins[a][1] + proteins[b][1] + 0.01 * place))
        for place, (a, b, _) in enumerate(draw_pairs(proteins))
    ]
    table = write_sequences(tmp_path / "values.csv", proteins, pairs)
    found = run(folder, tmp_path / "values", labels=table, target_type="value", baselines=[])
    described = found.rows[0].uncertainty
    assert "test pairs" in described["sentence"]
    different = len({(a, b) for place, (a, b, _) in enumerate(pairs) if SETS[place % 5] == "val"})
    assert described["holds"]
    assert f"for pairs like the {different} validation pairs" in described["sentence"]
    assert described["found"]["low"] <= described["found"]["value"] <= described["found"]["high"]
    options = {"model": found.json.parent, "fasta": table, "out": tmp_path / "new.csv", "device": "cpu", "plot": False}
    said = predict(PredictConfig(**options))["uncertainty"]
    assert f"for pairs like the {different} validation pairs of the training" in said
