"""Cross-validation of several values or labels per protein: each as if it were alone, files, and predictions."""

import csv
import dataclasses
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from benchmarks.folds import Scenario, draw, plan
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import CompareConfig, check_report, compare
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.cross_validation import CrossValidation
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features
from esm2kit.core.files import to_json
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.predict import predict
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

DRAWN = Scenario(20, 4, 10, 0.8, "value", 4, 2)
VALUES = Task("drawn", "protein", "value", "spearman", {}, "", columns=("a", "b"))
LABELS = Task("drawn", "protein", "class", "macro_f1", {}, "", binary_labels=("x", "y", "z"))


def build(task: Task, seed: int = 0, missing: float = 0.0) -> tuple[Features, CrossValidation]:
    """Draw proteins with several targets, and divide them."""
    generator = np.random.default_rng(seed)
    x_ND, y_N, group_N = draw(generator, DRAWN, DRAWN.groups)
    targets_NC = np.stack([y_N, 10 * (x_ND[:, 0] - x_ND[:, 1]) + generator.normal(size=len(y_N))], axis=1)
    targets_NC[generator.random(len(y_N)) < missing, 1] = np.nan
    if task is LABELS:
        targets_NC = (np.stack([y_N, -y_N, x_ND[:, 2]], axis=1) > [0, 0.5, 1]).astype(np.int64)
    names, count = [f"p{number}" for number in range(len(y_N))], len(y_N)
    data = TaskData(task, "", names, names, np.full(count, "test"), targets_NC, np.ones(count, bool), {})
    return Features(x_ND, np.arange(count + 1)), CrossValidation.from_plan(data, plan(group_N, DRAWN))


def change_targets(folds: CrossValidation, targets: np.ndarray, task: Task | None = None) -> CrossValidation:
    """Return the same folds and sets with other targets."""
    parts = (dataclasses.replace(each, targets=targets, task=task or each.task) for each in (folds.data, *folds.tasks))
    data, *tasks = parts
    return CrossValidation(data, folds.plan, tuple(tasks))


def test_each_of_several_values_is_scored_as_if_it_were_alone():
    features, folds = build(VALUES)
    together = folds.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu", is_saved=True)
    counts_RG = folds.sample_counts(200)
    scores = folds.score(together, counts_RG)
    described = folds.describe_uncertainty(together, counts_RG, 0.9)["columns"]
    one = dataclasses.replace(VALUES, columns=())
    relative, every = [], np.arange(80)
    for column, name in enumerate("ab"):
        single = change_targets(folds, folds.data.targets[:, column], one)
        alone = single.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu", is_saved=True)
        np.testing.assert_allclose(together.test_SM[:, :, column], alone.test_SM, rtol=0, atol=1e-6)
        assert together.selected["penalty_per_row"][column::2] == alone.selected["penalty_per_row"]
        for metric, score in single.score(alone, counts_RG).items():
            found = scores[f"{metric}/{name}"]
            assert found.interval == pytest.approx(score.interval, abs=1e-6), metric
        expected = single.describe_uncertainty(alone, counts_RG, 0.9)
        for field in ("quantile", "mean_width", "inside", "num_validation", "holds"):
            assert described[name][field] == pytest.approx(expected[field], abs=1e-6)
        assert described[name]["found"] == pytest.approx(expected["found"])
        relative.append(scores[f"rmse/{name}"].interval.value / np.std(folds.data.targets[:, column]))
        # the final probe has a penalty for each value
        outputs = [
            fitted.parameters.outputs(features.take(every), [1] * 80, each.data.task).numpy()[0]
            for fitted, each in ((together, folds), (alone, single))
        ]
        np.testing.assert_allclose(outputs[0][:, column], outputs[1][:, 0], rtol=0, atol=1e-6)
    means = [scores[f"spearman/{name}"].interval.value for name in "ab"]
    assert scores["spearman"].interval.value == pytest.approx(np.mean(means))
    assert scores["rmse"].interval.value == pytest.approx(np.mean(relative))
    assert scores["r2"].interval.low < scores["r2"].interval.value < scores["r2"].interval.high
    assert sum(value is None for value in folds.score_each_fold(together)) == 0
    assert folds.score_validation(together) > 0.3


