"""Exhausted memory is one error in every stage: it names what helps, and the next run resumes or starts anew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import SHAPE, write_tasks, write_tiny_model

import esm2kit
from esm2kit.benchmarking import hold_out
from esm2kit.core.errors import InputError
from esm2kit.core.hardware import explain_out_of_memory, is_out_of_memory
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.finetuning import model_file
from esm2kit.finetuning.module import LabelTrainer
from esm2kit.finetuning.predict import _explain_memory
from esm2kit.finetuning.predictor import load_predictor
from esm2kit.models.encoder import Encoder
from esm2kit.models.memory import InferenceSettings, estimate_inference, format_gib, list_inference_remedies
from esm2kit.pretraining.pretrain import MaskedLM
from esm2kit.structure.attention import ContactModel

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 b"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError(CPU_ERROR)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny.safetensors")
    write_tasks(tmp_path / "tasks")
    generator = np.random.default_rng(0)
    with open(tmp_path / "in.fasta", "w", encoding="utf-8") as file:
        for number in range(40):
            file.write(f">p{number}\n{''.join(generator.choice(list('ACDEFGHIKL'), 30))}\n")
    return tmp_path


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException) -> None:
    """Raise an error at one call of a function, counted from 1, and at the calls after it."""
    function, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) >= call:
            raise error
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", [*ERRORS, MemoryError(), RuntimeError("MPS backend out of memory (allocated 9 GB)")])
def test_all_forms_of_the_error_are_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)
    values = {"action": "embedding", "remedies": ["--a 1", "--b 2"]}
    context = explain_out_of_memory("embedding", lambda: values["remedies"])
    with refused("memory.exhausted", **values) as caught, context:
        raise error
    assert str(caught.value) == "the memory is exhausted while embedding. Use --a 1 or --b 2."


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), explain_out_of_memory("embedding", lambda: ["nothing"]):
        raise RuntimeError("shape mismatch")
    with refused("some.code"), explain_out_of_memory("embedding", lambda: ["nothing"]):
        raise InputError("out of memory", code="some.code")


def test_the_tensors_of_the_failed_operation_are_released() -> None:
    import weakref

    seen = []

    def allocate() -> None:
        tensor = torch.zeros(10)
        seen.append(weakref.ref(tensor))
        raise RuntimeError(CPU_ERROR)

    with refused("memory.exhausted") as caught, explain_out_of_memory("embedding", lambda: ["--a 1"]):
        allocate()
    assert caught.value.__context__ is not None
    assert seen[0]() is None


def test_remedies_of_inference_name_the_memory_that_they_need() -> None:
    settings = InferenceSettings(tokens=32_768, device="cuda")
    first, second, third = list_inference_remedies(
        SHAPE, settings, ("batch_tokens", "precision", "device"), " --restart"
    )
    halved = InferenceSettings(tokens=16_384, device="cuda")
    assert first == f"--batch_tokens 16384 --restart (about {format_gib(estimate_inference(SHAPE, halved).total)})"
    assert second.startswith("--precision bfloat16 (about ")
    assert third == "--device cpu"


@pytest.mark.parametrize("error", ERRORS)
def test_embed(folder: Path, error: BaseException, monkeypatch) -> None:
    def settings(name: str, **options) -> esm2kit.EmbedConfig:
        options = {"model": str(folder / "tiny.safetensors"), "workers": 1, "batch_tokens": 128, **options}
        return esm2kit.EmbedConfig(folder / "in.fasta", folder / name, **options)

    expected = esm2kit.embed(settings("whole")).embeddings
    with monkeypatch.context() as patch:
        fail_at(patch, Encoder, "encode", 1, error)
        with refused("memory.exhausted") as caught:
            esm2kit.embed(settings("out"))
    assert caught.value.values["remedies"][0].startswith("--batch_tokens 64 (about")
    assert not list((folder / "out").glob("*.h5"))
    found = esm2kit.embed(settings("out", batch_tokens=64)).embeddings  # nothing was computed, so nothing is refused
    with EmbeddingReader(found) as first, EmbeddingReader(expected) as second:
        for number in range(40):
            np.testing.assert_allclose(first[f"p{number}"], second[f"p{number}"], atol=1e-5)
    with monkeypatch.context() as patch:
        fail_at(patch, Encoder, "encode", 6, error)
        with refused("memory.exhausted") as caught:
            esm2kit.embed(settings("later"))
    assert caught.value.values["remedies"][0].startswith("--batch_tokens 64 --restart (about")
    with refused("embed.run-exists", differing=["batch_tokens"]):
        esm2kit.embed(settings("later", batch_tokens=64))
    resumed = esm2kit.embed(settings("later")).embeddings
    with EmbeddingReader(resumed) as first, EmbeddingReader(expected) as second:
        for number in range(40):
            np.testing.assert_array_equal(first[f"p{number}"], second[f"p{number}"])


def test_score(folder: Path, monkeypatch) -> None:
    def settings(**options) -> esm2kit.ScoreConfig:
        options = {"model": str(folder / "tiny.safetensors"), "out_dir": folder / "out", "workers": 1, **options}
        return esm2kit.ScoreConfig(folder / "in.fasta", **options)

    with monkeypatch.context() as patch:
        fail_at(patch, Encoder, "logits", 1, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.score(settings(batch_tokens=256))
    assert caught.value.values["remedies"][0].startswith("--batch_tokens 128 (about")
    assert not list((folder / "out").glob("*.tsv"))
    assert esm2kit.score(settings(batch_tokens=128)).num_proteins == 40


def fine_tune(folder: Path, name: str, **options) -> esm2kit.FinetuneConfig:
    return esm2kit.FinetuneConfig(
        task="protein_value", data_dir=folder / "tasks", model=str(folder / "tiny.safetensors"),
        out_dir=folder / name, max_steps=6, global_batch_size=8, val_check_interval=2, benchmark=False, resamples=100,
        accelerator="cpu", log_every_n_steps=1, **options,
    )  # fmt: skip


def test_predict_and_finetune(folder: Path, monkeypatch) -> None:
    whole = esm2kit.finetune(fine_tune(folder, "whole"))
    with monkeypatch.context() as patch:
        fail_at(patch, LabelTrainer, "loss_sum", 4, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.finetune(fine_tune(folder, "cut"))
    first, second, third = caught.value.values["remedies"]
    assert first.startswith("--micro_batch_size 4 --accumulate_grad_batches 2 (about")
    assert second.startswith("--activation_checkpointing true (about")
    assert third.startswith("--mode frozen (about")
    assert not (folder / "cut" / "finetuned.safetensors").exists()
    # the remedy divides the same updates, and the run resumes from the checkpoint after update 2
    options = {"micro_batch_size": 4, "accumulate_grad_batches": 2, "activation_checkpointing": True}
    resumed = esm2kit.finetune(fine_tune(folder, "cut", **options))
    assert resumed["runs"][0]["val_loss"] == pytest.approx(whole["runs"][0]["val_loss"], rel=1e-4)
    with monkeypatch.context() as patch:
        fail_at(patch, Encoder, "encode", 1, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.predict(esm2kit.PredictConfig(folder / "whole", folder / "in.fasta", folder / "p.tsv"))
    assert caught.value.values["remedies"][0].startswith("--batch_tokens 512 (about")
    assert any("--layer_by_layer true" in each for each in caught.value.values["remedies"])
    assert not (folder / "p.tsv").exists()
    with monkeypatch.context() as patch:
        fail_at(patch, model_file, "Encoder", 1, ERRORS[0])
        with refused("memory.exhausted", remedies=["--layer_by_layer true", "--device cpu", "a smaller model"]):
            esm2kit.predict(esm2kit.PredictConfig(folder / "whole", folder / "in.fasta", folder / "p.tsv"))
    # the memory of a GPU, although the hidden states of a model that is read layer by layer are on the CPU
    settings = esm2kit.PredictConfig(folder / "whole", folder / "in.fasta", folder / "p.tsv", layer_by_layer=True)
    model = load_predictor(folder / "whole", layer_by_layer=True)
    model.encoder.compute_device = torch.device("cuda")
    action = "computing batches of 32,768 tokens (about 0.1 GiB)"
    with refused("memory.exhausted", action=action) as caught, _explain_memory(settings, model):
        raise ERRORS[0]
    assert not any("--layer_by_layer" in each for each in caught.value.values["remedies"])


def test_finetune_outside_the_training_loop(folder: Path, monkeypatch) -> None:
    """The moments of the head's inputs are computed before the first update, and test scores after the last one."""
    whole = esm2kit.finetune(fine_tune(folder, "whole"))
    calls = []
    with monkeypatch.context() as patch:
        plain = Encoder.encode
        patch.setattr(Encoder, "encode", lambda *a, **k: calls.append(len(a[1])) or plain(*a, **k))
        esm2kit.finetune(fine_tune(folder, "counted", tokens_per_validation_batch=256))
    assert max(calls) <= 256  # the option bounds the batches of both
    for name, call in (("moments", 1), ("scores", len(calls))):
        with monkeypatch.context() as patch:
            fail_at(patch, Encoder, "encode", call, ERRORS[0])
            with refused("memory.exhausted") as caught:
                esm2kit.finetune(fine_tune(folder, name, tokens_per_validation_batch=256))
        assert caught.value.values["remedies"][0].startswith("--tokens_per_validation_batch 128 (about")
        assert bool(list((folder / name).rglob("last*.safetensors"))) == (name == "scores")
        # the remedy does not change the run, so training is not repeated
        resumed = esm2kit.finetune(fine_tune(folder, name, tokens_per_validation_batch=128))
        assert resumed["runs"][0]["val_loss"] == pytest.approx(whole["runs"][0]["val_loss"], rel=1e-4)
        for metric, score in whole["test"].items():
            assert resumed["test"][metric]["value"] == pytest.approx(score["value"], abs=1e-3)


