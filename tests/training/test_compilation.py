"""Compiled layers: the same losses, few graphs, and one line instead of a failure if the compiler does not work."""

import csv
import logging
import random
from pathlib import Path

import pytest
import torch
from support.errors import refused
from torch import Tensor

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.packing import Packed
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training import compilation

TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 6, "lr": 1e-3, "warmup_steps": 2, "log_every_n_steps": 1, "max_steps": 4}


def losses(out_dir: Path) -> list[float]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]


class CountGraphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def reset_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.library.custom_op("esm2kit_tests::attend", mutates_args=())
def one_kernel(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Stands for varlen_attn: one operation with the offsets and the longest sequence as its arguments."""
    tokens = offsets.diff().tolist()
    assert max(tokens) == longest
    return Packed._attend_by_length(Packed(tokens), query, key, value).clone()


@one_kernel.register_fake
def _(query, key, value, offsets, longest):
    return torch.empty_like(query)


# only the trial of the compiler runs a backward pass through it, and does not use the numbers
one_kernel.register_autograd(lambda context, gradient: (gradient, gradient, gradient, None, None))


@pytest.mark.parametrize("kernel", ["by length", "one kernel"])
def test_many_shapes_of_batches_need_few_graphs(kernel: str, monkeypatch) -> None:
    """40 batches, and different numbers of layers: the graphs of one layer with a dynamic number of rows are enough."""
    if kernel == "one kernel":
        monkeypatch.setattr(
            Packed,
            "attend",
            lambda self, query, key, value: torch.ops.esm2kit_tests.attend(
                query, key, value, self.cu_seqlens, self.max_tokens
            ),
        )
    backend, numbers = CountGraphs(), random.Random(0)
    monkeypatch.setattr(compilation, "BACKEND", backend)
    esm2 = ESM2.initialised(ESM2Config(4, 32, 4), 0)
    eager = ESM2.initialised(ESM2Config(4, 32, 4), 0)
    assert compilation.compile_layers(esm2, "32-true", torch.device("cpu"))
    first = backend.graphs
    for _ in range(40):
        num_tokens = [numbers.randint(3, 60) for _ in range(numbers.randint(1, 9))]
        tokens_N, packed = torch.randint(4, 24, (sum(num_tokens),)), Packed(num_tokens, bucketed=True)
        with torch.no_grad() if kernel == "one kernel" else torch.enable_grad():
            found, expected = esm2.encode(tokens_N, packed), eager.encode(tokens_N, packed)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert first > 0
    assert backend.graphs <= first + 4, "at most one more for a batch of one sequence"


# the heads of the published sizes have 16, 24, 32, 64 and 128 numbers
@pytest.mark.parametrize(("width", "heads"), [(64, 4), (48, 2), (64, 2), (128, 2), (64, 1), (256, 2)])
def test_the_first_update_uses_what_the_trial_compiled(width: int, heads: int, monkeypatch) -> None:
    """Whatever the width of the heads: a batch of the trial has no number of rows that the model has as a dimension."""
    backend = CountGraphs()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    esm2 = ESM2.initialised(ESM2Config(2, width, heads), 0)
    assert compilation.compile_layers(esm2, "32-true", torch.device("cpu"))
    first = backend.graphs
    esm2.encode(torch.randint(4, 24, (91,)), Packed([50, 41]))
    assert backend.graphs == first > 0


def test_compiled_layers_give_the_same_losses(dataset, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    for compiled in (False, True):
        with caplog.at_level(logging.INFO, "esm2kit"):
            pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / str(compiled), compile=compiled))
        assert len(lines(caplog)) == int(compiled), "one line says that layers are compiled, and how to leave it out"
    assert "--compile false" in lines(caplog)[0]
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)
    assert len(losses(tmp_path / "True")) == 4


def test_a_compiler_that_fails_is_left_out_with_one_line(dataset, tmp_path, monkeypatch, caplog) -> None:
    """In the forward or in the backward pass; the losses are those of a run without the compiler, bit for bit."""

    def fail(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        raise RuntimeError("no C compiler found\nwith a second line")

    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / "eager", compile=False))
    monkeypatch.setattr(compilation, "BACKEND", fail)
    with caplog.at_level(logging.INFO, "esm2kit"):
        pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / "failed", compile=True))
    (line,) = [each for each in lines(caplog) if "does not work here" in each]
    assert "no C compiler found" in line
    assert "\n" not in line
    assert losses(tmp_path / "failed") == losses(tmp_path / "eager")


def test_a_compiler_that_fails_after_the_trial_ends_the_run_with_one_line(dataset, tmp_path, monkeypatch) -> None:
    """The trial does not compile for a validation; what was trained before it is not lost."""
    given = RUN | {"data": dataset, "val_check_interval": 2}
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "eager", compile=False))
    pretrain(PretrainConfig(**given | {"max_steps": 2}, out_dir=tmp_path / "failed", compile=False))

    def fail_in_validation(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        if not torch.is_grad_enabled():
            raise RuntimeError("ptxas ended with code 255\nwith a second line")
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", fail_in_validation)
    with refused("compile.failed", reason="BackendCompilerFailed") as caught:
        pretrain(PretrainConfig(**given, out_dir=tmp_path / "failed", compile=True))
    assert "ptxas ended with code 255" in str(caught.value)
    assert "--compile false" in str(caught.value)
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "failed", compile=False))
    assert losses(tmp_path / "failed") == losses(tmp_path / "eager")


def test_a_processor_is_not_compiled_for_by_default(dataset, tmp_path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("compile auto compiles only on a CUDA GPU")

    monkeypatch.setattr("esm2kit.training.loop.compile_layers", fail)
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path))
    with pytest.raises(AssertionError, match="only on a CUDA GPU"):
        pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / "asked", compile=True))
