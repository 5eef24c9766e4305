"""Loggers in addition to metrics.csv, and bfloat16 with float32 master weights on one device."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import wandb as lightning_wandb
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.finetuning import report
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.models import encoder as inference
from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.pretraining.pretrain import MaskedLM, PretrainConfig, pretrain
from esm2kit.training.precision import encoder_precision, precision_context
from esm2kit.training.trainer import check_devices

TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 8, "lr": 1e-3, "warmup_steps": 2, "log_every_n_steps": 1, "val_check_interval": 3}
# replaces the wandb package: each call writes a line of JSON
WANDB = """
import json, os
run = None

class Run:
    def __init__(self, **given):
        self.id, self.name, self.config = "1", given["name"], self
        note("init", given | {"mode": os.environ.get("WANDB_MODE")})
    def update(self, settings, **options):
        note("config", settings)
    def log(self, metrics):
        note("log", metrics)
    def define_metric(self, *names, **options):
        pass

def note(call, values):
    with open(os.environ["WANDB_NOTES"], "a") as file:
        file.write(json.dumps([call, values], default=str) + "\\n")

def init(**given):
    global run
    run = Run(**given)
    return run

def finish():
    global run
    run = None
    note("finish", {})
"""


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(out_dir) if row[name]]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch) -> Path:
    """Install a fake wandb package for the processes of a test; returns the file with its recorded calls."""
    site = tmp_path / "site"
    for name, text in {
        "wandb/__init__.py": WANDB,
        "wandb/sdk/__init__.py": "",
        "wandb/sdk/lib.py": "class RunDisabled: ...",
        "wandb/wandb_run.py": "from wandb import Run",
        "wandb-0.20.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: wandb\nVersion: 0.20.0\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("WANDB_NOTES", str(tmp_path / "notes.jsonl"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path / "notes.jsonl"


def run(stage: str, settings: dict[str, object]) -> None:
    command = [sys.executable, "-m", "esm2kit", stage, *(f"--{name}={value}" for name, value in settings.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def recorded_calls(notes: Path, call: str) -> list[dict]:
    return [values for name, values in map(json.loads, notes.read_text(encoding="utf-8").splitlines()) if name == call]


def test_wandb_receives_settings_and_metrics(wandb, dataset, tmp_path) -> None:
    out_dir = tmp_path / "first"
    given = {"data": dataset, "out_dir": out_dir, "max_steps": 3, "logger": "wandb", "wandb_project": "proteins"}
    run("pretrain", RUN | given)
    (init,) = recorded_calls(wandb, "init")
    assert (init["project"], init["name"], init["group"]) == ("proteins", "first", "first")
    assert init["mode"] == "offline", "WANDB_MODE of the environment applies"
    (settings,) = recorded_calls(wandb, "config")
    assert settings["lr"] == 1e-3
    assert settings["embed_dim"] == 32
    losses = [metrics["train_loss"] for metrics in recorded_calls(wandb, "log") if "train_loss" in metrics]
    assert losses == pytest.approx(column(out_dir, "train_loss"))
    assert [metrics["val_loss"] for metrics in recorded_calls(wandb, "log") if "val_loss" in metrics] == column(
        out_dir, "val_loss"
    )
    assert len(recorded_calls(wandb, "finish")) == 1


def test_each_seed_is_a_separate_run(wandb, tmp_path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.safetensors")
    given = {"task": "protein_value", "data_dir": write_tasks(tmp_path / "tasks"), "model": tiny, "accelerator": "cpu"}
    given |= {"out_dir": tmp_path / "run", "max_steps": 1, "benchmark": False, "resamples": 100, "logger": "wandb"}
    run("finetune", given | {"seeds": "[1, 2]"})
    assert [init["name"] for init in recorded_calls(wandb, "init")] == ["seed=1", "seed=2"]
    assert [settings["seeds"] for settings in recorded_calls(wandb, "config")] == [[1], [2]]


def test_a_missing_logger_package_raises_an_error(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", False)
    given = {"data": dataset, "out_dir": tmp_path, "max_steps": 1, "logger": "wandb"}
    with refused("logger.missing", name="wandb"):
        pretrain(PretrainConfig(**RUN | given))
    assert not (tmp_path / "metrics.csv").exists()


def test_tensorboard_receives_settings_and_metrics(dataset, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(PretrainConfig(**RUN | {"data": dataset, "out_dir": tmp_path, "max_steps": 3, "logger": "tensorboard"}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train_loss")]
    assert losses == pytest.approx(column(tmp_path, "train_loss"), rel=1e-6)
    assert [event.step for event in events.Scalars("val_loss")] == [3]
    assert "lr: 0.001" in (tmp_path / "tensorboard" / "hparams.yaml").read_text()


def test_the_default_logger_writes_only_metrics_csv(dataset, tmp_path) -> None:
    pretrain(PretrainConfig(**RUN | {"data": dataset, "out_dir": tmp_path, "max_steps": 1}))
    assert not (tmp_path / "tensorboard").exists()
    assert len(column(tmp_path, "train_loss")) == 1


def test_more_workers_than_devices_are_reported_before_training(tmp_path, monkeypatch) -> None:
    """torchrun starts four workers of a command that is configured for one, two or eight devices."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ranks = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (address | ranks).items():
        monkeypatch.setenv(name, value)
    run = TINY | {"data": tmp_path, "out_dir": tmp_path}
    for given, expected in (({}, 1), ({"devices": 2}, 2), ({"devices": 2, "num_nodes": 4}, 8)):
        with refused("devices.workers", found=4, expected=expected):
            check_devices(PretrainConfig(**run | given))
    check_devices(PretrainConfig(**run | {"devices": 2, "num_nodes": 2}))


