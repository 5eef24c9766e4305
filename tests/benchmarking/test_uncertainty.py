"""The intervals and probabilities of `predict` are those whose coverage and calibration the report measured."""

import csv
import json
import logging
import math
import re
from dataclasses import replace

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
from markupsafe import escape
from scipy.special import softmax
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model
from support.planted import make_planted_task

from esm2kit import plots
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.saved_probe import load_probe
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.benchmarking.uncertainty import describe_test_uncertainty, estimate_uncertainty
from esm2kit.finetuning.config import FinetuneConfig, PredictConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.predict import predict
from esm2kit.models.checkpoint import read_checkpoint, write_checkpoint
from esm2kit.notebook import captions
from esm2kit.notebook.predictions import uncertainty_chart
from esm2kit.tasks.calibration import Temperature
from esm2kit.tasks.conformal import ConformalScores
from esm2kit.tasks.data import load_task
from esm2kit.tasks.labels import decide_outputs
from esm2kit.tasks.metrics import sample_counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncertainty")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks", 180)
    return folder


def run_benchmark(folder, task: str, probe: str, seeds=(0,), **options):
    config = BenchmarkConfig(
        task=task, data_dir=folder / "tasks", model=str(folder / "tiny.safetensors"), probe=probe, seeds=list(seeds),
        epochs=4, resamples=100, out_dir=folder / f"{task}-{probe}", device="cpu", untrained=False,
        **{"baselines": []} | options,
    )  # fmt: skip
    report = benchmark(config)
    return report, config.out_dir / report.first.probe_file


def write_test_proteins(folder, task: str):
    """Write the test proteins of a task as FASTA; return the file and their measured values, one list per protein."""
    data = load_task(task, None, folder / "tasks")
    rows = data.rows("test")
    path = folder / f"{task}_test.fasta"
    path.write_text("".join(f">{data.ids[row]}\n{data.sequences[row]}\n" for row in rows))
    return path, [data.targets[data.offsets[row] : data.offsets[row + 1]] for row in rows]


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(
    ("task", "probe", "seeds"),
    [("protein_value", "ridge", (0,)), ("protein_value", "fnn", (0, 1, 2)), ("residue_value", "cnn", (0, 1))],
)
def test_intervals_of_predict_have_the_coverage_of_the_report(folder, tmp_path, task, probe, seeds) -> None:
    report, path = run_benchmark(folder, task, probe, seeds, coverage=0.8)
    found = report.first.uncertainty
    assert Report.read(report.json).first.uncertainty == found
    fasta, measured = write_test_proteins(folder, task)
    result = predict(PredictConfig(path, fasta, tmp_path / "out.tsv", coverage=0.8))
    rows = read_table(result["out"])
    assert list(rows[0])[-3 if len(seeds) > 1 else -2 :] == ["lower", "upper", *(["spread"] if len(seeds) > 1 else [])]
    low_M, high_M = (np.array([float(row[name]) for row in rows]) for name in ("lower", "upper"))
    truth_M, protein_M = np.concatenate(measured), np.repeat(np.arange(len(measured)), [len(each) for each in measured])
    inside_M = (low_M <= truth_M) & (truth_M <= high_M)
    shares_P = np.bincount(protein_M, inside_M) / np.bincount(protein_M)
    assert found["found"]["value"] == pytest.approx(shares_P.mean(), abs=1e-9)
    assert found["mean_width"] == pytest.approx((high_M - low_M).mean(), rel=1e-5)
    assert found["num_validation"] == 30
    assert found["num_test"] == 30
    assert "30 validation proteins" in result["uncertainty"]
    predict(PredictConfig(path, fasta, tmp_path / "out.h5", coverage=0.8))
    with h5py.File(tmp_path / "out.h5") as file:
        stored = np.concatenate([np.atleast_1d(file[str(place)].attrs["lower"]) for place in range(len(measured))])
    np.testing.assert_allclose(stored, low_M, rtol=1e-5, atol=1e-5)


