"""Saved probes predict new proteins with the numbers of the report, and only with the encoder they were trained on."""

import csv
import logging
import shutil

import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.saved_probe import load_probe, name_probe_file
from esm2kit.cli.check import CheckConfig, check
from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.predict import predict
from esm2kit.finetuning.predictor import load_predictor
from esm2kit.models.checkpoint import read_checkpoint, write_checkpoint
from esm2kit.tasks.data import load_task
from esm2kit.tasks.task_data import TaskData

CASES = [
    ("protein_value", "ridge", (0,)),
    ("protein_class", "logistic", (0,)),
    ("protein_value", "fnn", (0, 1, 2)),
    ("protein_class", "light_attention", (0,)),
    ("protein_value", "attention", (0, 1)),
    ("residue_class", "cnn", (0,)),
    ("residue_value", "ridge", (0,)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks")
    return folder


def run(folder, task: str, probe: str, seeds, name: str = "", **options):
    out_dir = folder / (name or f"{task}-{probe}")
    config = BenchmarkConfig(
        task=task, data_dir=folder / "tasks", model=str(folder / "tiny.safetensors"), probe=probe, seeds=list(seeds),
        epochs=4, resamples=100, out_dir=out_dir, device="cpu", **{"untrained": False} | options,
    )  # fmt: skip
    return benchmark(config), out_dir


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(folder, request):
    task, probe, seeds = request.param
    report, out_dir = run(folder, task, probe, seeds)
    return report, out_dir, load_task(task, None, folder / "tasks")


def predict_test_set(model, data: TaskData) -> tuple[np.ndarray, np.ndarray]:
    """The decisions and the probabilities or values of a model for the scored targets of the test set."""
    rows = data.rows("test")
    outputs = model.outputs([data.sequences[row] for row in rows])
    if data.task.level == "protein":
        outputs = np.stack(outputs)
    else:
        scored = [data.scored[data.offsets[row] : data.offsets[row + 1]] for row in rows]
        outputs = np.concatenate([part[keep] for part, keep in zip(outputs, scored, strict=True)])
    return model.decide(outputs), model.probabilities(outputs)


def test_probes_give_the_numbers_of_the_report(case) -> None:
    report, out_dir, data = case
    saved = [row for row in report.rows if row.probe_file]
    assert report.first in saved
    assert {"composition", "mean" if data.task.target == "value" else "majority"} <= {row.name for row in saved}
    with np.load(out_dir / "predictions.npz") as stored:
        for row in saved:
            found, _ = predict_test_set(load_probe(out_dir / row.probe_file), data)
            expected = stored[f"predicted/{row.name}"]
            if data.task.target == "value":
                np.testing.assert_allclose(found, expected.mean(0), rtol=1e-6, atol=1e-6, err_msg=row.name)
            elif len(expected) == 1:
                assert (found == expected[0]).all(), row.name


def test_rows_that_cannot_predict_have_no_file(case) -> None:
    report, out_dir, data = case
    without = {row.name for row in report.rows if not row.probe_file}
    assert without == (set() if data.task.level == "residue" else {"onehot_ridge", "onehot_cnn"})
    named = {row.probe_file.removeprefix("probes/") for row in report.rows if row.probe_file}
    assert {path.name for path in (out_dir / "probes").iterdir()} == named


def test_seeds_of_a_class_probe_average_their_probabilities(folder) -> None:
    report, out_dir = run(folder, "protein_class", "fnn", (0, 1), "two_seeds", baselines=[])
    data = load_task("protein_class", None, folder / "tasks")
    probe = load_probe(out_dir / report.first.probe_file)
    decided, shares = predict_test_set(probe, data)
    single = []
    for seed in (0, 1):
        tensors = {name: tensor[[seed]] for name, tensor in probe.parameters.tensors.items() if not name.endswith("_D")}
        tensors |= {name: tensor for name, tensor in probe.parameters.tensors.items() if name.endswith("_D")}
        changed = type(probe.parameters)("fnn", tensors, hidden=32, seeds=(seed,))
        one = type(probe)(changed, probe.task, probe.facts, probe.source, probe.encoder)
        single.append(predict_test_set(one, data))
    with np.load(out_dir / "predictions.npz") as stored:
        np.testing.assert_array_equal(
            np.stack([found for found, _ in single]), stored[f"predicted/{report.first.name}"]
        )
    expected = np.mean([probabilities for _, probabilities in single], axis=0)
    np.testing.assert_allclose(shares, expected, rtol=1e-5)
    assert (decided == expected.argmax(1)).all()


def test_predict_chooses_the_best_row_on_validation(folder, tmp_path, caplog) -> None:
    report, out_dir = run(folder, "protein_value", "ridge", (0,), "best")
    rows = [row for row in report.rows if row.probe_file and row.validation is not None]
    best = max(rows, key=lambda row: row.validation)
    fasta = folder / "best.fasta"
    fasta.write_text(">a\nMKTAYIAKLLLL\n>b\nLLLL\n>c\nGGAVSERT\n")
    with caplog.at_level(logging.INFO):
        predict(PredictConfig(out_dir, fasta, tmp_path / "out.tsv"))
    assert any(record.getMessage().startswith(f"{best.name} predicts:") for record in caplog.records)
    with open(tmp_path / "out.tsv", newline="", encoding="utf-8") as file:
        found = [float(row["prediction"]) for row in csv.DictReader(file, delimiter="\t")]
    expected = load_probe(out_dir / best.probe_file).outputs(["MKTAYIAKLLLL", "LLLL", "GGAVSERT"])
    np.testing.assert_allclose(found, np.ravel(expected), rtol=1e-6)
    # a row that is better on test but not on validation must not be chosen
    content = read_sealed_json(out_dir / "report.json", "")
    for row in content["rows"]:
        row["metrics"]["spearman"]["value"] = 1.0 if row["name"] != best.name else -1.0
    shutil.copytree(out_dir, tmp_path / "changed")
    write_sealed_json(tmp_path / "changed" / "report.json", content)
    assert load_predictor(tmp_path / "changed").model_name == best.name
    # the report is what counts, not other files in the folder
    for row in content["rows"]:
        row["probe_file"] = row["probe_file"] if row["name"] == "mean" else ""
    write_sealed_json(tmp_path / "changed" / "report.json", content)
    assert load_predictor(tmp_path / "changed").model_name == "mean"
    (tmp_path / "changed" / "probes" / "mean.safetensors").unlink()
    with refused("predict.probe-missing", row="mean"):
        load_predictor(tmp_path / "changed")
    for row in content["rows"]:
        row["probe_file"] = ""
    write_sealed_json(tmp_path / "changed" / "report.json", content)
    with refused("predict.no-probe"):
        load_predictor(tmp_path / "changed")


def test_a_moved_encoder_needs_base_and_another_one_is_refused(folder, tmp_path) -> None:
    report, out_dir = run(folder, "protein_value", "ridge", (0,), "moved", baselines=["mean"])
    path = tmp_path / "probe.safetensors"
    tensors, metadata = read_checkpoint(out_dir / report.first.probe_file)
    del metadata["format"]
    metadata["probe"]["inputs"]["encoder"]["model"] = str(tmp_path / "gone.safetensors")
    write_checkpoint(path, tensors, metadata)
    with refused("probe.encoder-absent", path=path):
        load_predictor(path)
    other = write_tiny_model(tmp_path / "other.safetensors", seed=1)
    with refused("probe.other-encoder", path=path):
        load_predictor(path, base=str(other))
    again = shutil.copy(folder / "tiny.safetensors", tmp_path / "again.safetensors")
    data = load_task("protein_value", None, folder / "tasks")
    found, _ = predict_test_set(load_predictor(path, base=str(again)), data)
    with np.load(out_dir / "predictions.npz") as stored:
        np.testing.assert_allclose(found, stored[f"predicted/{report.first.name}"][0], rtol=1e-6)
    with refused("finetuned.base-unused"):
        load_predictor(out_dir / "probes" / "mean.safetensors", base=str(other))
    with refused("probe.not-saved"):
        load_probe(folder / "tiny.safetensors")


def test_an_untrained_row_predicts_with_random_weights(folder) -> None:
    report, out_dir = run(folder, "protein_value", "ridge", (0,), "untrained", untrained=True, baselines=[])
    row = next(row for row in report.rows if row.kind == "untrained")
    found, _ = predict_test_set(
        load_probe(out_dir / row.probe_file), load_task("protein_value", None, folder / "tasks")
    )
    with np.load(out_dir / "predictions.npz") as stored:
        np.testing.assert_allclose(found, stored[f"predicted/{row.name}"][0], rtol=1e-6)


def test_embeddings_of_an_earlier_run_are_enough(folder, tmp_path) -> None:
    """The file records its model; a model that moved since then is found through base, by the digest of its file."""
    data = load_task("protein_value", None, folder / "tasks")
    lines = (f">{name}\n{sequence}\n" for name, sequence in zip(data.ids, data.sequences, strict=True))
    (tmp_path / "all.fasta").write_text("".join(lines))
    moved = tmp_path / "then.safetensors"
    shutil.copy(folder / "tiny.safetensors", moved)
    result = embed(EmbedConfig(tmp_path / "all.fasta", tmp_path / "vectors", model=str(moved), device="cpu"))
    moved.unlink()
    report, out_dir = run(
        folder, "protein_value", "ridge", (0,), "earlier", embeddings=result.embeddings, baselines=[]
    )  # fmt: skip
    path = out_dir / report.first.probe_file
    with refused("probe.encoder-absent"):
        load_probe(path)
    found, _ = predict_test_set(load_probe(path, base=str(folder / "tiny.safetensors")), data)
    with np.load(out_dir / "predictions.npz") as stored:
        np.testing.assert_allclose(found, stored[f"predicted/{report.first.name}"][0], rtol=1e-6)
    with refused("probe.other-encoder"):
        load_probe(path, base=str(write_tiny_model(tmp_path / "other.safetensors", seed=1)))


def test_a_resumed_benchmark_writes_a_lost_probe_again(folder, tmp_path) -> None:
    report, out_dir = run(folder, "protein_class", "logistic", (0,), "resumed", baselines=["majority"])
    path = out_dir / report.first.probe_file
    before = {name: tensor.clone() for name, tensor in read_checkpoint(path)[0].items()}  # files are mapped into memory
    written = path.stat().st_mtime_ns
    run(folder, "protein_class", "logistic", (0,), "resumed", baselines=["majority"])
    assert path.stat().st_mtime_ns == written, "a finished row is not fitted again"
    path.write_bytes(path.read_bytes()[:-3])
    run(folder, "protein_class", "logistic", (0,), "resumed", baselines=["majority"])
    for name, tensor in read_checkpoint(path)[0].items():
        torch.testing.assert_close(tensor, before[name])


def test_damage_and_wrong_tensors_are_found(folder, tmp_path) -> None:
    report, out_dir = run(folder, "residue_class", "cnn", (0,), "damaged", baselines=[])
    path = out_dir / report.first.probe_file
    assert "agree" in check(CheckConfig(path))
    tensors, metadata = read_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with refused("checkpoint.digest"):
        load_predictor(tmp_path / "flipped.safetensors")
    with refused("check.damaged"):
        check(CheckConfig(tmp_path / "flipped.safetensors"))
    del metadata["format"]
    write_checkpoint(tmp_path / "short.safetensors", tensors | {"probe.bias_out": torch.zeros(1, 1, 2)}, metadata)
    with refused("probe.tensor", name="bias_out", found=(1, 1, 2), expected=(1, 1, 3)):
        load_predictor(tmp_path / "short.safetensors")


def test_a_folder_without_a_model_and_a_report_is_refused(tmp_path) -> None:
    (tmp_path / "embeddings").mkdir()
    with refused("predict.no-model", path=tmp_path / "embeddings"):
        load_predictor(tmp_path / "embeddings")


def test_a_folder_with_several_tasks_is_refused(folder, tmp_path) -> None:
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "report.json").write_text("{}")
    with refused("predict.several", found=["a", "b"]):
        load_predictor(tmp_path)


def test_file_names_of_rows() -> None:
    assert name_probe_file("esm2_t6_8M_UR50D, ridge") == "esm2_t6_8M_UR50D-ridge.safetensors"
    assert name_probe_file("untrained ü/../x, fnn") == "untrained-ü-..-x-fnn.safetensors"
    assert len(name_probe_file("long" * 100).encode()) < 255


def test_reports_of_earlier_versions_are_read(folder) -> None:
    _, out_dir = run(folder, "protein_value", "ridge", (0,), "old", baselines=[])
    content = read_sealed_json(out_dir / "report.json", "")
    for row in content["rows"]:
        del row["probe_file"], row["validation"]
    write_sealed_json(out_dir / "report.json", content)
    assert Report.read(out_dir).best_predictor is None
