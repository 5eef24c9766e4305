"""Checkpoints and metrics.csv survive faults, and a run resumes only from its own checkpoint."""

import errno
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.errors import refused

from esm2kit.core import progress
from esm2kit.core.files import atomic_path
from esm2kit.core.processes import STOP_SIGNALS
from esm2kit.models.checkpoint import read_checkpoint, write_checkpoint
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training import metrics_log as training_log
from esm2kit.training import resume as training_state
from esm2kit.training.metrics_log import TrainingLog, read_metrics
from esm2kit.training.resume import CheckpointWriter, lock_run_folder

TINY = {"model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 2, "accelerator": "cpu"}
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def test_ranks_with_different_checkpoints_raise_an_error(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    """Two nodes do not share out_dir: one finds a checkpoint, the other starts a new run."""
    monkeypatch.setattr(training_state, "gather_strings", lambda items: [*items, "400"] if len(items[0]) < 5 else items)
    config = PretrainConfig(data=dataset, out_dir=tmp_path, **TINY, max_steps=1, global_batch_size=2)
    with refused("resume.ranks-differ", path=tmp_path / "checkpoints", updates=["0", "400"]):
        pretrain(config)


def test_ranks_with_different_data_raise_an_error(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training_state, "gather_strings", lambda items: [*items, "0" if items == ["0"] else "f" * 64])
    config = PretrainConfig(data=dataset, out_dir=tmp_path, **TINY, max_steps=1, global_batch_size=2)
    with refused("resume.data-differ") as caught:
        pretrain(config)
    own, other = caught.value.values["digests"]
    assert (len(own), other) == (64, "f" * 64)


def test_a_checkpoint_without_a_new_parameter_resumes_with_its_default(dataset: Path, tmp_path: Path) -> None:
    given = {**TINY, "data": dataset, "out_dir": tmp_path, "global_batch_size": 2}
    last = pretrain(PretrainConfig(**given, max_steps=1))["last"]
    tensors, metadata = read_checkpoint(last)
    assert metadata["provenance"]["config"].pop("decay_share") == 0.9
    write_checkpoint(last, tensors, metadata)
    with refused("resume.another-run", changed="decay_share was 0.9 and is now 0.5"):
        pretrain(PretrainConfig(**given, max_steps=2, decay_share=0.5))
    assert pretrain(PretrainConfig(**given, max_steps=2))["step"] == 2


def test_a_folder_takes_one_run_or_warns_if_it_has_no_locks(tmp_path: Path, monkeypatch, caplog) -> None:
    with lock_run_folder(tmp_path), refused("file.locked"), lock_run_folder(tmp_path):
        pass

    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    with caplog.at_level(logging.WARNING), lock_run_folder(tmp_path):
        assert "the file system has no locks" in caplog.text
        assert str(tmp_path) in caplog.text


def test_a_full_disk_does_not_lose_the_rows_of_metrics_csv(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss,seconds\n1,3.0,0.1\n2,2.9,0.2\n3,2.8,0.3\n4,2.7")
    before = path.read_bytes()
    trainer = SimpleNamespace(is_global_zero=True, world_size=1)
    module = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(precision="32-true", max_steps=4))
    log = TrainingLog(tmp_path, 1, None, 2)
    monkeypatch.setattr(training_log, "_measure_peak_flops", lambda *arguments: 0.0)

    class FullDisk(training_log.csv.DictWriter):
        def writerows(self, rows: list) -> None:
            raise NO_SPACE

    with monkeypatch.context() as full:
        full.setattr(training_log.csv, "DictWriter", FullDisk)
        with pytest.raises(OSError, match="No space left"):
            log.on_train_start(trainer, module)
    assert path.read_bytes() == before
    log.on_train_start(trainer, module)
    assert [row["step"] for row in read_metrics(path)] == ["1", "2"], "rows of updates after the checkpoint are removed"


def test_the_time_left_follows_a_machine_that_slows_down(tmp_path: Path, monkeypatch, caplog) -> None:
    """60 updates of 1 s, a validation of 120 s, and 56 updates of 5 s: the log line reports the last minute."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(training_log, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(training_log, "_measure_peak_flops", lambda *arguments: 0.0)
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, loggers=[])
    config = SimpleNamespace(precision="32-true", max_steps=200)
    update = {"train_loss": 2.9, "lr": 1e-3, "grad_norm": 1.0, "tokens": 50.0, "total_flops": 0.0}
    module = SimpleNamespace(device=torch.device("cpu"), config=config, last_validation={"val_loss": 2.9})
    log = TrainingLog(tmp_path, 10, None, 0)
    log.on_train_start(trainer, module)
    with caplog.at_level(logging.INFO, "esm2kit.training.metrics_log"):
        for module.step in range(1, 117):
            clock.now += 1.0 if module.step <= 60 else 5.0
            module.last_update = update | {"total_tokens": 50.0 * module.step}
            log.on_train_batch_end(trainer, module)
            if module.step == 60:
                log.on_validation_start(trainer, module)
                clock.now += 120.0
                log.on_validation_end(trainer, module)
    last = [record.getMessage() for record in caplog.records if "left" in record.getMessage()][-1]
    assert last.startswith("update 116/200  loss 2.9000  lr 1.00e-03  10 tokens/s"), last
    # 84 updates of 5 s, plus validations, which took 120 s per 340 s of training
    assert last.endswith("00:09:28 left"), last


def test_a_restored_optimizer_state_is_on_the_device_of_its_parameters() -> None:
    """This includes the steps, which a fused optimizer counts on the device, as torch's own state loading does."""
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = {"weight.exp_avg": torch.ones(2, 3), "weight.step": torch.tensor(7.0), "bias.step": torch.tensor(7.0)}
    training_state.restore_optimizer(model, optimizer, state)
    found = {name: tensor.device.type for name, tensor in optimizer.state[model.weight].items()}
    assert found == {"exp_avg": "meta", "step": "meta"}
    assert list(optimizer.state[model.bias]) == ["step"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_requests_a_stop(number: int, tmp_path: Path) -> None:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    module = SimpleNamespace(step=0, stop_requested=False)
    try:
        CheckpointWriter(tmp_path, 1, {"inputs": {}}, 1).on_train_start(SimpleNamespace(is_global_zero=True), module)
        os.kill(os.getpid(), number)
        assert module.stop_requested
        assert signal.getsignal(number) is before[number], "a second signal has its usual effect"
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_signal_handlers_are_restored_after_success_and_failure(dataset: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    given = {**TINY, "data": dataset, "global_batch_size": 2, "max_steps": 1, "warmup_steps": 0}
    pretrain(PretrainConfig(**given, out_dir=tmp_path / "finished"))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    with refused("run.validation-loss"):
        pretrain(PretrainConfig(**given, out_dir=tmp_path / "failed", lr=1e30, gradient_clip_val=0.0))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_two_writers_of_a_file_have_separate_temporary_files(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "tokens") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "tokens") as second:
            second.write_text("second")
        assert (tmp_path / "tokens").read_text() == "second"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_a_retained_checkpoint_is_complete_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    last, kept = tmp_path / "last", tmp_path / "step=1"
    last.write_text("new")
    kept.write_text("old")

    def no_links(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def copy_half(source: Path, target: Path) -> None:
        Path(target).write_text("n", encoding="utf-8")
        raise NO_SPACE

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as full:
        full.setattr(shutil, "copyfile", copy_half)
        with pytest.raises(OSError, match="No space left"):
            training_state._link(last, kept)
    assert kept.read_text() == "old"
    training_state._link(last, kept)
    assert kept.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step=1"]
