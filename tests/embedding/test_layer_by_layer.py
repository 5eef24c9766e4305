"""Embedding layer by layer gives the files of an ordinary run, also after an interrupt, and of long proteins."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from support.embedding_fixtures import assert_same_files, every_output, random_proteins, write_fasta
from support.finetune_fixtures import write_tiny_model

from esm2kit.embedding import run as embed_run
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.plan import Journal
from esm2kit.models import layerwise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each pass over the layers, in groups of 300 tokens."""
    monkeypatch.setitem(layerwise.GROUP_TOKENS, "cpu", 300)
    encode, sizes = layerwise.LayerwiseEncoder.encode, []

    def count(encoder: layerwise.LayerwiseEncoder, tokens_N, *more):
        sizes.append(len(tokens_N))
        return encode(encoder, tokens_N, *more)

    monkeypatch.setattr(layerwise.LayerwiseEncoder, "encode", count)
    return sizes


def test_the_files_are_those_of_an_ordinary_run(model: Path, tmp_path: Path, calls: list[int]) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([5, 300, 1, 40, 40, 700, 17] + [30] * 40))
    config = every_output(fasta, tmp_path / "one", model)
    one = embed(config)
    assert not calls
    two = embed(dataclasses.replace(config, out_dir=tmp_path / "two", layer_by_layer=True))
    assert len(one.files) == 7
    assert_same_files(two.files, one.files, atol=1e-6)
    windows = 120 + 2
    assert len(calls) < 15, "batches share a pass, and so do the windows of long proteins"
    assert max(calls) < 300 + 8 * windows
    assert embed(dataclasses.replace(config, layer_by_layer=True)).files == one.files, "the setting changes no file"


@pytest.mark.parametrize("resumes_with", [True, False])
def test_an_interrupted_run_resumes(
    model: Path, tmp_path: Path, calls: list[int], monkeypatch, resumes_with: bool
) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([28] * 200))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=60, device="cpu", layer_by_layer=True)
    whole = embed(dataclasses.replace(config, out_dir=tmp_path / "whole", layer_by_layer=False))
    write_all, written = embed_run._write_all, []

    def interrupt(handle: int, vector: np.ndarray, start: int) -> None:
        if len(written) == 60:
            raise KeyboardInterrupt
        written.append(start)
        write_all(handle, vector, start)

    with monkeypatch.context() as patch:
        patch.setattr(embed_run, "_write_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    done = Journal(tmp_path / "out" / "a_embed.part").read_done()
    assert len(done) == 30, "two proteins per batch"
    calls.clear()
    again = embed(dataclasses.replace(config, layer_by_layer=resumes_with))
    assert_same_files(again.files, whole.files)
    assert sum(calls) == (140 * 30 if resumes_with else 0), "finished batches are not embedded again"


def test_an_interrupt_does_not_wait_for_the_pass(model: Path, tmp_path: Path, monkeypatch) -> None:
    """A pass over the layers of a large model can take hours."""
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([28] * 400))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=60, device="cpu", layer_by_layer=True)
    config = dataclasses.replace(config, workers=1)
    monkeypatch.setitem(layerwise.GROUP_TOKENS, "cpu", 3000)
    run_layer, started = layerwise.LayerwiseEncoder._run_layer, []

    def run_slowly(*arguments) -> None:
        started.append(arguments)
        time.sleep(0.2)
        run_layer(*arguments)

    def interrupt(*arguments) -> None:
        monkeypatch.setattr(layerwise.LayerwiseEncoder, "_run_layer", run_slowly)
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(embed_run, "_write_all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed(config)
    assert 0 < len(started) < 20, "of 100: 50 batches and 2 layers"


def test_two_devices_embed_layer_by_layer(model: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 60))
    config = EmbedConfig(fasta, tmp_path / "one", model=str(model), batch_tokens=60, device="cpu")
    two = dataclasses.replace(config, out_dir=tmp_path / "two", devices=2, layer_by_layer=True)
    assert_same_files(embed(two).files, embed(config).files)