def test_contacts(folder: Path, monkeypatch) -> None:
    def settings(**options) -> esm2kit.ContactsConfig:
        options = {"model": str(folder / "tiny.safetensors"), "values": "coupling", "pictures": 0, **options}
        return esm2kit.ContactsConfig(folder / "in.fasta", out_dir=folder / "contacts", device="cpu", **options)

    with monkeypatch.context() as patch:
        fail_at(patch, ContactModel, "predict", 3, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.predict_contacts(settings(batch_tokens=128))
    assert caught.value.values["action"] == "computing the contacts of 4 proteins of up to 30 residues together"
    assert caught.value.values["remedies"] == ["--batch_tokens 64 --restart", "a smaller --model with --restart"]
    with refused("contacts.run-exists", differing=["batch_tokens"]):
        esm2kit.predict_contacts(settings(batch_tokens=64))
    halved = esm2kit.predict_contacts(settings(batch_tokens=64, restart=True))
    with esm2kit.ContactReader(halved.contacts) as reader:
        assert len(reader) == 40
    # a protein that is a batch of its own cannot be divided
    with monkeypatch.context() as patch:
        fail_at(patch, ContactModel, "predict", 1, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.predict_contacts(settings(batch_tokens=16, restart=True))
    assert caught.value.values["remedies"][0].startswith("a FASTA without protein 'p")


def test_benchmark(folder: Path, monkeypatch) -> None:
    config = esm2kit.BenchmarkConfig(
        task="protein_value", data_dir=folder / "tasks", model=str(folder / "tiny.safetensors"), untrained=False,
        out_dir=folder / "out", baselines=[], resamples=100, seeds=[0], device="cpu",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        fail_at(patch, Encoder, "encode", 1, ERRORS[0])
        with refused("memory.exhausted"):
            esm2kit.benchmark(config)
    with monkeypatch.context() as patch:
        fail_at(patch, hold_out, "fit_probe", 1, ERRORS[0])
        with refused("memory.exhausted") as caught:
            esm2kit.benchmark(config)
    assert any(each.startswith("--limit ") for each in caught.value.values["remedies"])
    assert not (folder / "out" / "report.json").exists()
    assert esm2kit.benchmark(config).rows


def test_pretrain(folder: Path, monkeypatch) -> None:
    dataset = folder / "data"
    esm2kit.preprocess(
        esm2kit.PreprocessConfig(folder / "in.fasta", out_dir=dataset, val_size=0.1, leakage_identity=0.0)
    )

    def settings(name: str, **options) -> esm2kit.PretrainConfig:
        shape = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4}
        return esm2kit.PretrainConfig(
            dataset, out_dir=folder / name, max_steps=6, global_batch_size=8, val_check_interval=2, accelerator="cpu",
            log_every_n_steps=1, **shape, **options,
        )  # fmt: skip

    whole = esm2kit.pretrain(settings("whole"))
    with monkeypatch.context() as patch:
        fail_at(patch, MaskedLM, "training_flops", 10, ERRORS[0])  # in update 5, two micro-batches per update
        with refused("memory.exhausted") as caught:
            esm2kit.pretrain(settings("cut", micro_batch_tokens=192))
    assert caught.value.values["remedies"][0].startswith("--micro_batch_tokens 64 (about")
    assert not (folder / "cut" / "pretrain.json").exists()
    resumed = esm2kit.pretrain(settings("cut", micro_batch_tokens=64))
    assert resumed["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