def test_missing_values_are_left_out_of_every_fold():
    features, folds = build(VALUES, missing=0.4)
    known = np.flatnonzero(np.isfinite(folds.data.targets[:, 1]))
    together = folds.fit_probe(features, ProbeConfig("ridge"), (0,), "cpu")
    scores = folds.score(together, folds.sample_counts(50))
    # alone, on the proteins with a value, in the same folds and sets
    one = dataclasses.replace(VALUES, columns=())
    data, *tasks = (
        dataclasses.replace(each.subset(known), targets=each.targets[known, 1], task=one)
        for each in (folds.data, *folds.tasks)
    )
    groups = np.unique(folds.plan.group_P[known], return_inverse=True)[1]
    single = CrossValidation(
        data, folds.plan._replace(group_P=groups, fold_RP=folds.plan.fold_RP[:, known]), tuple(tasks)
    )
    alone = single.fit_probe(
        Features(features.values_ND[known], np.arange(len(known) + 1)), ProbeConfig("ridge"), (0,), "cpu"
    )
    np.testing.assert_allclose(together.test_SM[:, known, 1], alone.test_SM, rtol=0, atol=1e-6)
    for metric, score in single.score(alone, single.sample_counts(50)).items():
        assert scores[f"{metric}/b"].interval.value == pytest.approx(score.interval.value, abs=1e-6), metric


@pytest.mark.parametrize("repeats", [1, 2])
def test_scores_of_labels_are_those_of_scikit_learn_on_the_pooled_predictions(repeats):
    features, folds = build(LABELS)
    if repeats == 1:
        one = folds.plan._replace(fold_RP=folds.plan.fold_RP[:1])
        folds = CrossValidation(folds.data, one, folds.tasks[:4])
    fitted = folds.fit_probe(features, ProbeConfig("fnn", epochs=15), (0, 1), "cpu")
    thresholds = np.reshape(fitted.selected["threshold"], (repeats, 4, 2))
    assert len(np.unique(thresholds)) > 1
    truth_NL, found = folds.data.targets, []
    for row, probability_NL in enumerate(fitted.test_SM):
        repeat, seed = divmod(row, 2)
        limit_N = thresholds[repeat, folds.plan.fold_RP[repeat], seed]
        called_NL = probability_NL > limit_N[:, None]
        averages = {f"{name}_f1": f1_score(truth_NL, called_NL, average=name, zero_division=0)
                    for name in ("macro", "micro", "samples")}  # fmt: skip
        mcc = np.mean([matthews_corrcoef(truth_NL[:, label], called_NL[:, label]) for label in range(3)])
        found.append(averages | {
            "map": average_precision_score(truth_NL, probability_NL, average="macro"),
            "auroc": roc_auc_score(truth_NL, probability_NL, average="macro"),
            "mcc": mcc,
            "subset_accuracy": (truth_NL == called_NL).all(axis=1).mean(),
        })  # fmt: skip
    scores = folds.score(fitted, folds.sample_counts(50))
    for metric in found[0]:
        expected = np.mean([each[metric] for each in found])
        assert scores[metric].interval.value == pytest.approx(expected, abs=1e-9), metric
        assert -1 <= scores[metric].interval.low <= expected <= scores[metric].interval.high <= 1
    hard = change_targets(folds, np.random.default_rng(0).integers(0, 2, (80, 3)))  # few proteins are all right
    guessed = hard.score(hard.fit_probe(features, ProbeConfig("fnn", epochs=2), (0,), "cpu"), hard.sample_counts(50))
    assert guessed["subset_accuracy"].interval.low >= 0
    assert folds.score_validation(fitted) > 0.3
    first = [f1_score(truth_NL[held], (fitted.test_SM[0] > thresholds[0, folds.plan.fold_RP[0], 0][:, None])[held],
                      average="macro", zero_division=0)
             for held in (folds.plan.fold_RP[0] == 0,)]  # fmt: skip
    second = f1_score(truth_NL[folds.tasks[0].rows("test")],
                      fitted.test_SM[1, folds.tasks[0].rows("test")] > thresholds[0, 0, 1],
                      average="macro", zero_division=0)  # fmt: skip
    assert folds.score_each_fold(fitted)[0] == pytest.approx(np.mean([*first, second]))