def test_the_quantile_comes_from_the_errors_on_validation(folder) -> None:
    """By hand: (30 + 1) 0.9 = 27.9, so the 28th smallest of the 30 errors of the mean over seeds."""
    report, path = run_benchmark(folder, "protein_value", "fnn", (0, 1, 2), coverage=0.9)
    data = load_task("protein_value", None, folder / "tasks")
    rows = data.rows("validation")
    predicted = np.concatenate(load_probe(path).outputs([data.sequences[row] for row in rows]))
    expected = np.sort(np.abs(predicted - data.targets[rows]))[27]
    assert report.first.uncertainty["quantile"] == pytest.approx(expected, rel=1e-5)
    assert not report.first.uncertainty["by_spread"]


def test_the_spread_is_the_standard_deviation_over_seeds(folder, tmp_path) -> None:
    _, path = run_benchmark(folder, "protein_value", "fnn", (0, 1, 2))
    fasta, _ = write_test_proteins(folder, "protein_value")
    rows = read_table(predict(PredictConfig(path, fasta, tmp_path / "out.tsv"))["out"])
    probe = load_probe(path)
    sequence = next(line for line in fasta.read_text().splitlines() if not line.startswith(">"))
    (row_D,) = probe._compute_rows([sequence], 1000)
    of_seeds_S = probe.parameters.outputs(row_D, [1], probe.task)[:, 0, 0].numpy()
    assert float(rows[0]["spread"]) == pytest.approx(of_seeds_S.std(ddof=1), rel=1e-5)
    assert float(rows[0]["prediction"]) == pytest.approx(of_seeds_S.mean(), rel=1e-6)


@pytest.mark.parametrize(("task", "probe"), [("protein_value", "ridge"), ("residue_class", "cnn")])
def test_the_page_and_the_notebook_show_how_sure_predictions_are(folder, task, probe) -> None:
    report, _ = run_benchmark(folder, task, probe, baselines=["mean" if "value" in task else "majority"])
    page = report.html.read_text(encoding="utf-8")
    sentence = escape(report.first.uncertainty["sentence"])
    assert "<h2>How sure are the predictions?</h2>" in page
    assert f"<p>{sentence}</p>" in page
    ax = uncertainty_chart(report)
    assert report.first.uncertainty["sentence"] in captions.uncertainty(report)
    if task == "protein_value":
        inside = round(report.first.uncertainty["found"]["value"] * 30)
        assert f"interval contains the measured value ({inside})" in [
            text.get_text() for text in ax.get_legend().get_texts()
        ]
        assert page.count("<figure>") == 4  # scores, predictions, intervals, coverage
    else:
        bins = [each for each in report.first.uncertainty["before"]["bins"] if each["count"]]
        places = [[each["confidence"], each["accuracy"]] for each in bins]
        np.testing.assert_allclose(ax.collections[-1].get_offsets(), places)
    plt.close("all")
    with refused("report.no-uncertainty"):
        uncertainty_chart(replace(report, rows=[replace(report.first, uncertainty={})]))


def change_uncertainty(path, change) -> None:
    """Rewrite the uncertainty of a saved probe."""
    tensors, metadata = read_checkpoint(path)
    facts = metadata["probe"]
    changed = change(facts.pop("uncertainty"))
    facts |= {} if changed is None else {"uncertainty": changed}
    write_checkpoint(path, tensors, metadata)


