"""Cross-validation of pairs of proteins: no protein of a test pair is in train, scores, intervals, and predictions."""

import csv
import dataclasses
import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import check_report
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.cross_validation import CrossValidation
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.predict import predict
from esm2kit.sequences.similarity import group_by_identity
from esm2kit.tasks.data import load_pooled_labels
from esm2kit.tasks.grouping import plan_folds

LETTERS = list("ACDEFGHIKLMNPQRSTVWY")
COMPLEXES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a small model, and the pairs of 24 complexes of 3 proteins; every second complex has a relative of one."""
    folder, generator = tmp_path_factory.mktemp("pair_folds"), np.random.default_rng(0)
    write_tiny_model(folder / "model.safetensors")
    lines, before = ["sequence_a,sequence_b,strength,binds"], ""
    for number in range(COMPLEXES):
        members = []
        for _ in range(3):
            letters = generator.choice(LETTERS, 60)
            letters[generator.random(60) < generator.random() / 3] = "W"
            members.append("".join(letters))
        if number % 2:
            members[0] = before[:-5] + "".join(generator.choice(LETTERS, 5))
        before = members[0]
        for a, b in itertools.combinations(members, 2):
            value = (a + b).count("W") / 10 + generator.normal() / 10
            lines.append(f"{a},{b},{value:.3f},{'yes' if value > 2 else 'no'}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "new.csv").write_text(f"sequence_a,sequence_b\n{'W' * 30},{'A' * 30}\n{'D' * 30},{'A' * 30}\n")
    return folder


def run(folder, out, **options):
    """Run a benchmark by cross-validation."""
    chosen = {"folds": 4, "seeds": [0], "resamples": 100, "device": "cpu", "untrained": False}
    chosen |= {"labels": folder / "pairs.csv", "model": str(folder / "model.safetensors"), "group_by": "cluster"}
    return benchmark(BenchmarkConfig(out_dir=out, **chosen | options))


def read_rows(path, delimiter=","):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


@pytest.mark.parametrize(("group_by", "groups"), [("cluster", COMPLEXES // 2), (None, COMPLEXES)])
def test_no_protein_of_a_test_pair_is_in_train_or_validation(folder, group_by, groups):
    data = load_pooled_labels(folder / "pairs.csv", target="strength")
    split_by = "random" if group_by is None else "auto"
    folds = CrossValidation.from_plan(data, plan_folds(data, 4, repeats=2, group_by=group_by, split_by=split_by))
    assert folds.plan.num_groups == groups
    unique = sorted({*data.sequences, *data.pairs.second})
    cluster_of = dict(zip(unique, group_by_identity(unique, 0.5).numbers.tolist(), strict=True))
    shared_clusters = 0
    for task in folds.tasks:
        of_set = {
            name: {sequence for row in task.rows(name) for sequence in (data.sequences[row], data.pairs.second[row])}
            for name in ("train", "validation", "test")
        }
        assert all(of_set.values())
        for a, b in itertools.combinations(of_set.values(), 2):
            assert not a & b
            shared_clusters += len({cluster_of[each] for each in a} & {cluster_of[each] for each in b})
        assert sum(map(len, map(task.rows, of_set))) == len(data.ids)  # no pair is left out
    assert (shared_clusters == 0) == (group_by == "cluster")
    tested = np.concatenate([task.rows("test") for task in folds.tasks[:4]])
    assert sorted(tested.tolist()) == list(range(3 * COMPLEXES))


def test_the_target_of_a_pair_does_not_influence_its_prediction(folder):
    data = load_pooled_labels(folder / "pairs.csv", target="strength")
    folds = CrossValidation.from_plan(data, plan_folds(data, 4, group_by="cluster"))
    counts = [
        [pair.count(letter) for letter in LETTERS]
        for pair in map("".join, zip(data.sequences, data.pairs.second, strict=True))
    ]
    features = Features(np.array(counts, dtype=np.float32), np.arange(len(counts) + 1))
    fitted = folds.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu")
    held, changed = folds.tasks[0].rows("test"), data.targets.copy()
    changed[held] = -100 * changed[held]
    tasks = tuple(dataclasses.replace(task, targets=changed) for task in folds.tasks)
    again = CrossValidation(dataclasses.replace(folds.data, targets=changed), folds.plan, tasks)
    refitted = again.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu")
    np.testing.assert_allclose(refitted.test_SM[0, held], fitted.test_SM[0, held], rtol=0, atol=1e-9)
    rest = np.setdiff1d(np.arange(len(counts)), held)
    assert not np.array_equal(refitted.test_SM[0, rest], fitted.test_SM[0, rest])


def test_pairs_with_values_from_the_table_to_new_pairs(folder, tmp_path):
    report = run(folder, tmp_path / "out", target=["strength"], repeats=2, baselines=["mean", "composition"])
    assert (
        report.folds.method
        == "4 folds of whole groups; groups: pairs connected through groups of at least 50% identity by "
        + (report.folds.method.rpartition("by ")[2])
    )
    assert report.folds.num_groups == COMPLEXES // 2
    check_report(report.json)
    composition = next(row for row in report.rows if row.name == "composition")
    assert composition.metrics["r2"].value > 0.5
    rows = [row for row in read_rows(report.json.with_name("predictions.csv")) if row["repeat"] == "1"]
    errors = sorted(abs(float(row["measured"]) - float(row["composition"])) for row in rows)
    assert composition.uncertainty["quantile"] == pytest.approx(errors[65], rel=1e-3)  # 90% of 72 pairs, and one more
    page = report.html.read_text(encoding="utf-8")
    assert "72 pairs in 4 folds of 18" in page
    assert "Each pair is predicted by a probe that was trained without its fold" in page
    assert "that train has" not in page
    out = tmp_path / "new.csv"
    probe = tmp_path / "out" / composition.probe_file
    predict(PredictConfig(probe, folder / "new.csv", out, device="cpu"))
    first, second = read_rows(out)
    assert float(first["prediction"]) > float(second["prediction"])
    width = float(first["upper"]) - float(first["lower"])
    assert width == pytest.approx(2 * composition.uncertainty["quantile"], rel=1e-4)


def test_rankings_of_pairs_are_those_of_scikit_learn(folder, tmp_path):
    report = run(folder, tmp_path, target=["binds"], baselines=["majority", "composition", "degree"])
    check_report(report.json)
    assert {row.name for row in report.rows} >= {"composition", "degree"}
    data = load_pooled_labels(folder / "pairs.csv", target="binds")
    folds = CrossValidation.from_plan(data, plan_folds(data, 4, group_by="cluster"))
    baseline = folds.fit_baseline("composition", (0,), False)
    scores = folds.score(baseline.fitted, folds.sample_counts(100))
    composition = next(row for row in report.rows if row.name == "composition")
    score_N = np.diff(baseline.fitted.test_logits_MC, axis=1)[:, 0]
    for name, function in (("binary_auroc", roc_auc_score), ("binary_ap", average_precision_score)):
        expected = function(data.targets == 1, score_N)
        assert scores[name].interval.value == pytest.approx(expected, abs=1e-9)
        assert composition.metrics[name].value == pytest.approx(expected, abs=1e-6)
        assert composition.metrics[name].low < expected <= composition.metrics[name].high <= 1
    assert "pairs of the cross-validation" in composition.uncertainty["sentence"]
