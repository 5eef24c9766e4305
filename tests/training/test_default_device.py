"""Lightning builds a model where new tensors are on the GPU by default; here the meta device stands for the GPU.

A tensor that follows the default by mistake has no values on the meta device, and on a GPU cannot be pinned or sampled
with a generator of the CPU.
"""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.initialise import build_meta_model, materialise, sample_weights
from esm2kit.models.lora import add_lora, sample_adapters
from esm2kit.models.packing import Packed, to_device
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training import compilation

CONFIG = ESM2Config(2, 32, 4)
TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 6, "lr": 1e-3, "warmup_steps": 2, "log_every_n_steps": 1, "max_steps": 2}


def read_losses(out_dir: Path) -> list[float]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture
def other_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the Trainer a default device that is not the one of its model."""
    monkeypatch.setattr(Strategy, "tensor_init_context", lambda self, empty_init=None: torch.device("meta"))


def test_a_layout_is_on_the_requested_device() -> None:
    with torch.device("meta"):
        packed = Packed([5, 7], "cpu", bucketed=True)
        assert {packed.num_tokens_B.device.type, packed.sequence_N.device.type, packed.position_N.device.type} == {
            "cpu"
        }
        assert packed.cu_seqlens.tolist()[:3] == [0, 5, 12]
    assert to_device(torch.empty(2, device="meta"), "meta").is_meta, "a tensor that is there already"


def test_weights_and_adapters_are_sampled_on_the_cpu() -> None:
    model = add_lora(ESM2.initialised(CONFIG, 0), 2, 4.0, seed=3)
    expected = dict(sample_adapters(model, 3))
    with torch.device("meta"):
        found = dict(sample_adapters(model, 3))
        shell = build_meta_model(CONFIG)
        materialise(shell, sample_weights(CONFIG, 0), torch.device("cpu"))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, tensor in ESM2.initialised(CONFIG, 0).state_dict().items():
        assert torch.equal(shell.state_dict()[name], tensor), name


@pytest.mark.parametrize("compile", [True, False])
def test_pretraining(compile: bool, other_default, dataset, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / "other", compile=compile))
    assert "does not work here" not in caplog.text
    monkeypatch.undo()
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / "same", compile=False))
    assert read_losses(tmp_path / "other") == pytest.approx(read_losses(tmp_path / "same"), rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_fine_tuning(mode: str, other_default, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    tasks, tiny = write_tasks(tmp_path / "tasks", 24), write_tiny_model(tmp_path / "tiny.safetensors")
    for name in ("other", "same"):
        finetune(
            FinetuneConfig(
                task="protein_value", data_dir=tasks, model=str(tiny), out_dir=tmp_path / name, mode=mode,
                accelerator="cpu", max_steps=2, val_check_interval=2, log_every_n_steps=1, resamples=100,
                benchmark=False, compile=name == "other",
            )
        )  # fmt: skip
        assert "does not work here" not in caplog.text
        monkeypatch.undo()
    assert read_losses(tmp_path / "other") == pytest.approx(read_losses(tmp_path / "same"), rel=1e-6)