def test_probabilities_are_divided_by_a_temperature_that_helps_and_classes_stay(folder, tmp_path) -> None:
    _, path = run_benchmark(folder, "protein_class", "logistic")
    fasta, _ = write_test_proteins(folder, "protein_class")
    tables, logits_MC = {}, None
    for value, helps in ((1.0, False), (2.5, True), (2.5, False)):
        fit = Temperature(value, helps, (0.1, 0.0, 0.2), 30, "it is a test")._asdict()
        change_uncertainty(path, lambda found, fit=fit: found | {"temperature": fit})
        result = predict(PredictConfig(path, fasta, tmp_path / "out.tsv"))
        assert ("calibrated with a temperature of 2.5" in result["uncertainty"]) == helps
        tables[value, helps] = read_table(result["out"])
        logits_MC = np.stack(load_probe(path).outputs(list(fasta.read_text().split("\n")[1::2])))
    for (value, helps), rows in tables.items():
        expected = softmax(logits_MC / (value if helps else 1.0), axis=1)
        found = [[float(row[f"p_{label}"]) for label in ("poor", "rich")] for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len({tuple(row["prediction"] for row in rows) for rows in tables.values()}) == 1


def test_models_of_earlier_versions_predict_as_before(folder, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    for task, probe, columns in (
        ("protein_value", "ridge", ["id", "prediction"]),
        ("protein_class", "logistic", ["id", "prediction", "p_poor", "p_rich"]),
    ):
        _, path = run_benchmark(folder, task, probe)
        change_uncertainty(path, lambda found: None)
        fasta, _ = write_test_proteins(folder, task)
        result = predict(PredictConfig(path, fasta, tmp_path / "out.tsv"))
        assert list(read_table(result["out"])[0]) == columns
        assert sum("an earlier version wrote this model" in line for line in caplog.messages) == 1
        caplog.clear()
        path.unlink()


def test_too_few_validation_proteins_give_intervals_without_ends(tmp_path) -> None:
    write_tiny_model(tmp_path / "tiny.safetensors")
    write_tasks(tmp_path / "tasks", 36)
    report, path = run_benchmark(tmp_path, "protein_value", "ridge")
    assert report.first.uncertainty["mean_width"] is None
    assert report.first.uncertainty["quantile"] is None
    assert "6 validation proteins are too few (at least 9)" in report.first.uncertainty["sentence"]
    fasta, _ = write_test_proteins(tmp_path, "protein_value")
    result = predict(PredictConfig(path, fasta, tmp_path / "out.tsv"))
    assert {(row["lower"], row["upper"]) for row in read_table(result["out"])} == {("-inf", "inf")}
    assert "--coverage of at most 0.857" in result["uncertainty"]
    rows = read_table(predict(PredictConfig(path, fasta, tmp_path / "out.tsv", coverage=0.85))["out"])
    assert all(math.isfinite(float(row["lower"])) for row in rows)
    class_report, _ = run_benchmark(tmp_path, "protein_class", "logistic")
    assert class_report.first.uncertainty["temperature"] is None
    assert not class_report.first.uncertainty["used"]
    assert "6 validation proteins are too few" in class_report.first.uncertainty["sentence"]


@pytest.mark.parametrize("task", ["protein_value", "residue_class"])
def test_fine_tuned_models_have_the_uncertainty_of_their_own_seed(folder, tmp_path, task) -> None:
    config = FinetuneConfig(
        task=task, data_dir=folder / "tasks", model=str(folder / "tiny.safetensors"), out_dir=tmp_path / task,
        seeds=[0, 1], max_steps=4, benchmark=False, resamples=100, accelerator="cpu", coverage=0.8,
    )  # fmt: skip
    result = finetune(config)
    found = result["uncertainty"]
    data = load_task(task, None, folder / "tasks")
    first, second = (load_finetuned(config.out_dir / f"seed={seed}") for seed in (0, 1))
    assert first.uncertainty.describe() != second.uncertainty.describe()
    fasta, measured = write_test_proteins(folder, task)
    predicted = predict(PredictConfig(config.out_dir / "seed=0", fasta, tmp_path / "out.tsv", coverage=0.8))
    rows = read_table(predicted["out"])
    if task == "protein_value":
        inside = [
            float(row["lower"]) <= value[0] <= float(row["upper"]) for row, value in zip(rows, measured, strict=True)
        ]
        assert found["found"]["value"] == pytest.approx(np.mean(inside))
        assert found["num_seeds"] == 1
        return
    scored_M = data.scored[np.isin(data.protein_of_target, data.rows("test"))]
    logits_MC = np.concatenate(first.outputs([data.sequences[row] for row in data.rows("test")]))
    truth_M = np.concatenate(measured)
    loss = -np.log(softmax(logits_MC, axis=1)[np.arange(len(truth_M)), truth_M])[scored_M].mean()
    assert found["before"]["nll"]["value"] == pytest.approx(loss, rel=1e-5)
    expected = softmax(logits_MC / first.uncertainty.divisor, axis=1)
    np.testing.assert_allclose([float(row["p_A"]) for row in rows], expected[:, 0], rtol=1e-4)


def fit_planted(level: str, target: str, **options):
    features, data = make_planted_task(level, target, **options)
    probe = ProbeConfig("ridge" if target == "value" else "logistic")
    return fit_probe(features, ProbeTargets.from_task(data), probe), data


def describe(fitted: Fitted, data, coverage: float = 0.9):
    counts_RP = sample_counts(int(number_proteins(data).max()) + 1, 100)
    return describe_test_uncertainty(fitted, data, counts_RP, coverage)


def test_a_test_set_from_another_source_is_named() -> None:
    fitted, data = fit_planted("protein", "value", num_proteins=600, noise=0.5)
    same = describe(fitted, data)
    assert same["holds"]
    assert "expect up to 3 percentage points less" not in same["sentence"]
    few, few_data = fit_planted("protein", "value", num_proteins=150, noise=0.5)
    assert "30 validation proteins. These also chose the settings of the model" in describe(few, few_data)["sentence"]
    assert "are promised for proteins like the 120 validation proteins" in same["sentence"]
    shifted = data.targets.copy()
    shifted[data.rows("test")] += 3.0
    moved = describe(fitted, replace(data, targets=shifted))
    assert not moved["holds"]
    assert moved["found"]["value"] < 0.1
    assert "distributed differently" in moved["sentence"]
    generator = np.random.default_rng(0)
    shuffled = data.targets.copy()  # the same values, but no longer those of their proteins
    shuffled[data.rows("test")] = generator.permutation(shuffled[data.rows("test")])
    wrong = describe(fitted, replace(data, targets=shuffled))
    assert not wrong["holds"]
    assert "so low a coverage has a probability of" in wrong["sentence"]
    flip = replace(data, task=replace(data.task, name="gb1"), split="low_vs_high")
    assert "the split low_vs_high makes test proteins different" in describe(fitted, flip)["sentence"]


def test_the_curve_covers_at_every_nominal_coverage() -> None:
    fitted, data = fit_planted("protein", "value", num_proteins=2000, noise=0.5)
    for nominal, found, width in describe(fitted, data)["curve"]:
        assert found == pytest.approx(nominal, abs=0.07)
        assert width > 0


@pytest.mark.parametrize(("level", "bits"), [("protein", ()), ("residue", ()), ("protein", ("x", "y", "z"))])
def test_calibration_of_a_probe_before_and_after(level, bits) -> None:
    """Multiplied logits are what a temperature repairs; those of the probe itself are nearly right."""
    fitted, data = fit_planted(level, "class", num_proteins=500, noise=1.5, bits=bits)
    scaled = fitted._replace(
        test_logits_MC=3 * fitted.test_logits_MC, validation_logits_MC=3 * fitted.validation_logits_MC
    )
    own, found = describe(fitted, data), describe(scaled, data)
    assert found["used"]
    assert found["temperature"] == pytest.approx(3 * (own["temperature"] or 1), rel=0.02)
    assert found["after"]["nll"]["value"] < found["before"]["nll"]["value"]
    assert found["after"]["ece"]["value"] < 0.5 * found["before"]["ece"]["value"]
    assert "esm2kit predict uses this temperature" in found["sentence"]
    decided = decide_outputs(fitted.test_logits_MC, data.task)
    np.testing.assert_array_equal(decided, fitted.test_SM[0])


def test_models_without_probabilities_or_validation_have_no_uncertainty() -> None:
    fitted, data = fit_planted("protein", "class")
    assert estimate_uncertainty(fitted._replace(validation_logits_MC=None), data) is None
    fitted, data = fit_planted("protein", "value")
    assert describe(fitted._replace(validation_SM=np.empty((1, 0))), data) == {}


def test_values_of_any_size_have_intervals() -> None:
    fitted, data = fit_planted("protein", "value", num_proteins=600)
    seeds = np.array([[1.0], [1.01], [0.99]])
    expected = describe(Fitted(fitted.test_SM * seeds, fitted.validation_SM * seeds), data)
    for power in (900, -900):  # of two: 1e271 and 1e-271
        factor = 2.0**power
        scaled = Fitted(fitted.test_SM * seeds * factor, fitted.validation_SM * seeds * factor)
        found = describe(scaled, replace(data, targets=data.targets * factor))
        assert found["found"] == expected["found"]
        assert found["by_spread"] == expected["by_spread"]
        assert found["mean_width"] == pytest.approx(expected["mean_width"] * factor)


def test_long_proteins_have_intervals_in_hdf5(folder, tmp_path) -> None:
    """Attributes of HDF5 are limited to 64 KB in its oldest format: 8,192 numbers."""
    _, path = run_benchmark(folder, "residue_value", "ridge")
    change_uncertainty(
        path, lambda found: found | {"intervals": [ConformalScores.from_errors(np.arange(30.0)).describe()]}
    )
    (tmp_path / "long.fasta").write_text(f">titin\n{'ACDEFGHIKL' * 1000}\n")
    predict(PredictConfig(path, tmp_path / "long.fasta", tmp_path / "out.h5"))
    with h5py.File(tmp_path / "out.h5") as file:
        values, lower = file["0"][:, 0], file["0"].attrs["lower"]
    np.testing.assert_allclose(values - lower, 27.0)  # the 28th smallest of 0 to 29


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A table with two values per protein, one of which is missing for some, and the labels of each protein."""
    folder = tmp_path_factory.mktemp("several")
    write_tiny_model(folder / "tiny.safetensors")
    generator, lines = np.random.default_rng(0), ["id,sequence,place,a,b (C),set"]
    for number in range(300):
        share = generator.uniform(0, 0.6)
        sequence = "".join(generator.choice(list("LAGVSERTID"), 40, p=[share, *[(1 - share) / 9] * 9]))
        places = [name for name, chance in (("nucleus", share), ("wall", 0.5)) if generator.random() < chance]
        b = "" if number % 3 == 0 else f"{100 * share + 20 * generator.normal():.4f}"
        cells = [f"p{number}", sequence, ";".join(places) or "[]", f"{share + 0.1 * generator.normal():.4f}", b]
        lines.append(",".join([*cells, ("train", "train", "val", "test")[number % 4]]))
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    return folder


def run_several(folder, target: str, probe: str, coverage: float = 0.9):
    config = BenchmarkConfig(
        task=str(folder / "my.csv"), target=target, model=str(folder / "tiny.safetensors"), probe=probe, seeds=[0, 1],
        epochs=4, resamples=100, untrained=False, baselines=[], device="cpu", out_dir=folder / probe,
        joint="," in target, coverage=coverage,
    )  # fmt: skip
    report = benchmark(config)
    data = load_task(str(folder / "my.csv"), target=target.split(","))
    fasta = folder / "test.fasta"
    fasta.write_text("".join(f">{data.ids[row]}\n{data.sequences[row]}\n" for row in data.rows("test")))
    result = predict(PredictConfig(config.out_dir / report.first.probe_file, fasta, folder / f"{probe}.tsv"))
    return report, data, read_table(result["out"]), result


def test_a_target_whose_intervals_have_no_ends_has_no_share(several) -> None:
    """98.5% need 66 validation proteins; `a` has 75 and `b` 50. Intervals without ends contain everything."""
    report, *_ = run_several(several, "a,b (C)", "ridge", 0.985)
    found = report.first.uncertainty["columns"]
    assert (found["a"]["num_validation"], found["b (C)"]["num_validation"]) == (75, 50)
    sentence, share = report.first.uncertainty["sentence"], found["a"]["found"]["value"]
    assert f" intervals contain {share:.1%} (a) of the measured test values." in sentence
    assert "so that intervals have no ends: b (C)." in sentence
    assert "100.0% (b (C))" not in sentence
    cells = r'<td>b \(C\)</td><td class="n">–</td><td class="n">no ends</td>'
    assert re.search(cells, report.html.read_text(encoding="utf-8"))


def test_the_curve_of_coverages_ends_where_intervals_have_no_ends(several, tmp_path, monkeypatch) -> None:
    """Ten validation proteins suffice for 90% and not for 95%, whose intervals would contain everything."""
    lines = (several / "my.csv").read_text().splitlines()[:41]
    (tmp_path / "few.csv").write_text("\n".join(lines) + "\n")
    shown, draw = [], plots.coverage_curve
    monkeypatch.setattr(
        plots, "coverage_curve", lambda nominal, *rest, **how: shown.append(nominal) or draw(nominal, *rest, **how)
    )
    report = benchmark(
        BenchmarkConfig(
            task=str(tmp_path / "few.csv"), target="a", model=str(several / "tiny.safetensors"), resamples=100,
            untrained=False, baselines=[], device="cpu", out_dir=tmp_path / "few",
        )
    )  # fmt: skip
    assert report.first.uncertainty["num_validation"] == 10
    assert [max(nominal) for nominal in shown] == [0.9]


def test_several_values_have_one_interval_each(several) -> None:
    report, data, rows, result = run_several(several, "a,b (C)", "fnn")
    truth_MC = data.targets[data.target_rows("test")]
    names = list(report.task.columns)
    added = [f"{kind}_{name}" for name in names for kind in ("lower", "upper", "spread")]
    assert list(rows[0]) == ["id", *names, *added]
    for column, name in enumerate(names):
        found = report.first.uncertainty["columns"][name]
        low_M, high_M = (np.array([float(row[f"{kind}_{name}"]) for row in rows]) for kind in ("lower", "upper"))
        known_M = np.isfinite(truth_MC[:, column])
        inside_M = (low_M <= truth_MC[:, column]) & (truth_MC[:, column] <= high_M)
        assert found["found"]["value"] == pytest.approx(inside_M[known_M].mean())
        assert found["num_test"] == known_M.sum() == (75 if name == "a" else 50)
        assert found["holds"]
    assert f"{report.first.uncertainty['columns'][names[1]]['num_validation']} validation" in result["uncertainty"]
    assert report.first.uncertainty["sentence"] in report.html.read_text(encoding="utf-8")
    assert uncertainty_chart(report).get_xlabel() == f"measured ({names[0]})"
    plt.close("all")


def test_labels_of_a_multi_label_task_share_a_temperature_and_keep_their_predictions(several) -> None:
    report, data, rows, _ = run_several(several, "place", "logistic")
    path = several / "logistic" / report.first.probe_file
    truth_ML = data.targets[data.target_rows("test")]
    logits_ML = np.stack(load_probe(path).outputs([data.sequences[row] for row in data.rows("test")])).astype(float)
    loss = np.log1p(np.exp(-np.where(truth_ML > 0, 1, -1) * logits_ML)).mean()
    assert report.first.uncertainty["before"]["nll"]["value"] == pytest.approx(loss, rel=1e-5)
    fit = Temperature(2.0, True, (0.1, 0.05, 0.2), 75, "it is a test")._asdict()
    change_uncertainty(path, lambda found: found | {"temperature": fit})
    scaled = predict(PredictConfig(path, several / "test.fasta", several / "scaled.tsv"))
    after = read_table(scaled["out"])
    assert [row["prediction"] for row in after] == [row["prediction"] for row in rows]
    found = [[float(row[f"p_{name}"]) for name in report.task.binary_labels] for row in after]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits_ML / 2)), rtol=1e-5)
    threshold = json.loads(scaled["manifest"].read_text())["threshold"]
    for row in after:  # the threshold belongs to the probabilities of the table
        chosen = [name for name in report.task.binary_labels if float(row[f"p_{name}"]) > threshold]
        assert ";".join(chosen) == row["prediction"]
