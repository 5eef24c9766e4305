"""Defaults for small data, the verdict of fine-tuning and prediction, and the plot next to the predictions."""

import json
import logging
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.benchmarking.probes.features import compute_column_moments
from esm2kit.cli.main import main, summarise
from esm2kit.core.checksums import read_sealed_json
from esm2kit.finetuning.config import PredictConfig, resolve_defaults
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.predict import predict
from esm2kit.finetuning.prediction_summary import PredictionSummary
from esm2kit.finetuning.predictor import load_predictor
from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.esm2 import Packed
from esm2kit.models.load import load_model
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.task import Task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks")
    return folder


def configure(folder, out_dir, task: str = "protein_value", **given) -> FinetuneConfig:
    common = {"data_dir": folder / "tasks", "model": str(folder / "tiny.safetensors"), "accelerator": "cpu"}
    return FinetuneConfig(task=task, out_dir=out_dir, **common | {"benchmark": False, "resamples": 100} | given)


@pytest.fixture(scope="module")
def collapsed(folder):
    """A run whose predictions are almost constant, with its log and its report."""
    out_dir, records = folder / "collapsed", []
    handler = logging.Handler()
    handler.emit = records.append
    source = logging.getLogger("esm2kit")
    level, handlers, propagate = source.level, source.handlers, source.propagate
    source.setLevel(logging.INFO)
    source.addHandler(handler)
    try:
        config = configure(folder, out_dir, max_steps=2, lr=1e-6, head_lr=1e-6, standardize=False, benchmark=True)
        result = finetune(config)
    finally:
        source.removeHandler(handler)
        source.setLevel(level)
        source.handlers, source.propagate = handlers, propagate
    return out_dir, result, [record.getMessage() for record in records]


def test_small_training_sets_get_enough_updates_and_a_fast_head() -> None:
    small = resolve_defaults(FinetuneConfig(), TASKS["gb1"], 80)
    assert (small.max_steps, small.head_lr, small.lr, small.standardize) == (300, 1e-3, 1e-4, True)
    assert small.val_check_interval == 10, "one validation per pass over the 80 proteins"
    large = resolve_defaults(FinetuneConfig(), TASKS["gb1"], 8000)
    assert large.max_steps == 10 * 1000
    assert resolve_defaults(FinetuneConfig(epochs=10), TASKS["gb1"], 80).max_steps == 100
    assert resolve_defaults(FinetuneConfig(max_steps=7), TASKS["gb1"], 80).max_steps == 7
    assert resolve_defaults(FinetuneConfig(min_updates=50), TASKS["gb1"], 16).max_steps == 50
    both = FinetuneConfig(epochs=2, min_updates=50, global_batch_size=8)
    assert resolve_defaults(both, TASKS["gb1"], 16).max_steps == 50, "both are honoured"
    assert resolve_defaults(both, TASKS["gb1"], 800).max_steps == 200
    assert resolve_defaults(FinetuneConfig(lr=5e-3), TASKS["gb1"], 80).head_lr == 5e-3
    published = resolve_defaults(FinetuneConfig(preset="schmirler"), TASKS["gb1"], 80)
    assert (published.max_steps, published.head_lr, published.standardize) == (200, 2e-5, False)


def test_the_head_starts_from_z_scored_inputs_in_every_mode(folder, tmp_path) -> None:
    finetune(configure(folder, tmp_path, max_steps=1, lr=1e-3))
    tensors, _ = read_checkpoint(tmp_path / "finetuned.safetensors")
    esm2, _ = load_model(folder / "tiny.safetensors")
    data = load_task("protein_value", None, folder / "tasks")
    rows = []
    for row in data.rows("train"):
        tokens = torch.tensor([BOS_IDX, *encode(data.sequences[row]), EOS_IDX])
        with torch.no_grad():
            rows.append(esm2.encode(tokens, Packed([len(tokens)]))[1:-1].mean(0))
    mean_D, scale_D = compute_column_moments([torch.stack(rows)])
    torch.testing.assert_close(tensors["head.mean_D"], mean_D, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["head.scale_D"], scale_D, rtol=1e-4, atol=1e-5)


def test_default_fine_tuning_of_64_proteins_learns(folder, tmp_path) -> None:
    result = finetune(configure(folder, tmp_path))
    assert result["runs"][0]["max_steps"] == 300
    assert result["test"]["r2"]["value"] > 0.5
    assert result["verdict"].startswith("Predicts better than the mean of train (R² ")
    assert result["warnings"] == []