def test_master_weights_change_by_less_than_the_resolution_of_bf16(dataset, tmp_path) -> None:
    """Weights of 0.02 and more change by 1e-6, which bf16 weights could not represent."""
    given = {"data": dataset, "out_dir": tmp_path, "max_steps": 1, "precision": "bf16-true", "warmup_steps": 0}
    pretrain(PretrainConfig(**RUN | given | {"lr": 1e-6, "min_lr_share": 1.0, "weight_decay": 0.0}))
    after, _ = read_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    before = ESM2.initialised(ESM2Config(2, 32, 4), 0).state_dict()
    name = "layers.0.fc1.weight"
    moved = (after[f"model.{name}"] - before[name]).abs()
    large = before[name].abs() > 0.02
    assert moved[large].median() == pytest.approx(1e-6, rel=0.1)
    assert (after[f"model.{name}"].bfloat16() == before[name].bfloat16())[large].float().mean() > 0.9


def test_bf16_true_resumes_bit_for_bit(dataset, tmp_path, monkeypatch) -> None:
    given = RUN | {"data": dataset, "max_steps": 7, "precision": "bf16-true"}
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "uninterrupted"))
    step = MaskedLM.training_step

    def stop_at_step_3(self: MaskedLM, *arguments: object) -> None:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *arguments)

    monkeypatch.setattr(MaskedLM, "training_step", stop_at_step_3)
    assert pretrain(PretrainConfig(**given, out_dir=tmp_path / "cut"))["step"] < 7
    monkeypatch.undo()
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "cut"))
    assert column(tmp_path / "cut", "train_loss") == column(tmp_path / "uninterrupted", "train_loss")
    expected, found = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.safetensors")[0] for name in ("uninterrupted", "cut")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"accumulate_grad_batches": 2}])
def test_bf16_true_works_with_other_settings(settings, dataset, tmp_path) -> None:
    """Recomputed layers use the same copies, so the curve is bit-identical; micro-batches accumulate in float32."""
    given = RUN | {"data": dataset, "max_steps": 3, "precision": "bf16-true"}
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "plain"))
    pretrain(PretrainConfig(**given, **settings, out_dir=tmp_path / "other"))
    tolerance = 0.0 if "activation_checkpointing" in settings else 1e-4
    assert column(tmp_path / "other", "train_loss") == pytest.approx(
        column(tmp_path / "plain", "train_loss"), tolerance
    )


