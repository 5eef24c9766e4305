"""Stages on a device give the results of the CPU: embed, pretrain, resume, finetune, probes, layouts.

On the CPU the same tests hold the stages against a second way of computing, or against themselves.
"""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.devices import CUDA, on_devices, relative_difference
from support.finetune_fixtures import write_tasks, write_tiny_model
from support.layouts import arguments, train_in_process, train_with_torchrun
from support.planted import make_planted_task

from esm2kit import load_model
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe, fit_probe_folds
from esm2kit.benchmarking.probes.heads import reads_residues
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import tokenize

STEPS = 6
PRECISIONS = {"32-true": 1e-4, "bf16-mixed": 2e-2, "bf16-true": 2e-2}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA GPUs")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), 48)


def curve(out_dir: Path, name: str) -> list[float]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def run(out_dir: Path, data: Path, device: str, **settings: object) -> list[str]:
    steps = {"max_steps": STEPS, "val_check_interval": 3, "save_top_k": 2, "accelerator": device}
    return arguments(out_dir, data, **steps | settings)


@on_devices()
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fasta_to_hdf5_in_the_order_of_the_file(device: str, dtype: str, tiny: Path, tmp_path: Path) -> None:
    """Every output of proteins of many lengths, against single proteins on the CPU in float32."""
    generator = np.random.default_rng(0)
    proteins = ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), size)) for size in generator.integers(1, 90, 40)]
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{number}\n{protein}\n" for number, protein in enumerate(proteins)), encoding="utf-8")
    outputs = {"per_residue": True, "bos": True, "logits": True, "dtype": dtype, "repr_layers": [0, -1]}
    result = embed(
        EmbedConfig(
            fasta, tmp_path / "out", model=str(tiny), device=device, precision="float32", batch_tokens=256, **outputs
        )
    )
    encoder = Encoder(load_model(tiny)[0].eval())
    bound = 1e-5 if dtype == "float32" else 2e-3
    assert len(result.files) == 7, "two layers of means, residues and BOS, and the logits"
    for path in result.files:
        with EmbeddingReader(path) as reader:
            layer, pooling = int(reader.attributes["layer"]), reader.attributes["pooling"]
            assert list(reader) == [f"p{number}" for number in range(40)]
            for number, protein in enumerate(proteins):
                tokens_T = tokenize([protein])[0]
                rows_TD = encoder.encode(tokens_T, [len(tokens_T)], [layer])[layer]
                expected = {
                    "mean": lambda rows=rows_TD: rows[1:-1].mean(0),
                    "none": lambda rows=rows_TD: rows[1:-1],
                    "bos": lambda rows=rows_TD: rows[0],
                    "logits": lambda rows=rows_TD: encoder.logits(rows[1:-1]),
                }[pooling]()
                found = torch.from_numpy(np.asarray(reader[f"p{number}"]))
                assert relative_difference(found, expected) < bound, (path.name, number)