@pytest.mark.parametrize(("task", "probe"), [(VALUES, "ridge"), (VALUES, "fnn"), (LABELS, "logistic"), (LABELS, "fnn")])
def test_the_targets_of_a_protein_do_not_influence_its_predictions(task, probe):
    features, folds = build(task)
    config = ProbeConfig(probe, epochs=5)
    fitted = folds.fit_probe(features, config, (0,), "cpu")
    assert folds.merge(folds.divide(fitted)).selected == fitted.selected
    held = folds.tasks[0].rows("test")
    changed = folds.data.targets.copy()
    changed[held] = 1 - changed[held] if task is LABELS else changed[held] * -3 + 1
    again = change_targets(folds, changed).fit_probe(features, config, (0,), "cpu")
    np.testing.assert_allclose(again.test_SM[0, held], fitted.test_SM[0, held], rtol=0, atol=1e-9)
    if task is LABELS:  # nor the threshold
        np.testing.assert_array_equal(again.fold_thresholds_SM[0, held], fitted.fold_thresholds_SM[0, held])
    rest = np.setdiff1d(np.arange(80), held)
    assert not np.array_equal(again.test_SM[0, rest], fitted.test_SM[0, rest])


@pytest.mark.parametrize("task", [VALUES, LABELS])
def test_targets_that_a_fold_cannot_learn_are_refused(task):
    _, folds = build(task)
    name, (targets, group_N) = (
        task.columns[-1:] or task.binary_labels[-1:],
        (folds.data.targets.copy(), folds.plan.group_P),
    )
    absent = 0 if task is LABELS else np.nan
    # in a single group of the other folds: not in train and validation, or not in train
    few = np.isin(group_N, [np.unique(group_N[folds.plan.fold_RP[0] == fold])[0] for fold in (0, 1)])
    targets[:, -1] = np.where(few, 1, absent)
    data, order = dataclasses.replace(folds.data, targets=targets), folds.plan._replace(fold_RP=folds.plan.fold_RP[:1])
    if task is VALUES:
        with refused("folds.few-values", target=name[0], proteins=4):
            CrossValidation.from_plan(data, order)
    else:  # one group is enough for train
        for each in CrossValidation.from_plan(data, order).tasks:
            assert each.targets[each.rows("train"), -1].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a small model, and a table of 60 proteins with two values, one of them with gaps, and labels."""
    folder, generator = tmp_path_factory.mktemp("several_folds"), np.random.default_rng(0)
    write_tiny_model(folder / "model.safetensors")
    lines = ["id,sequence,Tm (C),activity,place,fold"]
    for number in range(60):
        sequence = generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 50)
        sequence[generator.random(50) < generator.random() / 2] = "W"
        warm, acid = (sequence == "W").mean(), (sequence == "D").mean()
        activity = "" if number % 6 == 0 else f"{100 * acid + generator.normal() / 10:.3f}"
        place = ";".join(name for name, here in (("nucleus", warm > 0.2), ("wall", acid > 0.03)) if here) or "[]"
        cells = [f"p{number}", "".join(sequence), f"{20 * warm + 40 + generator.normal() / 5:.3f}", activity, place]
        lines.append(",".join([*cells, str(number % 4)]))
    (folder / "mine.csv").write_text("\n".join(lines) + "\n")
    (folder / "new.fasta").write_text(f">n0\n{'W' * 30}\n>n1\n{'D' * 30}\n")
    return folder


def run(folder, out, **options):
    """Run a benchmark by cross-validation."""
    chosen = {"folds": 4, "seeds": [0], "resamples": 100, "device": "cpu", "untrained": False}
    chosen |= {"labels": folder / "mine.csv", "model": str(folder / "model.safetensors")}
    return benchmark(BenchmarkConfig(out_dir=out, **chosen | options))


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_several_values_from_the_table_to_new_proteins(folder, tmp_path):
    options = {"target": ["Tm", "activity"], "joint": True, "folds": "fold", "baselines": ["mean", "composition"]}
    report = run(folder, tmp_path / "out", **options)
    assert report.task.columns == ("Tm (C)", "activity")
    assert check_report(report.json).task.spreads == list(report.task.spreads)
    rows = read_rows(report.json.with_name("predictions.csv"))
    known = [row for row in rows if row["measured activity"]]
    assert (len(rows), len(known)) == (60, 50)
    measured, predicted = (
        [float(row[name]) for row in known] for name in ("measured activity", "composition: activity")
    )
    composition = next(row for row in report.rows if row.name == "composition")
    errors = np.abs(np.subtract(measured, predicted))
    assert composition.per_target["activity"]["rmse"].value == pytest.approx(math.sqrt((errors**2).mean()), rel=1e-4)
    described = composition.uncertainty["columns"]
    assert described["activity"]["num_validation"] == 50
    assert described["activity"]["quantile"] == pytest.approx(sorted(errors)[math.ceil(0.9 * 51) - 1], rel=1e-3)
    page = report.html.read_text(encoding="utf-8")
    assert "Scores per target" in page
    assert "How sure are the predictions?" in page
    assert "on test" not in page
    assert to_json(run(folder, tmp_path / "out", **options).rows) == to_json(report.rows)  # without a fit
    other = run(folder, tmp_path / "other", repr_layer=0, **options)
    (pair,) = compare(CompareConfig([report.json, other.json], tmp_path / "pair")).pairs
    expected = report.headline(report.first).value - other.headline(other.first).value
    assert pair.comparison.difference == pytest.approx(expected)
    out = tmp_path / "new.csv"
    probe = tmp_path / "out" / composition.probe_file
    predict(PredictConfig(model=probe, fasta=folder / "new.fasta", out=out, device="cpu"))
    first = read_rows(out)[0]
    for name in ("Tm (C)", "activity"):
        ends = (
            float(first[next(key for key in first if key.startswith(end) and name in key)])
            for end in ("lower", "upper")
        )
        low, high = ends
        assert high - low == pytest.approx(2 * described[name]["quantile"], rel=1e-4)


def test_labels_from_the_table_to_new_proteins(folder, tmp_path):
    options = {"target": "place", "target_type": "multilabel", "baselines": ["majority", "composition"]}
    report = run(folder, tmp_path / "out", repeats=2, **options)
    assert report.task.binary_labels == ("nucleus", "wall")
    check_report(report.json)
    composition = next(row for row in report.rows if row.name == "composition")
    assert len(composition.selected["threshold"]) == 8
    rows = [row for row in read_rows(report.json.with_name("predictions.csv")) if row["repeat"] == "1"]
    thresholds = [composition.selected["threshold"][int(row["fold"]) - 1] for row in rows]
    names = ("nucleus", "wall")
    truth_NL, found_NL = (np.array([[float(row[f"{kind} {name}"]) for name in names] for row in rows])
                          for kind in ("measured", "composition:"))  # fmt: skip
    called_NL = found_NL > np.array(thresholds)[:, None]
    for label, name in enumerate(names):
        expected = f1_score(truth_NL[:, label], called_NL[:, label])
        assert composition.per_class[name]["f1"] == pytest.approx(expected)
    assert composition.metrics["macro_f1"].value > 0.8
    assert composition.uncertainty["before"]["ece"]["value"] >= 0
    assert "on test" not in report.html.read_text(encoding="utf-8")
    out = tmp_path / "new.csv"
    probe = tmp_path / "out" / composition.probe_file
    predict(PredictConfig(model=probe, fasta=folder / "new.fasta", out=out, device="cpu"))
    text = out.read_text(encoding="utf-8")
    assert "nucleus" in text.splitlines()[1]


def test_every_column_is_a_report_without_joint(folder, tmp_path):
    found = run(folder, tmp_path, target=["Tm", "activity"], baselines=["mean"])
    assert [entry.report.task.scored_test for entry in found.reports] == [60, 50]
