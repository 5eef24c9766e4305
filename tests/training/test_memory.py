"""Activation checkpointing `auto` follows the estimate and the free memory, and does not change the results."""

import logging
from pathlib import Path

import pytest
import torch
from support.errors import refused

from esm2kit.core.errors import check_choices
from esm2kit.core.processes import Launch
from esm2kit.models.config import SIZES
from esm2kit.models.memory import TrainingSettings, estimate_training, format_gib
from esm2kit.pretraining.config import PretrainConfig
from esm2kit.pretraining.pretrain import MaskedLM, pretrain
from esm2kit.training import memory
from esm2kit.training.layout import BatchLayout
from esm2kit.training.memory import MemoryPlan, TrainingData, count_micro_batch_tokens, describe_memory
from esm2kit.training.metrics_log import read_metrics

LARGE = SIZES["esm2_t33_650M_UR50D"]
TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4}


def make_plan(**options: object) -> MemoryPlan:
    options = {"accelerator": "cuda", "precision": "bf16-mixed", "micro_batch_tokens": 16_384, **options}
    config = PretrainConfig(Path("data"), out_dir=Path("run"), **options)
    settings = TrainingSettings(tokens=16_384, precision=config.precision, device="cuda", accumulates=True)
    if config.activation_checkpointing is True:
        settings = TrainingSettings(**{**vars(settings), "activation_checkpointing": True})
    return MemoryPlan(config, LARGE, settings)


@pytest.mark.parametrize(
    ("chosen", "free_gib", "expected"), [("auto", 80, False), ("auto", 40, True), (False, 40, False), (True, 80, True)]
)
def test_auto_recomputes_only_if_the_run_does_not_fit(chosen, free_gib, expected, monkeypatch, caplog) -> None:
    monkeypatch.setattr(memory, "read_free_memory", lambda device: free_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    plan = make_plan(activation_checkpointing=chosen)
    with caplog.at_level(logging.INFO, "esm2kit"):
        assert plan.choose_checkpointing(torch.device("cuda")) is expected
    needed = estimate_training(
        LARGE,
        TrainingSettings(
            tokens=16_384, precision="bf16-mixed", device="cuda", accumulates=True, activation_checkpointing=expected
        ),
    ).total
    line = caplog.messages[0]
    assert line.startswith(f"16,384 tokens per micro-batch: about {format_gib(needed)} of {free_gib} GiB, ")
    assert ("chosen because" in line) == (chosen == "auto" and expected)
    exceeds = needed > free_gib * 2**30
    assert (caplog.records[0].levelno == logging.WARNING) == exceeds == ("may not fit" in line)


def test_a_cpu_logs_a_line_only_if_the_run_may_not_fit(monkeypatch, caplog) -> None:
    for free, messages, recomputes in ((2**40, 0, False), (None, 0, False), (2**30, 1, True)):
        caplog.clear()
        monkeypatch.setattr(memory, "read_free_memory", lambda device, free=free: free)
        with caplog.at_level(logging.INFO, "esm2kit"):
            assert make_plan().choose_checkpointing(torch.device("cpu")) is recomputes
        assert len(caplog.messages) == messages


def test_available_memory_is_the_share_of_a_rank_and_what_it_already_has(monkeypatch) -> None:
    """The estimate counts the model, which is on the device already."""
    plan, free = make_plan(), 2**34
    monkeypatch.setattr(memory, "read_free_memory", lambda device: free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 200)
    assert plan._read_available_memory(torch.device("cuda")) == free + 300
    assert plan._read_available_memory(torch.device("mps")) == free + 200
    weights = 4 * LARGE.num_parameters
    assert plan._read_available_memory(torch.device("cpu")) == pytest.approx(free + weights, rel=1e-3)
    monkeypatch.setattr(memory, "read_launch", lambda: Launch("torchrun", 0, 4, 0, 4))
    assert plan._read_available_memory(torch.device("cpu")) == pytest.approx(free / 4 + weights, rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "fsdp"),
    [
        ({}, False),
        ({"devices": 2}, False),
        ({"devices": 2, "strategy": "fsdp2"}, True),
        ({"strategy": "fsdp2"}, True),
        ({"devices": 2, "tensor_model_parallel_size": 2}, False),
        ({"devices": 2, "tensor_model_parallel_size": 2, "strategy": "fsdp2"}, False),
        ({"devices": 4, "tensor_model_parallel_size": 2}, True),
    ],
)
def test_the_plan_and_the_default_micro_batch_describe_the_same_run(layout: dict, fsdp: bool, tmp_path) -> None:
    """FSDP2 is also what divides the data-parallel ranks of a tensor-parallel run; see `shard_model`."""
    config = PretrainConfig(tmp_path, out_dir=tmp_path, accelerator="cpu", precision="32-true", **layout)
    assert describe_memory(config, 64).fsdp is fsdp

    class Data(TrainingData):
        def count_tokens(self) -> list[int]:
            return [30] * config.layout.global_batch_size

    plan = MemoryPlan.of(config, LARGE, Data())
    assert plan.settings == describe_memory(config, 240, accumulates=False)


