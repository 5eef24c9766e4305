"""The public API names a wrong type, or a wrong file, in one line, and takes a path as str and as Path alike."""

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import SHAPE, write_tasks, write_tiny_model

import esm2kit
from esm2kit import (
    BenchmarkConfig,
    ClusterIndex,
    EmbedConfig,
    EmbeddingReader,
    Encoder,
    ESM2Config,
    FinetuneConfig,
    PredictConfig,
    PretrainConfig,
    Report,
    SequenceStore,
    TrainingSet,
    embed,
    fit_probe,
    guess_residues,
    load_finetuned,
    load_model,
    load_task,
    lr_at,
    pair_map,
    preprocess,
    read_fasta,
    residue_odds,
)
from esm2kit.core.errors import InputError
from esm2kit.models.esm2 import ESM2
from esm2kit.models.export import export
from esm2kit.notebook.runs.run import RunsConfig, runs

STAGES = ("preprocess", "pretrain", "embed", "benchmark", "compare", "finetune", "predict", "export")
READERS = {
    "load_model": load_model,
    "load_task": load_task,
    "load_finetuned": load_finetuned,
    "read_fasta": lambda path: list(read_fasta(path)),
    "EmbeddingReader": EmbeddingReader,
    "SequenceStore": SequenceStore.open,
    "ClusterIndex": ClusterIndex.open,
    "TrainingSet": TrainingSet.open,
    "Report": Report.read,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    write_tiny_model(folder / "m.safetensors")
    write_tasks(folder / "tasks", 24)
    (folder / "a.fasta").write_text(">a\nMKVLAGSTRE\n>b\nMKVAAGSTRW\n>c\nMKVLGGSTRE\n", encoding="utf-8")
    preprocess(esm2kit.PreprocessConfig(folder / "a.fasta", folder / "d", val_size=1, leakage_identity=0))
    embed(EmbedConfig(folder / "a.fasta", folder / "e", model=str(folder / "m.safetensors"), device="cpu"))
    return folder


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("value", "found"), [(None, "NoneType"), (3, "int"), (["a"], "list")])
def test_a_path_of_another_type_is_named(name: str, value: Any, found: str) -> None:
    with refused("argument.type", found=found) as caught:
        READERS[name](value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [None, "a.fasta", ESM2Config(1, 16, 2)])
def test_a_stage_names_the_configuration_that_it_needs(stage: str, value: Any) -> None:
    with refused("argument.type", name="config", found=type(value).__name__) as caught:
        getattr(esm2kit, stage)(value)
    assert f"config must be of type {stage.capitalize()}Config" in str(caught.value)


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (lambda: EmbedConfig(None, "out"), "fasta", "fasta must be a path or a list of paths, found None"),
        (
            lambda: EmbedConfig("a", "o", repr_layers=1),
            "repr_layers",
            "repr_layers must be a list of integers, found 1",
        ),
        (lambda: EmbedConfig("a", "o", batch_tokens="many"), "batch_tokens", "an integer or None, found 'many' (str)"),
        (lambda: EmbedConfig("a", "o", batch_tokens=1.5), "batch_tokens", "found 1.5 (float)"),
        (lambda: EmbedConfig("a", "o", batch_tokens=True), "batch_tokens", "found True (bool)"),
        (
            lambda: EmbedConfig("a", "o", per_protein=1),
            "per_protein",
            "per_protein must be True or False, found 1 (int)",
        ),
        (lambda: EmbedConfig("a", "o", bos=np.array([True])), "bos", "bos must be True or False, found a ndarray"),
        (lambda: BenchmarkConfig(None), "task", "task must be text, found None"),
        (lambda: PredictConfig(None, "a", "b"), "model", "model must be a path, found None"),
        (lambda: FinetuneConfig("t", lr="high", out_dir="o"), "lr", "lr must be a number or None, found 'high' (str)"),
        (lambda: ESM2Config("a", 16, 2), "num_layers", "num_layers must be an integer, found 'a' (str)"),
        (lambda: ESM2(3), "config", "config must be of type ESM2Config, found 3 (int)"),
        (lambda: Encoder("esm2"), "model", "model must be of type ESM2, found 'esm2' (str); load one with load_model"),
        (lambda: pair_map(None, "MKV"), "model", "model must be of type ESM2, found None"),
        (lambda: guess_residues("esm2", ["MKV"], np.zeros(33)), "model", "found 'esm2' (str)"),
        (lambda: residue_odds("esm2", "MKV", np.zeros(33)), "model", "found 'esm2' (str)"),
        (lambda: lr_at(0, 3), "config", "config must be of type PretrainConfig, found 3 (int)"),
        (lambda: fit_probe(None, None, None), "features", "features must be of type Features, found None"),
        (lambda: load_model("esm2_t6_8M_UR50D", "x"), "untrained_seed", "an integer, found 'x' (str)"),
        (lambda: load_task("t", data_dir=3), "path", "path must be a path, found 3 (int)"),
    ],
)
def test_a_value_of_another_type_is_named(build: Any, name: str, message: str) -> None:
    with refused("argument.type", name=name) as caught:
        build()
    assert message in str(caught.value)