@pytest.fixture(scope="module")
def on_cpu(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("cpu")
    train_in_process([run(out_dir, dataset, "cpu")])
    return out_dir


@on_devices()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pretraining_has_the_losses_of_the_cpu(device, precision, dataset, on_cpu, tmp_path) -> None:
    train_in_process([run(tmp_path, dataset, device, precision=precision)])
    for name in ("train_loss", "val_loss"):
        assert curve(tmp_path, name) == pytest.approx(curve(on_cpu, name), rel=PRECISIONS[precision])
    assert curve(tmp_path, "tokens") == curve(on_cpu, "tokens")
    assert curve(tmp_path, "lr") == curve(on_cpu, "lr")


@pytest.mark.parametrize("device", [CUDA])
def test_pretraining_with_compiled_layers(device, dataset, on_cpu, tmp_path) -> None:
    train_in_process([run(tmp_path, dataset, device, compile=True)])
    assert curve(tmp_path, "train_loss") == pytest.approx(curve(on_cpu, "train_loss"), rel=PRECISIONS["32-true"])


@on_devices()
def test_a_resumed_run_ends_like_the_uninterrupted_one(device, dataset, tmp_path) -> None:
    """As if killed after update 3: on the CPU bit for bit, on a GPU to the rounding of its atomic sums."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_in_process([run(whole, dataset, device)])
    (middle,) = (whole / "checkpoints").glob("step=0000003-*")
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(middle, resumed / "checkpoints" / "last.safetensors")
    shutil.copy(whole / "metrics.csv", resumed)
    train_in_process([run(resumed, dataset, device)])
    rel = 0 if device == "cpu" else 1e-5
    assert curve(resumed, "train_loss") == pytest.approx(curve(whole, "train_loss"), rel=rel, abs=0)
    found, expected = (read_checkpoint(each / "checkpoints" / "last.safetensors")[0] for each in (resumed, whole))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=100 * rel, atol=rel)


@on_devices()
def test_fine_tuning_in_bf16_keeps_its_weights_in_float32(device, tasks, tiny, tmp_path) -> None:
    """The moments of the head's inputs are computed in bfloat16 first, by an encoder of its own."""
    config = FinetuneConfig(
        task="protein_value", data_dir=tasks, model=str(tiny), out_dir=tmp_path, mode="frozen", accelerator=device,
        precision="bf16-mixed", standardize=True, max_steps=2, val_check_interval=2, resamples=100, benchmark=False,
    )  # fmt: skip
    finetune(config)
    held = read_checkpoint(tmp_path / "finetuned.safetensors", "model.")[0]
    for name, tensor in read_checkpoint(tiny, "model.")[0].items():
        assert torch.equal(held[name], tensor), name


@on_devices()
@pytest.mark.parametrize(
    ("mode", "task"), [("full", "protein_class"), ("lora", "residue_class"), ("frozen", "protein_value")]
)
def test_fine_tuning_has_the_losses_of_the_cpu(device, mode, task, tasks, tiny, tmp_path) -> None:
    losses = {}
    for name in ("cpu", device):
        out_dir = tmp_path / f"{len(losses)}"
        config = FinetuneConfig(
            task=task, data_dir=tasks, model=str(tiny), out_dir=out_dir, mode=mode, accelerator=name, max_steps=STEPS,
            val_check_interval=3, lr=1e-3, dropout=0.0, log_every_n_steps=1, resamples=100, benchmark=False,
        )  # fmt: skip
        result = finetune(config)
        losses[name] = curve(out_dir, "train_loss"), curve(out_dir, "val_loss")
        with np.load(out_dir / "predictions.npz") as stored:
            losses[name, "test"] = stored[f"predicted/{result['name']}"]
    assert len(set(losses[device][0])) > 1, "the losses change, so the comparison is meaningful"
    for found, expected in zip(losses[device], losses["cpu"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    if task == "protein_value":
        np.testing.assert_allclose(losses[device, "test"], losses["cpu", "test"], rtol=1e-3, atol=1e-4)


@on_devices()
@pytest.mark.parametrize(
    ("level", "target", "probe"),
    [
        ("protein", "value", "fnn"),
        ("residue", "class", "cnn"),
        ("protein", "class", "light_attention"),
        ("protein", "value", "attention"),
    ],
)
def test_probes_of_all_seeds_in_one_pass_equal_each_seed_alone(device, level, target, probe) -> None:
    """Five heads in one pass on the device; each has the losses of that seed alone on the CPU."""
    features, data = make_planted_task(level, target, num_proteins=60, by_residue=reads_residues(probe))
    targets = ProbeTargets.from_task(data)
    config = ProbeConfig(probe, epochs=4, batch_size=16, learning_rate=5e-3, dropout=0.0)
    seeds = (0, 1, 2, 3, 4)
    together = fit_probe(features, targets, config, seeds, device)
    losses_ES = np.array(together.history["validation_loss"])
    assert losses_ES.shape == (4, 5)
    assert len(set(losses_ES[-1])) == 5, "the seeds differ"
    for place, seed in enumerate(seeds):
        alone = fit_probe(features, targets, config, (seed,), "cpu")
        np.testing.assert_allclose(losses_ES[:, place], np.array(alone.history["validation_loss"])[:, 0], rtol=1e-3)


@on_devices()
@pytest.mark.parametrize("target", ["value", "class"])
def test_fnns_of_all_folds_in_one_pass_equal_each_fold_alone(device: str, target: str) -> None:
    """With dropout, whose random numbers are those of the device."""
    features, data = make_planted_task("protein", target, num_proteins=60)
    targets = ProbeTargets.from_task(data)
    every = np.arange(60)
    folds = [
        replace(targets, proteins={"train": every[every % 4 > 1], "validation": every[every % 4 == 1 - fold],
                                   "test": every[every % 4 == fold]})
        for fold in (0, 1)
    ]  # fmt: skip
    config = ProbeConfig("fnn", epochs=4, batch_size=16)
    together = fit_probe_folds(features, folds, config, (0, 1), device)
    for found, fold in zip(together, folds, strict=True):
        alone = fit_probe(features, fold, config, (0, 1), device)
        assert found.selected == alone.selected
        np.testing.assert_allclose(found.test_SM, alone.test_SM, rtol=1e-3, atol=1e-4)


@TWO_GPUS
@pytest.mark.cuda
@pytest.mark.parametrize(
    "layout",
    [{}, {"strategy": "fsdp2"}, {"tensor_model_parallel_size": 2}],
    ids=["ddp", "fsdp2", "tensor parallel"],
)
def test_two_gpus_have_the_losses_of_the_cpu(layout, dataset, on_cpu, tmp_path) -> None:
    """On the CPU, tests/training/test_layouts.py compares the layouts."""
    train_with_torchrun(2, [run(tmp_path, dataset, "cuda", devices=2, **layout)])
    for name in ("train_loss", "val_loss"):
        assert curve(tmp_path, name) == pytest.approx(curve(on_cpu, name), rel=PRECISIONS["32-true"])