def test_layers_compute_in_bf16_and_gradients_are_float32() -> None:
    esm2 = ESM2.initialised(ESM2Config(2, 32, 4), 0)
    esm2.contact_head.requires_grad_(False)
    masters = dict(esm2.named_parameters())
    seen = set()
    for layer in esm2.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    tokens_N, packed = torch.randint(4, 24, (40,)), Packed([25, 15])
    for _ in range(2):
        with precision_context(esm2, "bf16-true"):
            logits_MV = esm2.masked_logits(tokens_N, packed, torch.arange(40))
            logits_MV.float().square().sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert logits_MV.dtype == torch.bfloat16
    assert all(parameter is masters[name] for name, parameter in esm2.named_parameters())
    assert esm2.lm_head.weight is esm2.embed_tokens.weight
    twice = {name: parameter.grad for name, parameter in masters.items() if parameter.requires_grad}
    assert {gradient.dtype for gradient in twice.values()} == {torch.float32}
    reference = ESM2.initialised(ESM2Config(2, 32, 4), 0)
    reference.masked_logits(tokens_N, packed, torch.arange(40)).square().sum().backward()
    for name, parameter in reference.named_parameters():
        if name in twice:
            assert torch.norm(twice[name] / 2 - parameter.grad) < 0.05 * torch.norm(parameter.grad) + 1e-3, name


def test_finetuning_computes_in_bf16_on_float32_master_weights(tmp_path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.safetensors")
    given = {"task": "residue_class", "data_dir": write_tasks(tmp_path / "tasks"), "model": str(tiny)}
    given |= {"accelerator": "cpu", "benchmark": False, "resamples": 100, "max_steps": 4, "lr": 1e-4}
    curves = {}
    for precision in ("32-true", "bf16-true"):
        for mode in ("full", "lora"):
            config = FinetuneConfig(
                **given, mode=mode, precision=precision, log_every_n_steps=1, out_dir=tmp_path / f"{precision}-{mode}"
            )
            finetune(config)
            curves[precision, mode] = column(tmp_path / f"{precision}-{mode}", "train_loss")
    for mode in ("full", "lora"):
        assert curves["bf16-true", mode] == pytest.approx(curves["32-true", mode], rel=0.02)
        assert curves["bf16-true", mode] != curves["32-true", mode]


def test_a_run_in_float32_scores_its_test_set_in_float32_on_a_gpu(tmp_path, monkeypatch) -> None:
    """`auto` of an encoder is bfloat16 there, whatever the precision of the run is."""
    monkeypatch.setattr(inference, "_computes_bfloat16", lambda device: True)
    assert encoder_precision("32-true", "cuda") == "float32"
    assert encoder_precision("bf16-mixed", "cuda") == encoder_precision("bf16-true", "cuda") == "bfloat16"
    assert encoder_precision("bf16-mixed", "cpu") == encoder_precision("bf16-mixed", "mps") == "float32"
    requested: list[tuple[str, str]] = []
    load = report.load_finetuned

    def note(path: Path, device: str, precision: str):
        requested.append((device, precision))
        return load(path, device=device, precision=precision)

    monkeypatch.setattr(report, "load_finetuned", note)
    monkeypatch.setattr(report, "encoder_precision", lambda precision, device: {"32-true": "float32"}[precision])
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    given = {"task": "protein_value", "data_dir": write_tasks(tmp_path / "tasks"), "model": str(model)}
    given |= {"max_steps": 2, "benchmark": False, "resamples": 100, "accelerator": "cpu", "precision": "32-true"}
    finetune(FinetuneConfig(**given, out_dir=tmp_path / "run"))
    assert requested == [("cpu", "float32")]