def test_text_paths_tuples_and_numpy_numbers_are_accepted(work: Path) -> None:
    config = EmbedConfig(work / "a.fasta", str(work), repr_layers=(-1,), batch_tokens=np.int64(64))
    assert (config.repr_layers, config.batch_tokens) == ((-1,), 64)
    assert PretrainConfig(data="d", out_dir=Path("o"), model="custom", lr=1).lr == 1
    assert list(BenchmarkConfig("t", seeds=range(3)).seeds) == [0, 1, 2]
    assert not EmbedConfig("a", "o", bos=True, per_protein=np.False_).per_protein


def test_str_and_path_give_the_same(work: Path) -> None:
    for kind in (str, Path):
        assert load_model(kind(work / "m.safetensors"))[0].config == SHAPE
        assert load_task("protein_class", None, kind(work / "tasks")).sizes["test"] == 4
        assert load_task(kind(work / "tasks" / "protein_class")).sizes["test"] == 4
        assert [record.id for record in read_fasta(kind(work / "a.fasta"))] == ["a", "b", "c"]
        assert len(TrainingSet.open(kind(work / "d")).train) == 2
        assert len(SequenceStore.open(kind(work / "d" / "valid.arrow"))) == 1
        with EmbeddingReader(kind(work / "e" / "a_embeddings.h5")) as reader:
            assert reader.ids == ("a", "b", "c")
        out = work / f"{kind.__name__}"
        result = embed(EmbedConfig(kind(work / "a.fasta"), kind(out), model=kind(work / "m.safetensors"), device="cpu"))
        assert result.num_proteins == 3


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.fasta", b">a\nMKV\n", "a FASTA file"),
        ("b.csv", b"sequence,target,set\nMKV,1.5,train\n", "a text file"),
        ("c.json", b'{"model": 1}', "a JSON file"),
        ("d.fasta.gz", gzip.compress(b">a\nMKV\n", mtime=0), "a gzip file"),
        ("e.pt", b">a\nMKV\n", "a FASTA file"),
        ("f.npy", b"\x93NUMPY\x01\x00", "a NumPy array"),
        ("g.txt", "größe".encode() * 1000, "a text file"),  # 4,096 bytes end within a letter
    ],
)
def test_a_file_of_another_kind_is_not_called_a_damaged_model(
    name: str, content: bytes, found: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with refused("model.not-weights", found=found):
        load_model(tmp_path / name)


def test_datasets_and_embeddings_are_not_called_damaged_models(work: Path, tmp_path: Path) -> None:
    with refused("model.not-weights", found="an HDF5 file, such as embeddings"):
        load_model(work / "e" / "a_embeddings.h5")
    with refused("model.not-weights", found="an Arrow file, such as a dataset's sequences"):
        load_model(work / "d" / "train.arrow")
    whole = (work / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with refused("checkpoint.damaged"):
        load_model(tmp_path / "cut.safetensors")


def test_a_folder_of_embeddings_is_called_a_folder(work: Path, tmp_path: Path) -> None:
    with refused("embeddings.folder", found=("a_embeddings.h5",)) as caught:
        EmbeddingReader(work / "e")
    assert "is a folder, which contains a_embeddings.h5. Pass one of its files." in str(caught.value)
    with refused("embeddings.folder", found=()):
        EmbeddingReader(tmp_path)
    with refused("embeddings.absent"):
        EmbeddingReader(tmp_path / "none.h5")


def test_runs_of_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with refused("run.no-folder", path=tmp_path / "nowhere" / "papermill_runs"):
        runs(RunsConfig(root=tmp_path / "nowhere"))
    (tmp_path / "papermill_runs").mkdir()
    assert runs(RunsConfig(root=tmp_path)).startswith("no runs in ")


def test_a_shape_is_described_in_words() -> None:
    assert str(ESM2Config(2, 32, 4)) == "2 layers, embed_dim 32, 4 attention heads"
    eps = dataclasses.replace(SHAPE, layer_norm_eps=1e-12)
    assert str(eps) == "2 layers, embed_dim 32, 4 attention heads, layer_norm_eps 1e-12"
    with pytest.raises(InputError, match="must be at least 1, found 0, 32 and 4"):
        ESM2Config(0, 32, 4)


def test_an_untrained_model_needs_only_its_configuration(work: Path) -> None:
    export(esm2kit.ExportConfig(work / "m.safetensors", work / "hf"))
    trained, complete = load_model(work / "hf", untrained_seed=3)
    (work / "hf" / "model.safetensors").unlink()
    for source in (work / "hf", work / "hf" / "config.json"):
        model, found = load_model(source, untrained_seed=3)
        assert found.record() == complete.record()
        for name, tensor in ESM2.initialised(SHAPE, 3).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
            assert torch.equal(trained.state_dict()[name], tensor)
    with refused("checkpoint.no-weights"):
        load_model(work / "hf")