def test_collapsed_fine_tuning_is_reported_everywhere(collapsed) -> None:
    out_dir, result, messages = collapsed
    assert not result["verdict"].startswith("Predicts better")
    assert any("collapsed" in warning for warning in result["warnings"])
    assert messages[-1] == result["verdict"], "the verdict is the last line"
    assert [f"warning: {warning}" for warning in result["warnings"]] == messages[-1 - len(result["warnings"]) : -1]
    stored = read_sealed_json(out_dir / "finetune.json", "")
    assert (stored["verdict"], stored["warnings"]) == (result["verdict"], result["warnings"])
    page = (out_dir / "report.html").read_text(encoding="utf-8")
    assert page.count('class="warning"') == len(result["warnings"])
    report = json.loads((out_dir / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == result["verdict"]
    assert "the frozen probe" in result["verdict"]


def test_the_frozen_probe_of_a_fine_tuning_report_predicts(collapsed, folder) -> None:
    out_dir, _, _ = collapsed
    report = json.loads((out_dir / "report.json").read_text(encoding="utf-8"))
    row = next(row for row in report["rows"] if row["kind"] == "probe")
    data = load_task("protein_value", None, folder / "tasks")
    found = load_predictor(out_dir / row["probe_file"]).outputs([data.sequences[place] for place in data.rows("test")])
    with np.load(out_dir / "predictions.npz") as stored:
        np.testing.assert_allclose(np.ravel(found), stored[f"predicted/{row['name']}"][0], rtol=1e-6)


def test_predict_warns_of_collapsed_predictions(collapsed, tmp_path, caplog) -> None:
    out_dir, _, _ = collapsed
    fasta = tmp_path / "new.fasta"
    fasta.write_text("".join(f">q{n}\n{'MKLV' * (n + 2)}{'AG' * n}\n" for n in range(8)), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        result = predict(PredictConfig(out_dir, fasta, tmp_path / "out.tsv"))
    assert result["warnings"][0].startswith("The predictions have collapsed: they spread ")
    assert caplog.records[-1].getMessage() == result["verdict"]
    assert f"warning: {result['warnings'][0]}" in [record.getMessage() for record in caplog.records]
    manifest = read_sealed_json(tmp_path / "out.tsv.json", "")
    assert (manifest["verdict"], manifest["warnings"]) == (result["verdict"], result["warnings"])
    rows = (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()[1:]
    values = np.array([float(row.split("\t")[1]) for row in rows])
    described = manifest["predictions"]
    assert described["deviation"] == pytest.approx(values.std(), rel=1e-4)
    assert (described["count"], described["low"], described["high"]) == pytest.approx((8, values.min(), values.max()))


@pytest.fixture(scope="module")
def runs(folder):
    tasks = ("protein_value", "protein_class", "residue_class", "residue_value")
    for task in tasks:
        finetune(configure(folder, folder / task, task, max_steps=2))
    return {task: folder / task for task in tasks}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("protein_value", ["predicted value", "training labels: range", "predictions"]),
        ("protein_class", ["predicted proteins", "rich", "poor"]),
        ("residue_class", ["q0", "q3", "residue", "predicted class", "protein"]),
        ("residue_value", ["q0", "residue", "predicted value"]),
    ],
)
def test_predict_writes_a_plot(task: str, expected: list[str], runs, tmp_path) -> None:
    fasta = tmp_path / "new.fasta"
    fasta.write_text("".join(f">q{n}\n{'MKLVLAG' * (n + 2)}\n" for n in range(4)), encoding="utf-8")
    result = predict(PredictConfig(runs[task], fasta, tmp_path / "out.tsv"))
    assert result["plot"] == tmp_path / "out.tsv.svg"
    texts = [element.text for element in ET.parse(result["plot"]).iter("{http://www.w3.org/2000/svg}text")]
    for text in expected:
        assert text in texts
    before = result["plot"].read_bytes()
    predict(PredictConfig(runs[task], fasta, tmp_path / "out.tsv"))
    assert result["plot"].read_bytes() == before, "the same input gives the same file"


def test_the_plot_can_be_left_out(runs, tmp_path, capsys) -> None:
    fasta = tmp_path / "new.fasta"
    fasta.write_text(">a\nMKLV\n", encoding="utf-8")
    arguments = ["predict", str(fasta), f"--model={runs['protein_class']}", f"--out={tmp_path / 'out.csv'}"]
    assert main([*arguments, "--plot=false"]) == 0
    assert not (tmp_path / "out.csv.svg").exists()
    shown = json.loads(capsys.readouterr().out)
    assert shown["plot"] is None
    assert shown["verdict"].startswith("Predicted 1 proteins: ")
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["plot"] == str(tmp_path / "out.csv.svg")


def test_fine_tuned_files_know_their_training_labels(runs, folder) -> None:
    data = load_task("protein_value", None, folder / "tasks")
    y = data.targets[data.target_rows("train")]
    found = load_finetuned(runs["protein_value"]).training_labels
    assert (found["count"], found["mean"], found["deviation"]) == pytest.approx((len(y), y.mean(), y.std()))
    classes = load_finetuned(runs["residue_class"]).training_labels["classes"]
    data = load_task("residue_class", None, folder / "tasks")
    assert classes == {name: int((data.targets[data.target_rows("train")] == k).sum()) for k, name in enumerate("ABC")}


def test_the_summary_of_predictions_is_exact_in_any_grouping() -> None:
    task = Task("t", "residue", "value", "spearman", {}, "")
    values, summary = np.random.default_rng(0).normal(1e6, 2.0, 1000), PredictionSummary(task)
    for part in np.split(values, [3, 3, 400, 990]):
        summary.add("p", part)
    found = summary.describe()
    assert found["count"] == 1000
    np.testing.assert_allclose([found["mean"], found["deviation"]], [values.mean(), values.std()], rtol=1e-9)
    assert (found["low"], found["high"]) == (values.min(), values.max())


def test_quiet_runs_end_with_the_verdict() -> None:
    result = {"out": "out.tsv", "predictions": "out.tsv", "verdict": "Predicted 3 proteins."}
    source = logging.getLogger("esm2kit")
    level = source.level
    try:
        source.setLevel(logging.WARNING)
        assert summarise(result, on_terminal=True).splitlines()[-1] == "Predicted 3 proteins."
        source.setLevel(logging.INFO)
        assert "Predicted 3 proteins." not in summarise(result, on_terminal=True), "the log has shown it"
        assert json.loads(summarise(result))["verdict"] == "Predicted 3 proteins."
    finally:
        source.setLevel(level)
