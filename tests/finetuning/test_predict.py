"""Predictions are the same for any batch size, file format and protein length, and in transformers' classes."""

import csv
import json

import h5py
import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import SHAPE, write_tasks, write_tiny_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from esm2kit.cli.main import main
from esm2kit.core.errors import InputError
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.heads import HeadSpec, LabelModel
from esm2kit.finetuning.hf_export import save_hf_classifier
from esm2kit.finetuning.model_file import FinetunedModel, load_finetuned
from esm2kit.finetuning.predict import predict
from esm2kit.finetuning.report import predict_set
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.task import describe_task

TASKS_AND_HEADS = [
    ("protein_class", "fnn"),
    ("protein_class", "light_attention"),
    ("protein_value", "hf"),
    ("residue_class", "cnn"),
    ("residue_value", "hf"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module", params=TASKS_AND_HEADS, ids="-".join)
def run(folder, request):
    """Fine-tune on windows of 30 tokens, so that many proteins are longer; return the folder."""
    task, head = request.param
    out_dir = folder / f"{task}-{head}"
    config = FinetuneConfig(
        task=task,
        head=head,
        data_dir=folder / "tasks",
        model=str(folder / "tiny.safetensors"),
        out_dir=out_dir,
        max_steps=6,
        lr=5e-3,
        max_tokens=30,
        accelerator="cpu",
        benchmark=False,
        resamples=100,
    )
    finetune(config)
    return out_dir


@pytest.fixture
def proteins(folder) -> list[str]:
    return load_task("protein_value", None, folder / "tasks").sequences


def test_predictions_do_not_depend_on_the_batch_size(run, proteins) -> None:
    model = load_finetuned(run)
    reference = model.outputs(proteins, 1)
    for tokens in (64, 500, 100_000):
        for found, expected in zip(model.outputs(proteins, tokens), reference, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    backwards = model.outputs(proteins[::-1], 200)[::-1]
    for found, expected in zip(backwards, reference, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_outputs_match_the_training_model(run, folder, proteins) -> None:
    """Compare with the forward pass of the training model, one window at a time, and average the windows."""
    found = load_finetuned(run)
    model = LabelModel(found.esm2, found.labels.spec)
    model.head.load_state_dict(found.labels.head.state_dict())
    model.eval()
    for sequence, outputs in zip(proteins, found.outputs(proteins), strict=True):
        per_residue, width = outputs.ndim == 2, found.labels.spec.num_outputs
        sums = np.zeros((len(sequence), width)) if per_residue else np.zeros((1, width))
        counts = np.zeros((len(sums), 1))
        starts = range(0, len(sequence) - 28, 14) if len(sequence) > 28 else []
        for start in [*starts, max(0, len(sequence) - 28)]:
            tokens = torch.tensor([BOS_IDX, *encode(sequence[start : start + 28]), EOS_IDX])
            with torch.no_grad():
                rows = model(tokens, [len(tokens)]).numpy()
            where = slice(start, start + 28) if per_residue else slice(None)
            sums[where] += rows
            counts[where] += 1
        expected = sums / counts
        if found.task.target == "value":
            expected = expected * found.facts["target_spread"] + found.facts["target_centre"]
        np.testing.assert_allclose(outputs, expected if per_residue else expected[0], rtol=1e-4, atol=1e-5)


def test_predictions_of_the_test_set_match_the_report(run, folder) -> None:
    model = load_finetuned(run)
    data = load_task(run.name.split("-")[0], None, folder / "tasks")
    with np.load(run / "predictions.npz") as stored:
        (name,) = [key for key in stored.files if key.startswith("predicted/")]
        np.testing.assert_array_equal(stored[name][0], predict_set(model, data, "test"))
        assert len(stored["truth"]) == len(stored[name][0])


def write_fasta(path, sequences) -> None:
    path.write_text("".join(f">q{number} of interest\n{sequence}\n" for number, sequence in enumerate(sequences)))


def test_all_file_formats_contain_the_same_predictions(run, tmp_path, proteins) -> None:
    model = load_finetuned(run)
    write_fasta(tmp_path / "mine.fasta", proteins)
    outputs = model.outputs(proteins)
    rows = {}
    for suffix, delimiter in ((".tsv", "\t"), (".csv", ",")):
        out = tmp_path / f"mine{suffix}"
        assert predict(PredictConfig(run, tmp_path / "mine.fasta", out))["num_proteins"] == len(proteins)
        with open(out, encoding="utf-8", newline="") as file:
            rows[suffix] = list(csv.DictReader(file, delimiter=delimiter))
    assert rows[".tsv"] == rows[".csv"]
    predict(PredictConfig(run, tmp_path / "mine.fasta", tmp_path / "mine.h5", batch_tokens=40))
    table = rows[".tsv"]
    per_residue = model.task.level == "residue"
    assert len(table) == (sum(map(len, proteins)) if per_residue else len(proteins))
    with h5py.File(tmp_path / "mine.h5") as file:
        assert len(file) == len(proteins)
        assert file.attrs["level"] == model.task.level
        assert list(file.attrs["labels"]) == list(model.task.labels)
        assert json.loads(file.attrs["provenance"])["inputs"]["fasta"]["path"].endswith("mine.fasta")
        line = iter(table)
        for number, (sequence, expected) in enumerate(zip(proteins, outputs, strict=True)):
            dataset = file[str(number)]
            assert dataset.attrs["original_id"] == f"q{number}"
            stored = dataset[()]
            np.testing.assert_allclose(stored, model.probabilities(expected), rtol=1e-4, atol=1e-5)
            for place, values in enumerate(stored if per_residue else [stored]):
                row = next(line)
                assert row["id"] == f"q{number}"
                if per_residue:
                    assert (int(row["position"]), row["residue"]) == (place + 1, sequence[place])
                if model.task.target == "value":
                    assert float(row["prediction"]) == pytest.approx(values[0], rel=1e-4, abs=1e-5)
                else:
                    shares = [float(row[f"p_{label}"]) for label in model.task.labels]
                    assert sum(shares) == pytest.approx(1, abs=1e-5)
                    np.testing.assert_allclose(shares, values, atol=1e-5)
                    assert row["prediction"] == model.task.labels[int(np.argmax(values))]
    manifest = json.loads((tmp_path / "mine.tsv.json").read_text())
    assert manifest["num_proteins"] == len(proteins)
    assert len(manifest["provenance"]["inputs"]["model"]["sha256"]) == 64


def save_with_head(path, level: str, task: str, standardize: bool, head: str = "hf") -> FinetunedModel:
    """Write and load a fine-tuned file with random weights and a given head."""
    chosen, esm2 = TASKS[task], ESM2.initialised(SHAPE, 7)
    spec = HeadSpec(head, level, 32, chosen.num_outputs, 32, 0.0, standardize)
    model = LabelModel(None, spec, 3)
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.rand(t.shape, generator=generator) + 0.1 for name, t in model.head.state_dict().items()}
    tensors = {f"model.{name}": tensor for name, tensor in esm2.state_dict().items()}
    facts = {"mode": "full", "head": spec._asdict(), "task": describe_task(chosen), "max_tokens": 1024}
    facts |= {"target_centre": 40.0, "target_spread": 12.0, "base": {"name": "tiny"}}
    write_checkpoint(
        path, tensors | {f"head.{name}": t for name, t in state.items()}, {"model": SHAPE, "step": 0, "finetune": facts}
    )
    return load_finetuned(path)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("task", ["meltome", "scl", "conservation", "bind"])
def test_exported_hugging_face_model_gives_the_same_outputs(task, standardize, tmp_path) -> None:
    """Load the exported folder with transformers and predict a padded batch; values are in the unit of the target."""
    model = save_with_head(tmp_path / "model.safetensors", TASKS[task].level, task, standardize)
    save_hf_classifier(model, tmp_path / "hf")
    residue = TASKS[task].level == "residue"
    auto = AutoModelForTokenClassification if residue else AutoModelForSequenceClassification
    exported, loading = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not [name for name in loading["missing_keys"] if "position" not in name]
    sequences = ["MKTLLVAGGWYP", "ACDEFGHIKLMNPQRSTVWY", "MA"]
    with torch.no_grad():
        inputs = AutoTokenizer.from_pretrained(tmp_path / "hf")(sequences, return_tensors="pt", padding=True)
        logits = exported.eval()(**inputs).logits.numpy()
    for row, (sequence, expected) in enumerate(zip(sequences, model.outputs(sequences), strict=True)):
        found = logits[row, 1 : len(sequence) + 1] if residue else logits[row]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    names = TASKS[task].binary_labels or TASKS[task].labels or (task,)
    assert [exported.config.id2label[place] for place in range(len(names))] == list(names)
    kinds = {"meltome": "regression", "bind": "multi_label_classification"}
    assert exported.config.problem_type == kinds.get(task, "single_label_classification")


def test_exporting_a_head_without_a_transformers_class_is_refused(tmp_path) -> None:
    model = save_with_head(tmp_path / "model.safetensors", "protein", "meltome", False, head="fnn")
    with refused("head.no-hf-class", head="fnn"):
        save_hf_classifier(model, tmp_path / "hf")


def test_binary_labels_have_separate_probabilities(tmp_path) -> None:
    model = save_with_head(tmp_path / "model.safetensors", "residue", "bind", False)
    (tmp_path / "one.fasta").write_text(">a\nMKTAYIAK\n")
    predict(PredictConfig(tmp_path / "model.safetensors", tmp_path / "one.fasta", tmp_path / "one.tsv"))
    rows = list(csv.DictReader((tmp_path / "one.tsv").open(), delimiter="\t"))
    (outputs,) = model.outputs(["MKTAYIAK"])
    for row, logits in zip(rows, outputs, strict=True):
        bits = [float(row[f"p_{name}"]) for name in ("metal", "nucleic", "small")]
        np.testing.assert_allclose(bits, 1 / (1 + np.exp(-logits)), rtol=1e-5)
        assert int(row["prediction"]) == sum((share > 0.5) << place for place, share in enumerate(bits))


def test_a_file_whose_head_and_labels_differ_is_refused(tmp_path) -> None:
    model = save_with_head(tmp_path / "good.safetensors", "protein", "scl", False)
    facts = model.facts | {"task": describe_task(TASKS["sav"])}
    tensors = {f"model.{name}": tensor for name, tensor in model.esm2.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in model.labels.head.state_dict().items()}
    write_checkpoint(tmp_path / "bad.safetensors", tensors, {"model": SHAPE, "step": 0, "finetune": facts})
    with refused("head.outputs", found=10, expected=2):
        load_finetuned(tmp_path / "bad.safetensors")


def test_invalid_files_are_refused(tmp_path, folder) -> None:
    with refused("finetuned.missing", path=tmp_path / "absent.safetensors"):
        load_finetuned(tmp_path / "absent.safetensors")
    with refused("finetuned.no-head", path=folder / "tiny.safetensors"):
        load_finetuned(folder / "tiny.safetensors")
    (tmp_path / "runs" / "seed=1").mkdir(parents=True)
    (tmp_path / "runs" / "seed=1" / "finetuned.safetensors").touch()
    with refused("finetuned.several", path=tmp_path / "runs", found=["seed=1"]):
        load_finetuned(tmp_path / "runs")
    complete = save_with_head(tmp_path / "complete.safetensors", "protein", "sav", False).source
    with refused("finetuned.base-unused", path=complete, base="tiny"):
        load_finetuned(complete, base="tiny")
    with refused("predict.suffix", path=tmp_path / "out.xlsx"):
        PredictConfig(folder, folder, tmp_path / "out.xlsx")


def test_an_invalid_fasta_leaves_no_output(run, tmp_path) -> None:
    (tmp_path / "bad.fasta").write_text(">a\nMKT\n>b\nMK1\n")
    with pytest.raises(InputError, match="record b"):
        predict(PredictConfig(run, tmp_path / "bad.fasta", tmp_path / "bad.tsv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fasta"]


def test_command_line_from_task_to_labels(folder, tmp_path, capsys) -> None:
    """Run finetune and predict from the command line, and load the encoder of the result as a model."""
    arguments = {"task": "protein_class", "data_dir": folder / "tasks", "model": folder / "tiny.safetensors"}
    arguments |= {"out_dir": tmp_path / "run", "max_steps": 3, "accelerator": "cpu", "benchmark": False, "head": "hf"}
    arguments |= {"export_hf": True, "resamples": 100}
    assert main(["finetune", *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    write_fasta(tmp_path / "mine.fasta", ["MKTAYIAKQR", "LLLLL"])
    out = tmp_path / "mine.tsv"
    assert main(["predict", f"--model={tmp_path / 'run'}", f"--fasta={tmp_path / 'mine.fasta'}", f"--out={out}"]) == 0
    assert out.read_text().splitlines()[0] == "id\tprediction\tp_poor\tp_rich"
    assert (tmp_path / "run" / "huggingface" / "config.json").is_file()
    from esm2kit.models.load import load_model

    esm2, source = load_model(str(tmp_path / "run" / "finetuned.safetensors"))
    assert source.name == "finetuned"
    tokens = torch.randint(4, 24, (12,))
    with torch.no_grad():
        torch.testing.assert_close(
            esm2.encode(tokens, Packed([12])), load_finetuned(tmp_path / "run").esm2.encode(tokens, Packed([12]))
        )


def test_two_devices_predict_what_one_predicts(folder, tmp_path, proteins, caplog) -> None:
    """Blocks are divided among the processes, and the first one writes them in the order of the FASTA file."""
    out_dir = folder / "protein_class-two"
    common = {"data_dir": folder / "tasks", "model": str(folder / "tiny.safetensors"), "accelerator": "cpu"}
    common |= {"benchmark": False, "resamples": 100, "max_steps": 2}
    finetune(FinetuneConfig(task="protein_class", out_dir=out_dir, **common))
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(proteins)), encoding="utf-8")
    tables = {}
    caplog.set_level("INFO", logger="esm2kit")
    for devices in (1, 2):
        caplog.clear()
        config = PredictConfig(out_dir, fasta, tmp_path / f"{devices}.tsv", device="cpu", devices=devices)
        tables[devices] = predict(config)
        assert caplog.text.count("predicted 96 proteins in ") == 1, caplog.text
    paths = dict.fromkeys(("out", "manifest", "plot", "files"))
    assert tables[2] | paths == tables[1] | paths
    assert tables[2]["files"] == [tables[2][name] for name in ("out", "manifest", "plot")]
    first, second = (list(csv.reader(tables[d]["out"].open(encoding="utf-8"), delimiter="\t")) for d in (1, 2))
    assert [row[:2] for row in first] == [row[:2] for row in second]
    for row, other in zip(first[1:], second[1:], strict=True):
        np.testing.assert_allclose([float(x) for x in row[2:]], [float(x) for x in other[2:]], atol=1e-5)