def test_the_memory_of_an_apple_gpu_is_estimated_as_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "resolve_accelerator", lambda config: "mps")
    config = PretrainConfig(tmp_path, out_dir=tmp_path, precision="32-true")
    assert describe_memory(config).device == "mps"
    assert estimate_training(LARGE, describe_memory(config, 4096)).total > 16 * LARGE.num_parameters


def test_remedies_need_less_memory_and_keep_the_batch_equation() -> None:
    first, second, third = make_plan().list_remedies()
    halved = TrainingSettings(tokens=8192, precision="bf16-mixed", device="cuda", accumulates=True)
    assert first == f"--micro_batch_tokens 8192 (about {format_gib(estimate_training(LARGE, halved).total)})"
    assert second.startswith("--activation_checkpointing true (about ")
    assert third.startswith("--precision bf16-true (about ")
    odd = {"micro_batch_tokens": None, "micro_batch_size": 9, "global_batch_size": 18}
    assert make_plan(**odd).list_remedies()[0].startswith("--micro_batch_size 3 --accumulate_grad_batches 6 (about ")
    single = {"micro_batch_tokens": None, "micro_batch_size": 1}
    assert not any("micro_batch" in each for each in make_plan(**single).list_remedies())


def test_tokens_are_those_of_the_largest_micro_batch_in_its_bucket() -> None:
    layout = BatchLayout.of(devices=2, micro_batch_size=1, accumulate_grad_batches=2)
    assert count_micro_batch_tokens(layout, [10, 20, 130, 40]) == 132  # multiples of 4 from 128 on
    budget = BatchLayout.of(micro_batch_tokens=64, global_batch_size=4)
    assert count_micro_batch_tokens(budget, [30, 30, 30, 30]) == 60


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_the_option_is_true_false_or_auto(value: bool | str) -> None:
    check_choices(PretrainConfig(Path("data"), out_dir=Path("run"), activation_checkpointing=value))


def test_other_words_are_refused() -> None:
    with refused("config.choice", name="activation_checkpointing", found="yes", allowed=("auto",)):
        PretrainConfig(Path("data"), out_dir=Path("run"), activation_checkpointing="yes")


def test_auto_gives_the_curve_of_both_settings(dataset, tmp_path, monkeypatch) -> None:
    """On a device that is too small for the activations, auto recomputes the layers; the losses are the same."""
    given = TINY | {"data": dataset, "max_steps": 4, "global_batch_size": 8, "lr": 1e-3, "warmup_steps": 2}
    given |= {"log_every_n_steps": 1, "val_check_interval": 2, "accelerator": "cpu"}
    seen, losses = {}, {}
    started = MaskedLM.on_fit_start

    def on_fit_start(self) -> None:
        started(self)
        seen[Path(self.config.out_dir).name] = self.esm2.activation_checkpointing

    monkeypatch.setattr(MaskedLM, "on_fit_start", on_fit_start)
    for name, chosen, free in (("plain", False, 2**40), ("large", "auto", 2**40), ("small", "auto", 2**19)):
        monkeypatch.setattr(memory, "read_free_memory", lambda device, free=free: free)
        pretrain(PretrainConfig(**given, activation_checkpointing=chosen, out_dir=tmp_path / name))
        rows = read_metrics(tmp_path / name / "metrics.csv")
        losses[name] = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert seen == {"plain": False, "large": False, "small": True}
    assert losses["large"] == losses["plain"]
    assert len(losses["plain"]) == 4
    assert losses["small"] == pytest.approx(losses["plain"], rel=1e-6)
