"""The verdict compares with the mean of train, the frozen probe and the best baseline, and warns of collapse."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from support.finetune_fixtures import write_tasks, write_tiny_model
from support.planted import make_planted_task

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.saved_probe import describe_labels
from esm2kit.benchmarking.scores import ScoredModel, number_proteins, score_fitted
from esm2kit.benchmarking.verdict import (
    _describe_spreads,
    compare_spreads,
    evaluate,
    evaluate_new_predictions,
    score_constant,
)
from esm2kit.tasks.metrics import sample_counts


def judge_predictions(data, kind: str, predicted, others=(), seeds: int = 1):
    """The verdict on predictions of the test set, with other models given as (name, kind, predictions)."""
    counts = sample_counts(int(number_proteins(data).max()) + 1, 200)

    def scored(name, kind, rows) -> ScoredModel:
        fitted = Fitted(np.atleast_2d(rows), np.empty((1, 0)))
        return ScoredModel(name, kind, "", {}, fitted, score_fitted(fitted, data, counts))

    others = [scored(*other) for other in others]
    return evaluate(data, scored("model", kind, np.stack([predicted] * seeds)), score_constant(data, counts), others)


@pytest.fixture(scope="module")
def values():
    _, data = make_planted_task("protein", "value")
    return data, data.targets[data.target_rows("test")]


@pytest.fixture(scope="module")
def classes():
    _, data = make_planted_task("protein", "class")
    return data, data.targets[data.target_rows("test")]


def test_good_predictions_of_values(values) -> None:
    data, truth = values
    noisy = truth + 0.3 * np.random.default_rng(0).normal(size=len(truth))
    found = judge_predictions(data, "probe", noisy, [("composition", "baseline", truth * 0 + np.arange(len(truth)))])
    r2 = 1 - np.square(noisy - truth).sum() / np.square(truth - truth.mean()).sum()
    assert found.sentence.startswith("Predicts better than the mean of train and amino-acid composition (R² ")
    assert f"R² {r2:.3f} [" in found.sentence
    assert f"spread {noisy.std() / truth.std():.0%} as wide as the measured values" in found.sentence
    assert found.warnings == ()


def test_the_frozen_probe_and_the_best_baseline_are_named(values) -> None:
    data, truth = values
    generator = np.random.default_rng(1)
    weak, strong = (truth + size * generator.normal(size=len(truth)) for size in (2.0, 0.1))
    others = [("m, ridge", "probe", strong), ("onehot_ridge", "baseline", weak), ("composition", "baseline", strong)]
    found = judge_predictions(data, "finetuned", truth + 0.6 * generator.normal(size=len(truth)), others)
    assert found.sentence.startswith("Predicts better than the mean of train (R²")
    assert found.sentence.endswith(", but worse than the frozen probe and amino-acid composition.")
    same = judge_predictions(data, "finetuned", strong, others)
    assert same.sentence.endswith(", but no better than the frozen probe and amino-acid composition.")
    assert "frozen probe" not in judge_predictions(data, "probe", weak, others[1:]).sentence


def test_collapsed_predictions_of_values_have_a_warning(values) -> None:
    data, truth = values
    flat = truth.mean() + 0.02 * (truth - truth.mean())
    found = judge_predictions(data, "finetuned", flat)
    assert [warning.split(":")[0] for warning in found.warnings] == ["The predictions have collapsed"]
    assert "spread 2% as wide" in found.warnings[0]
    constant = judge_predictions(data, "finetuned", np.full(len(truth), truth.mean() + 1))
    assert [warning[:15] for warning in constant.warnings] == [
        "The predictions",
        "R² is -" + constant.warnings[1][7:15],
    ]
    assert constant.sentence.startswith("Predicts worse than the mean of train (R² -")
    assert compare_spreads(np.stack([flat, truth]), truth) == pytest.approx((0.02 + 1) / 2)


def test_equal_measured_values_have_no_spread(values) -> None:
    data, truth = values
    rows = data.target_rows("test")
    targets = data.targets.copy()
    targets[rows] = 5.5
    found = judge_predictions(replace(data, targets=targets), "probe", truth)
    assert found.sentence.endswith("(all measured values are equal; R² is undefined).")
    assert found.warnings == ()
    assert np.isnan(compare_spreads(truth[None], targets[rows]))
    both = np.stack([targets[rows], truth], axis=1)
    assert compare_spreads(both[None] * 0.5, both) == pytest.approx(0.5), "the mean over targets whose values differ"
    assert _describe_spreads("R² is undefined", both[None] * 0.5, both, ("a", "b")) == [
        "all measured values of 'a' are equal",
        "R² is undefined",
        "predictions of the other targets spread 50% as wide as their measured values",
    ]


def test_predictions_worse_than_the_mean_of_train_always_have_a_warning(values) -> None:
    data, truth = values
    centre = data.targets[data.target_rows("train")].mean()
    limit, generator, worse = np.square(truth - centre).mean(), np.random.default_rng(2), 0
    for _ in range(60):
        predicted = centre + generator.uniform(0, 1.2) * (truth - centre) + generator.uniform(0, 3) * generator.normal(
            size=len(truth)
        )  # fmt: skip
        is_worse = np.square(predicted - truth).mean() > limit
        worse += is_worse
        assert not is_worse or judge_predictions(data, "probe", predicted).warnings
    assert 5 < worse < 55


def test_classes(classes) -> None:
    data, truth = classes
    majority = np.bincount(data.targets[data.target_rows("train")]).argmax()
    single = judge_predictions(data, "probe", np.full(len(truth), majority))
    assert f"all {len(truth)} test targets are predicted as {data.task.labels[majority]!r}" in single.warnings[0]
    assert single.sentence.startswith("Predicts no better than the majority class (accuracy ")
    wrong = judge_predictions(data, "probe", (truth + 1) % 3)
    assert wrong.sentence.startswith("Predicts worse than the majority class (accuracy 0.000")
    assert wrong.warnings[0].startswith("Not better than the majority class of train (accuracy 0.000")
    right = judge_predictions(data, "probe", truth)
    assert right.sentence.startswith("Predicts better than the majority class (accuracy 1.000")
    assert right.warnings == ()


def test_new_values_are_compared_with_the_training_labels(values) -> None:
    data, _ = values
    labels = describe_labels(data)
    train = data.targets[data.target_rows("train")]
    assert labels["mean"] == pytest.approx(train.mean())
    assert labels["deviation"] == pytest.approx(train.std())
    assert labels["quantiles"][0] == train.min()
    assert labels["quantiles"][10] == pytest.approx(np.median(train))
    narrow = {"count": 30, "low": 51.9, "high": 52.3, "deviation": 0.1 * train.std()}
    found = evaluate_new_predictions(data.task, narrow, labels)
    assert found.sentence.startswith("Predicted 30 proteins between 51.9 and 52.3 units; their standard deviation, ")
    assert "is 10% of that of the training labels" in found.sentence
    assert found.warnings[0].startswith("The predictions have collapsed: they spread 10% as wide")
    assert evaluate_new_predictions(data.task, narrow | {"deviation": train.std()}, labels).warnings == ()
    assert evaluate_new_predictions(data.task, narrow | {"count": 3}, labels).warnings == ()
    assert evaluate_new_predictions(data.task, narrow, {}).warnings == (), "files of earlier versions"
    assert evaluate_new_predictions(data.task, {"count": 0}, labels).sentence == "No proteins were predicted."


def test_new_classes_are_compared_with_the_training_labels(classes) -> None:
    data, _ = classes
    labels = describe_labels(data)
    assert sum(labels["classes"].values()) == labels["count"] == len(data.target_rows("train"))
    single = evaluate_new_predictions(data.task, {"count": 40, "classes": {"a": 40}}, labels)
    assert single.sentence == "Predicted 40 proteins: a 100%."
    assert single.warnings[0].startswith("All 40 proteins are predicted as 'a', one of 3 classes")
    both = evaluate_new_predictions(data.task, {"count": 40, "classes": {"b": 30, "a": 10}}, labels)
    assert both == ("Predicted 40 proteins: b 75%, a 25%.", ())
    numbers = evaluate_new_predictions(data.task, {"count": 40, "classes": {"1": 30, "0": 10}}, labels)
    assert numbers.sentence == "Predicted 40 proteins: '1' 75%, '0' 25%."


def test_a_benchmark_ends_with_its_verdict(tmp_path, caplog) -> None:
    write_tasks(tmp_path / "tasks")
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    with caplog.at_level(logging.INFO):
        report = benchmark(
            BenchmarkConfig(
                task="protein_value", data_dir=tmp_path / "tasks", model=str(model), out_dir=tmp_path / "out",
                seeds=[0], resamples=100, untrained=False, baselines=[], device="cpu",
            )
        )  # fmt: skip
    assert report.verdict.startswith("Predicts better than the mean of train (R² ")
    assert caplog.records[-1].getMessage() == report.verdict
    again = Report.read(tmp_path / "out")
    assert (again.verdict, list(again.warnings)) == (report.verdict, list(report.warnings))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="lead">{report.verdict}' in page


def test_a_probe_without_signal_warns_on_the_console_and_on_the_page(tmp_path, caplog) -> None:
    write_tasks(tmp_path / "tasks", shuffled=True)
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    with caplog.at_level(logging.INFO):
        report = benchmark(
            BenchmarkConfig(
                task="protein_value", data_dir=tmp_path / "tasks", model=str(model), out_dir=tmp_path / "out",
                seeds=[0], resamples=100, untrained=False, baselines=["mean"], device="cpu",
            )
        )  # fmt: skip
    assert report.first.metrics["r2"].value < 0.1
    assert not report.verdict.startswith("Predicts better")
    assert report.warnings
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [f"warning: {warning}" for warning in report.warnings] == logged[-len(report.warnings) :]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="warning"') == len(report.warnings)


def test_the_page_of_equal_measured_values_gives_no_share_of_their_spread(tmp_path) -> None:
    write_tasks(tmp_path / "tasks")
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    path = tmp_path / "tasks" / "protein_value" / "own.fasta"
    path.write_text(re.sub(r"(SET=test VALIDATION=False TARGET=)\S+", r"\g<1>5.5", path.read_text()))
    report = benchmark(
        BenchmarkConfig(
            task="protein_value", data_dir=tmp_path / "tasks", model=str(model), out_dir=tmp_path / "out",
            seeds=[0], resamples=100, untrained=False, baselines=[], device="cpu",
        )
    )  # fmt: skip
    assert report.verdict.endswith(" (all measured values are equal; R² is undefined).")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "on the frozen encoder is undefined, because all measured values are equal." in page
    assert "as wide as" not in page
    assert "standard deviation of the predictions" not in page
