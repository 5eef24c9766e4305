"""Multi-label tasks and several values per protein: from the table to the report and to predictions."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.baselines.fit import fit_baseline
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import check_report, write_comparison
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.probes.linear import RIDGE_GRID
from esm2kit.benchmarking.report import Report
from esm2kit.finetuning.config import FinetuneConfig, PredictConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.module import loss_sum
from esm2kit.finetuning.predict import predict
from esm2kit.notebook import captions
from esm2kit.notebook.display import prediction_chart
from esm2kit.notebook.predictions import uncertainty_chart
from esm2kit.tasks.data import load_task
from esm2kit.tasks.packing import build_labels
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

SETS = ("train", "train", "train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and proteins whose labels and values follow from what is appended to a random sequence."""
    folder = tmp_path_factory.mktemp("several")
    write_tiny_model(folder / "tiny.safetensors")
    generator = np.random.default_rng(0)
    lines = ["id,sequence,place,nucleus,wall,b,Tm (C),set"]
    for number in range(150):
        nucleus, wall = generator.integers(0, 2, 2)
        sequence = "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30)) + "L" * 15 * nucleus + "W" * 15 * wall
        place = ";".join(name for name, here in (("nucleus", nucleus), ("wall", wall)) if here) or "[]"
        value = f"{50 + 20 * wall + generator.normal():.3f}" if generator.random() > 0.2 else ""
        cells = [f"p{number}", sequence, place, nucleus, wall, f"{5 * nucleus + generator.normal():.3f}", value]
        lines.append(",".join(map(str, [*cells, SETS[number % 5]])))
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    start = "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30))
    new = {"L": start + "L" * 15, "W": start + "W" * 15, "LW": start + "L" * 15 + "W" * 15, "none": start}
    (folder / "new.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in new.items()))
    return folder


def run(folder, name, target, **options):
    config = {"task": str(folder / "my.csv"), "model": str(folder / "tiny.safetensors"), "target": target}
    config |= {"seeds": [0], "resamples": 100, "untrained": False, "baselines": [], "device": "cpu"}
    return benchmark(BenchmarkConfig(**config | options, out_dir=folder / name))


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def predict_new(folder, model, **options):
    out = folder / f"{model}.tsv"
    found = predict(PredictConfig(folder / model, folder / "new.fasta", out, device="cpu", **options))
    return {row["id"]: row for row in read_table(out)}, found


@pytest.mark.parametrize(("probe", "epochs"), [("logistic", None), ("fnn", 60), ("light_attention", 8)])
def test_labels_are_found_from_the_table_to_new_proteins(folder, probe, epochs):
    report = run(folder, probe, "place", probe=probe, epochs=epochs, seeds=[0, 1], baselines=["majority"])
    assert report.task.binary_labels == ("nucleus", "wall")
    assert report.headline(report.first).value > 0.9
    assert report.headline(report.rows[1]).value < 0.7  # the most frequent states
    assert report.verdict.startswith("Predicts better than the most frequent state of each label (macro-F1")
    assert {"mcc", "auroc", "map", "samples_f1", "subset_accuracy"} < set(report.first.metrics)
    assert report.first.per_class["wall"]["auroc"] > 0.9
    rows, found = predict_new(folder, probe)
    labels = {name: row["prediction"] for name, row in rows.items()}
    assert labels == {"L": "nucleus", "W": "wall", "LW": "nucleus;wall", "none": ""}
    for row in rows.values():
        chosen = {name for name in ("nucleus", "wall") if float(row[f"p_{name}"]) > json_threshold(found)}
        assert chosen == set(filter(None, row["prediction"].split(";")))
    assert "1 without a label" in found["verdict"]


def json_threshold(found):
    return json.loads(found["manifest"].read_text())["threshold"]


def test_the_scores_of_a_report_are_those_of_its_predictions(folder):
    report = run(folder, "scores", "place", seeds=[0, 1], probe="fnn", epochs=3)
    with np.load(report.json.parent / "predictions.npz") as stored:
        truth_ML, predicted_SML = stored["truth"], stored[f"predicted/{report.first.name}"]
    assert predicted_SML.shape == (2, 30, 2)
    thresholds = report.first.selected["threshold"]
    expected = [
        f1_score(truth_ML, probability_ML > threshold, average="macro", zero_division=0)
        for probability_ML, threshold in zip(predicted_SML, thresholds, strict=True)
    ]
    assert report.headline(report.first).seeds == pytest.approx(expected)
    assert report.headline(report.first).value == pytest.approx(np.mean(expected))
    assert check_report(report.json).first.name == report.first.name
    again = run(folder, "scores", "place", seeds=[0, 1], probe="fnn", epochs=3)  # from the saved rows
    assert again.first.metrics == report.first.metrics
    other = run(folder, "scores2", "place", seeds=[0], probe="logistic")
    (pair,) = write_comparison([report, other], folder / "compared").pairs
    difference = report.headline(report.first).value - other.headline(other.first).value
    assert pair.comparison.difference == pytest.approx(difference)


def test_one_log_line_says_that_a_protein_has_several_labels(folder, caplog):
    with caplog.at_level("INFO"):
        run(folder, "logged", "place")
    (line,) = [record.getMessage() for record in caplog.records if "multi-label" in record.getMessage()]
    assert "2 labels" in line
    assert "target_type to class" in line


def test_columns_of_0_and_1_are_one_multilabel_task_only_together(folder):
    report = run(folder, "together", "nucleus,wall", joint=True)
    assert report.task.binary_labels == ("nucleus", "wall")
    same = run(folder, "of-text", "place")
    assert report.first.metrics["macro_f1"] == same.first.metrics["macro_f1"]
    chosen = run(folder, "chosen", "nucleus,wall", target_type="multilabel")
    assert chosen.task == report.task
    separate = run(folder, "separate", "nucleus,wall")
    assert [list(entry.report.task.labels) for entry in separate.reports] == [["0", "1"], ["0", "1"]]


def draw(count=120, width=6, columns=3, missing=0.0, seed=0):
    """Draw features, and values that depend on them."""
    generator = np.random.default_rng(seed)
    x_PD = generator.normal(size=(count, width)).astype(np.float32)
    y_PC = x_PD @ generator.normal(size=(width, columns)) * [1.0, 100.0, 1e-3] + generator.normal(size=(count, columns))
    y_PC = y_PC.astype(np.float64)
    y_PC[generator.random((count, columns)) < missing] = np.nan
    sets = np.array(["train", "train", "validation", "test"] * (count // 4))
    task = Task("t", "protein", "value", "spearman", {}, "", columns=("a", "b", "c"))
    names = [str(row) for row in range(count)]
    scored = np.isfinite(y_PC).any(1)
    data = TaskData(task, "", names, ["M"] * count, sets, y_PC, scored, {})
    return Features(x_PD, data.offsets), data


def test_the_ridge_probe_is_scikit_learns_ridge_of_several_outputs():
    features, data = draw()
    fitted = fit_probe(features, ProbeTargets.from_task(data), ProbeConfig("ridge"))
    train, test = data.rows("train"), data.rows("test")
    x = features.values_ND.astype(np.float64)
    x = (x - x[train].mean(0)) / x[train].std(0)
    alphas = np.array(fitted.selected["penalty_per_row"]) * len(train)
    y, spread = data.targets[train], data.targets[train].std(0)
    model = Ridge(alpha=alphas).fit(x[train], (y - y.mean(0)) / spread)
    expected = model.predict(x[test]) * spread + y.mean(0)
    np.testing.assert_allclose(fitted.test_SM[0], expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    assert all(penalty in RIDGE_GRID for penalty in fitted.selected["penalty_per_row"])


def test_targets_with_missing_cells_are_fitted_as_if_each_was_alone():
    features, data = draw(missing=0.3)
    fitted = fit_probe(features, ProbeTargets.from_task(data), ProbeConfig("ridge"))
    for column in range(3):
        known = np.isfinite(data.targets[:, column])
        task = Task("t", "protein", "value", "spearman", {}, "")
        values = np.where(known, data.targets[:, column], 0.0)
        alone = TaskData(task, "", data.ids, data.sequences, data.sets, values, known, {})
        single = fit_probe(features, ProbeTargets.from_task(alone), ProbeConfig("ridge"))
        rows = known[data.target_rows("test")]
        np.testing.assert_allclose(fitted.test_SM[0][rows, column], single.test_SM[0], rtol=1e-6)


@pytest.mark.parametrize("probe", ["fnn", "ridge"])
def test_the_value_of_a_missing_cell_has_no_influence(probe):
    """Missing cells are masked: removing the proteins of a set that have none changes nothing, whatever they hold."""
    features, data = draw(missing=0.4)
    config = ProbeConfig(probe, epochs=3, batch_size=1000)
    fitted = fit_probe(features, ProbeTargets.from_task(data), config, (0,))
    assert np.isfinite(fitted.test_SM).all()
    losses = fitted.history.get("validation_loss", [[1.0]])
    assert np.isfinite(losses).all()
    if probe == "fnn":  # the loss is the mean over measured cells of standardised values
        train = data.targets[data.rows("train")]
        z = (data.targets - np.nanmean(train, axis=0)) / np.nanstd(train, axis=0)
        rows = data.target_rows("validation")
        predicted = (fitted.validation_SM[0] - np.nanmean(train, axis=0)) / np.nanstd(train, axis=0)
        kept = fitted.selected["epoch"][0] - 1
        assert losses[kept][0] == pytest.approx(np.nanmean((z[rows] - predicted) ** 2), rel=1e-5)


def test_the_logistic_probe_of_labels_is_scikit_learns_of_each_label():
    features, data = draw()
    labels_PL = (data.targets > np.median(data.targets, axis=0)).astype(np.int64)
    task = Task("t", "protein", "class", "macro_f1", {}, "", binary_labels=("a", "b", "c"))
    data = TaskData(task, "", data.ids, data.sequences, data.sets, labels_PL, np.ones(len(labels_PL), bool), {})
    fitted = fit_probe(features, ProbeTargets.from_task(data), ProbeConfig("logistic"))
    train, test = data.rows("train"), data.rows("test")
    x = features.values_ND.astype(np.float64)
    x = (x - x[train].mean(0)) / x[train].std(0)
    # the loss is the mean over labels, so the penalty of a single label is three times as large
    model = LogisticRegression(C=1 / (3 * fitted.selected["penalty"] * len(train)), tol=1e-8, max_iter=5000)
    for label in range(3):
        expected = model.fit(x[train], labels_PL[train, label]).predict_proba(x[test])[:, 1]
        np.testing.assert_allclose(fitted.test_SM[0][:, label], expected, atol=5e-3)


def test_several_values_are_scored_together_and_separately(folder):
    names = ["mean", "composition", "onehot_ridge", "onehot_cnn"]
    report = run(folder, "values", "b,Tm (C)", joint=True, baselines=names)
    assert report.task.columns == ("b", "Tm (C)")
    assert report.headline(report.first).value > 0.5
    own = report.first.per_target
    assert set(own) == {"b", "Tm (C)"}
    assert report.headline(report.first).value == pytest.approx(np.mean([own[name]["spearman"].value for name in own]))
    assert own["Tm (C)"]["rmse"].low < own["Tm (C)"]["rmse"].value < own["Tm (C)"]["rmse"].high
    assert Report.read(report.json).first.per_target == own
    page = report.html.read_text()
    assert "Scores per target" in page
    assert page.count("prediction equals measurement") == 2
    assert check_report(report.json)
    rows, found = predict_new(folder, "values")
    intervals = [f"{end}_{name}" for name in ("b", "Tm (C)") for end in ("lower", "upper")]
    assert list(rows["L"]) == ["id", "b", "Tm (C)", *intervals]
    assert float(rows["L"]["b"]) > float(rows["W"]["b"])
    assert float(rows["W"]["Tm (C)"]) > float(rows["L"]["Tm (C)"]) + 5
    assert "Tm (C) between" in found["verdict"]
    assert found["plot"].is_file()


def test_the_mean_baseline_is_the_mean_of_measured_values(folder):
    data = load_task(str(folder / "my.csv"), target=["b", "Tm (C)"])
    fitted = fit_baseline("mean", data).fitted
    expected = np.nanmean(data.targets[data.rows("train")], axis=0)
    np.testing.assert_allclose(fitted.test_SM, np.broadcast_to(expected, fitted.test_SM.shape))


def test_the_nearest_protein_has_its_labels(folder):
    data = load_task(str(folder / "my.csv"), target="place")
    fitted = fit_baseline("levenshtein_nearest", data).fitted
    assert f1_score(data.targets[data.rows("test")], fitted.test_SM[0] > 0.5, average="macro") > 0.8
    majority = fit_baseline("majority", data).fitted
    share = data.targets[data.rows("train")].mean(0)
    np.testing.assert_allclose(majority.test_SM[0], np.broadcast_to(share, (30, 2)))


@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_a_finetuned_model_predicts_labels_above_its_threshold(folder, mode):
    out_dir = folder / f"tuned-{mode}"
    given = {"task": str(folder / "my.csv"), "target": "place", "model": str(folder / "tiny.safetensors"), "mode": mode}
    given |= {"max_steps": 60, "val_check_interval": 20, "lr": 3e-3, "head_lr": 1e-2, "accelerator": "cpu"}
    found = finetune(FinetuneConfig(**given, benchmark=False, out_dir=out_dir, resamples=100))
    assert found["test"]["macro_f1"]["value"] > 0.8
    model = load_finetuned(out_dir)
    data = load_task(str(folder / "my.csv"), target="place")
    outputs = np.stack(model.outputs([data.sequences[row] for row in data.rows("test")]))
    expected = f1_score(data.targets[data.rows("test")], model.decide(outputs), average="macro", zero_division=0)
    assert found["test"]["macro_f1"]["value"] == pytest.approx(expected)
    assert model.facts["threshold"] == model.threshold
    rows, _ = predict_new(folder, f"tuned-{mode}")
    for row in rows.values():
        chosen = {name for name in ("nucleus", "wall") if float(row[f"p_{name}"]) > model.threshold}
        assert chosen == set(filter(None, row["prediction"].split(";")))


def test_a_finetuned_model_predicts_several_values(folder):
    given = {"task": str(folder / "my.csv"), "target": ["b", "Tm (C)"], "model": str(folder / "tiny.safetensors")}
    given |= {"max_steps": 60, "val_check_interval": 30, "lr": 3e-3, "head_lr": 1e-2, "accelerator": "cpu"}
    found = finetune(FinetuneConfig(**given, out_dir=folder / "tuned", resamples=100, head="hf", export_hf=True))
    assert found["test"]["r2"]["value"] > 0.5
    assert found["test"]["r2/b"]["value"] > 0.3
    rows, _ = predict_new(folder, "tuned")
    assert float(rows["L"]["b"]) > float(rows["W"]["b"])
    assert json.loads((folder / "tuned" / "huggingface" / "config.json").read_text())["id2label"]["1"] == "Tm (C)"
    report = Report.read(folder / "tuned")
    assert report.first.per_target["b"]["r2"].value == pytest.approx(found["test"]["r2/b"]["value"])


def test_a_class_among_several_columns_is_refused(folder):
    with refused("task.cell", column="place"):
        run(folder, "refused", "place,b", joint=True)


def test_the_notebooks_show_several_targets(folder):
    report = run(folder, "shown", "place")
    ax = prediction_chart(report)
    assert [text.get_text() for text in ax.get_yticklabels()] == sorted(
        report.first.per_class, key=lambda label: -report.first.per_class[label]["support"]
    )
    assert uncertainty_chart(report).get_ylabel() == "share that is present"
    assert captions.uncertainty(report).startswith("*Share of the labels that are present against")
    assert "Of the label" in captions.held_out(report)
    values = run(folder, "shown-values", "b,Tm (C)", joint=True)
    assert len(prediction_chart(values).collections[0].get_offsets()) == values.task.sizes["test"]
    assert uncertainty_chart(values).get_xlabel() == "measured (b)"
    assert captions.uncertainty(values).startswith("*Predictions of b with")


def test_layers_are_chosen_for_labels_and_for_several_values(folder):
    report = run(folder, "layers", "place", repr_layer="all")
    assert report.headline(report.first).value > 0.9
    values = run(folder, "layers-values", "b,Tm (C)", joint=True, repr_layer="0,1", pooling=["mean", "max"])
    assert values.task.columns == ("b", "Tm (C)")
    assert values.layer_sweep is not None


@pytest.mark.parametrize("preset", ["schmirler", "biotrainer-flip"])
def test_a_protocol_that_does_not_scale_values_predicts_all_of_them(folder, preset):
    report = run(folder, f"raw-{preset}", "b,Tm (C)", joint=True, preset=preset, epochs=3)
    assert report.task.columns == ("b", "Tm (C)")
    rows, found = predict_new(folder, f"raw-{preset}")
    assert all(np.isfinite([float(row["b"]), float(row["Tm (C)"])]).all() for row in rows.values())
    assert "Tm (C) between" in found["verdict"]


def test_fine_tuning_averages_the_loss_over_measured_cells():
    _, data = draw(missing=0.4)
    labels = build_labels(data, scale_targets=True, class_weights=False)
    outputs_PC = torch.randn(len(data.ids), 3)
    scaled_PC = (data.targets - np.nanmean(data.targets[data.rows("train")], axis=0)) / np.nanstd(
        data.targets[data.rows("train")], axis=0
    )
    loss = loss_sum(outputs_PC, labels.targets, labels.weights, data.task) / labels.weights.mean(1).sum()
    assert float(loss) == pytest.approx(np.nanmean((scaled_PC - outputs_PC.numpy()) ** 2), rel=1e-5)
    other = labels.targets + 1e3 * (labels.weights == 0)  # what a missing cell holds has no influence
    changed = loss_sum(outputs_PC, other, labels.weights, data.task) / labels.weights.mean(1).sum()
    assert torch.equal(changed, loss)


def test_rare_labels_weigh_as_much_as_frequent_ones_with_class_weights():
    _, data = draw()
    labels_PL = (data.targets > np.quantile(data.targets, [0.5, 0.9, 0.2], axis=0)[np.arange(3), np.arange(3)]) * 1
    task = Task("t", "protein", "class", "macro_f1", {}, "", binary_labels=("a", "b", "c"))
    data = TaskData(task, "", data.ids, data.sequences, data.sets, labels_PL, np.ones(len(labels_PL), bool), {})
    labels = build_labels(data, scale_targets=True, class_weights=True)
    train = data.rows("train")
    present = torch.from_numpy(labels_PL[train]).bool()
    weights = labels.weights[train]
    for label in range(3):
        sums = [float(weights[present[:, label] == state, label].sum()) for state in (True, False)]
        assert sums == pytest.approx([len(train) / 2] * 2)
