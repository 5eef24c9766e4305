"""Predictions with an encoder that is read layer by layer are those of the complete encoder."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.saved_probe import load_probe
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.predict import predict
from esm2kit.models import layerwise
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.sequences.alphabet import STANDARD_RESIDUES

MODES = {
    "lora": {"task": "residue_class", "mode": "lora", "lora_biases": True, "head": "cnn"},
    "frozen": {"task": "protein_class", "mode": "frozen", "head": "fnn"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    write_tiny_model(folder / "tiny.safetensors")
    write_tiny_model(folder / "other.safetensors", seed=5)
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module", params=MODES)
def run(folder: Path, request: pytest.FixtureRequest) -> Path:
    """A fine-tuned model of each mode, with windows of 30 tokens."""
    common = {"data_dir": folder / "tasks", "model": str(folder / "tiny.safetensors"), "accelerator": "cpu"}
    common |= {"benchmark": False, "resamples": 100, "max_steps": 4, "lr": 5e-2, "max_tokens": 30}
    finetune(FinetuneConfig(out_dir=folder / request.param, **common, **MODES[request.param]))
    return folder / request.param


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(list(STANDARD_RESIDUES), size)) for size in (5, 70, 28, 12, 100, 3, 44)]


def assert_equal_outputs(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for values, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, reference, atol=2e-6, rtol=2e-6)


def test_a_fine_tuned_model_predicts_the_same(run: Path, sequences: list[str]) -> None:
    whole, layers = (load_finetuned(run, layer_by_layer=choice) for choice in (False, True))
    assert isinstance(layers.encoder, LayerwiseEncoder)
    assert layers.esm2 is None
    assert_equal_outputs(layers.outputs(sequences), whole.outputs(sequences))
    assert layers.metadata == whole.metadata


@pytest.mark.parametrize("count", [7, 1])
def test_an_encoder_divided_over_two_devices_predicts_the_same(
    run: Path, sequences: list[str], tmp_path: Path, caplog, count: int
) -> None:
    """The second process has fewer windows, or no protein at all, and makes idle passes."""
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences[:count])), encoding="utf-8")
    config = PredictConfig(run, fasta, tmp_path / "one.h5", device="cpu", plot=False, batch_tokens=50)
    one = predict(config)
    caplog.set_level("INFO", logger="esm2kit")
    two = predict(dataclasses.replace(config, out=tmp_path / "two.h5", devices=2, shard=True))
    assert "tiny is divided over 2 devices" in caplog.text
    with h5py.File(one["out"]) as expected, h5py.File(two["out"]) as found:
        assert len(found) == len(expected) == count
        for name, values in expected.items():
            np.testing.assert_allclose(found[name][()], values[()], atol=1e-6)
    with refused("shard.layer-by-layer"):
        dataclasses.replace(config, shard=True, layer_by_layer=True)


def test_a_group_is_a_single_pass_over_the_layers(run: Path, sequences: list[str], monkeypatch) -> None:
    model, passes = load_finetuned(run, layer_by_layer=True), []
    encode = LayerwiseEncoder.encode
    monkeypatch.setattr(LayerwiseEncoder, "encode", lambda *given: passes.append(len(given[1])) or encode(*given))
    model.outputs(sequences * 20)
    assert len(passes) == 1
    assert passes[0] > 20 * sum(map(len, sequences))


def test_a_model_that_does_not_fit_predicts_layer_by_layer(
    run: Path, sequences: list[str], tmp_path: Path, monkeypatch, caplog
) -> None:
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)), encoding="utf-8")
    config = PredictConfig(run, fasta, tmp_path / "one.tsv", device="cpu", plot=False, batch_tokens=50)
    one = predict(config)
    monkeypatch.setattr(layerwise, "read_free_memory", lambda device: 1000)
    caplog.set_level("INFO", logger="esm2kit")
    two = predict(dataclasses.replace(config, out=tmp_path / "two.tsv"))
    assert "runs layer by layer" in caplog.text
    rows, others = (Path(found["out"]).read_text(encoding="utf-8").splitlines() for found in (one, two))
    assert [row.split("\t")[:2] for row in rows] == [row.split("\t")[:2] for row in others]
    for row, other in zip(rows[1:], others[1:], strict=True):
        columns = slice(-len(one["labels"]), None)
        numbers, references = (np.array(text.split("\t")[columns], float) for text in (row, other))
        np.testing.assert_allclose(numbers, references, atol=1e-5)


def test_adapters_on_another_base_are_refused(folder: Path, run: Path) -> None:
    if run.name == "lora":
        with refused("lora.other-base"):
            load_finetuned(run, base=str(folder / "other.safetensors"), layer_by_layer=True)
    else:
        with refused("finetuned.base-unused"):
            load_finetuned(run, base=str(folder / "other.safetensors"), layer_by_layer=True)


def test_a_saved_probe_predicts_the_same(folder: Path, sequences: list[str]) -> None:
    out_dir = folder / "benchmark"
    benchmark(
        BenchmarkConfig(
            task="protein_class",
            data_dir=folder / "tasks",
            model=str(folder / "tiny.safetensors"),
            out_dir=out_dir,
            seeds=[0],
            resamples=100,
            untrained=False,
            baselines=[],
            device="cpu",
        )
    )
    path = next(path for path in sorted((out_dir / "probes").glob("*.safetensors")) if "tiny" in path.name)
    whole, layers = (load_probe(path, layer_by_layer=choice) for choice in (False, True))
    assert isinstance(layers.encoder, LayerwiseEncoder)
    assert_equal_outputs(layers.outputs(sequences), whole.outputs(sequences))
    with refused("probe.other-encoder"):
        load_probe(path, base=str(folder / "other.safetensors"), layer_by_layer=True)
