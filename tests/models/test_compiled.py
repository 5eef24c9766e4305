"""Compiled layers compute the same with two graphs for all layers and batch shapes, or run as they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.embedding_fixtures import write_fasta, write_model
from support.errors import refused
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchRuntimeError

from esm2kit.cli.arguments import parse
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import check_compile, compile_if_repaid, embed
from esm2kit.embedding.run import EmbeddingRun
from esm2kit.models.compiled import compile_layers, is_repaid
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.packing import Packed
from esm2kit.sequences.alphabet import MASK_IDX

SHAPES = [[5], [3, 4, 7], [100] * 3, [50, 40, 30], [1000], [64] * 5, [8], [16, 16], [1024, 3], [33] * 20]


def random_batch(num_tokens: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(num_tokens))
    tokens_N = torch.randint(4, 24, (sum(num_tokens),), generator=generator)
    return tokens_N.masked_fill(torch.rand(len(tokens_N), generator=generator) < 0.1, MASK_IDX)


# the heads of the published sizes have 16, 24, 32, 64 and 128 numbers
@pytest.mark.parametrize(("width", "heads"), [(32, 4), (64, 1), (128, 2), (64, 2), (64, 4), (256, 2)])
def test_two_graphs_serve_all_layers_and_batch_shapes(width: int, heads: int) -> None:
    torch.compiler.reset()
    model = ESM2.initialised(ESM2Config(4, width, heads), 0).eval()
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    batches = [(random_batch(num_tokens), Packed(num_tokens)) for num_tokens in SHAPES]
    with torch.inference_mode():
        expected = [model.encode(*batch, [0, 2, 4]) for batch in batches]
        assert compile_layers(model, count_graphs)
        assert len(graphs) == 2
        for batch, layers in zip(batches, expected, strict=True):
            for layer, found in model.encode(*batch, [0, 2, 4]).items():
                torch.testing.assert_close(found, layers[layer], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 2, "no batch shape compiles again"


def test_layers_that_cannot_be_compiled_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = ESM2.initialised(ESM2Config(2, 32, 4), 0).eval()

    def fail(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise RuntimeError("no C compiler")

    batch = random_batch([7, 9]), Packed([7, 9])
    with torch.inference_mode():
        expected = model.encode(*batch)
        assert not compile_layers(model, fail)
        torch.testing.assert_close(model.encode(*batch), expected, atol=0, rtol=0)
    (record,) = [record for record in caplog.records if record.name.startswith("esm2kit")]
    assert "cannot be compiled" in record.message
    assert "no C compiler" in record.message
    assert "\n" not in record.message


def test_only_a_long_run_on_a_cuda_gpu_is_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert is_repaid(100_000_000, 650_000_000)
    assert not is_repaid(50_000_000, 650_000_000)
    assert not is_repaid(1_000_000_000, 8_000_000)
    encoder = Encoder(ESM2.initialised(SIZES["esm2_t6_8M_UR50D"], 0).eval())
    compiled: list[ESM2] = []
    monkeypatch.setattr("esm2kit.embedding.embed.compile_layers", lambda model: compiled.append(model) or True)
    with caplog.at_level("INFO", "esm2kit"):
        for compiles in ("auto", False):
            compile_if_repaid(compiles, encoder, 10**12)
        assert not compiled
        model = write_model(tmp_path / "m.safetensors")
        config = EmbedConfig(write_fasta(tmp_path / "a.fasta", {"a": "MKT"}), tmp_path / "out", model=str(model))
        with refused("embed.compile-device", device="cpu"):
            embed(replace(config, compile=True))
        assert not list((tmp_path / "out").glob("*")), "refused before any work"
        encoder.device = torch.device("cuda")
        compile_if_repaid("auto", encoder, 10**6)
        compile_if_repaid(False, encoder, 10**12)
        assert not compiled
        assert not caplog.messages
        compile_if_repaid("auto", encoder, 10**12)
        compile_if_repaid(True, encoder, 10)
    assert compiled == [encoder.model] * 2
    with refused("embed.compile-device", device="layer by layer"):
        check_compile(True, "layer by layer")
    assert len(caplog.messages) == 2
    assert all("--compile false" in message for message in caplog.messages)


def test_compiled_layers_that_fail_later_end_the_run_with_one_line(tmp_path: Path, monkeypatch) -> None:
    """And only those: other errors, and exhausted memory, stay what they are."""
    config = EmbedConfig(
        write_fasta(tmp_path / "a.fasta", {"a": "MKT"}), tmp_path, model=str(write_model(tmp_path / "m.safetensors"))
    )

    def fail_with(error: Exception) -> None:
        def fail(self: EmbeddingRun, name: str) -> None:
            raise error

        monkeypatch.setattr(EmbeddingRun, "work", fail)

    fail_with(FailOnRecompileLimitHit("recompile_limit reached\nin project"))
    with refused("compile.failed", reason="FailOnRecompileLimitHit") as caught:
        embed(config)
    assert "(recompile_limit reached in project)" in str(caught.value)
    fail_with(ZeroDivisionError("another error"))
    with pytest.raises(ZeroDivisionError, match="another error"):
        embed(config)
    fail_with(TorchRuntimeError("CUDA out of memory"))
    with refused("memory.exhausted"):
        embed(config)
    monkeypatch.undo()
    assert embed(config).num_proteins == 1, "the same command continues"


def test_compile_is_auto_true_or_false(tmp_path: Path) -> None:
    for value in ("auto", True, False):
        assert EmbedConfig(tmp_path, compile=value).compile == value
    assert EmbedConfig(tmp_path).compile == "auto"
    with refused("config.choice", name="compile", found="always"):
        EmbedConfig(tmp_path, compile="always")


@pytest.mark.parametrize(
    ("words", "value"),
    [("--compile auto", "auto"), ("--compile true", True), ("--compile", True), ("--compile false", False),
     ("--no-compile", False), ("", "auto")],
)  # fmt: skip
def test_compile_on_the_command_line(words: str, value: bool | str) -> None:
    config = parse(EmbedConfig, "esm2kit embed", [*words.split(), "a.fasta"], "fasta", "esm2kit embed my.fasta")
    assert (config.compile, config.fasta) == (value, Path("a.fasta"))
