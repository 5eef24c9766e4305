"""Training continues while a thread writes a checkpoint; the file holds the values of its update, or is absent."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.errors import refused

from esm2kit.cli.main import main
from esm2kit.core import files
from esm2kit.models.checkpoint import copy_to_host, read_checkpoint, read_metadata
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training import resume
from esm2kit.training.loop import TrainingLoop
from esm2kit.training.resume import CheckpointWriter
from esm2kit.training.updates import HostCopy, Update

STEPS, EVERY = 12, 4
SETTINGS = {
    "model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 2, "global_batch_size": 4,
    "max_steps": STEPS, "warmup_steps": 2, "lr": 1e-3, "val_check_interval": EVERY, "save_top_k": 3,
    "log_every_n_steps": 1, "accelerator": "cpu",
}  # fmt: skip
# a run that is killed while its thread writes the checkpoint with this number: `{number} {arguments}`
KILLED = """
import os, signal, sys
from esm2kit.cli.main import main
from esm2kit.models import checkpoint
from esm2kit.training import resume

numbers, write = [], resume.write_checkpoint

def write_and_die(path, tensors, metadata):
    numbers.append(metadata["step"])
    if len(numbers) == int(sys.argv[1]):
        checkpoint._update_digest = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # after the header
    write(path, tensors, metadata)

resume.write_checkpoint = write_and_die
sys.exit(main(sys.argv[2:]))
"""


def train(dataset: Path, out_dir: Path, **settings: object) -> dict:
    return pretrain(PretrainConfig(data=dataset, out_dir=out_dir, **SETTINGS | settings))


def words(dataset: Path, out_dir: Path) -> list[str]:
    return [
        "pretrain",
        *(f"--{name}={value}" for name, value in (SETTINGS | {"data": dataset, "out_dir": out_dir}).items()),
    ]


def is_writer() -> bool:
    return threading.current_thread() is not threading.main_thread()


def read_all(out_dir: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read every checkpoint completely; returns its tensors by update."""
    found = {}
    for path in (out_dir / "checkpoints").glob("*.safetensors"):
        tensors, metadata = read_checkpoint(path)
        found.setdefault(metadata["step"], tensors)
        if path.name.startswith("step="):
            assert f"step={metadata['step']:07d}" in path.name
    return found


def differ(found: dict, expected: dict) -> list[tuple[int, str]]:
    assert found.keys() == expected.keys()
    pairs = [(step, name) for step, tensors in expected.items() for name in tensors]
    return [(step, name) for step, name in pairs if not torch.equal(found[step][name], expected[step][name])]


@pytest.fixture(scope="module")
def expected(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for each of its checkpoints."""
    out_dir = tmp_path_factory.mktemp("waiting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "_can_copy", lambda self, tensors: False)
        patch.setattr(resume, "copy_to_host", None)
        train(dataset, out_dir)
    assert sorted(read_all(out_dir)) == [4, 8, 12]
    return out_dir


def delay_writer(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None] = lambda step: None) -> list[tuple]:
    """Make each write of a thread last for two updates; returns (update of the file, update when it was written)."""
    moved, step, writes = threading.Condition(), [0], []
    write, training_step = resume.write_checkpoint, TrainingLoop.training_step

    def count_step(module: TrainingLoop, *arguments: object) -> None:
        training_step(module, *arguments)
        with moved:
            step[0] = module.step
            moved.notify_all()

    def write_late(path: Path, tensors: dict, metadata: dict) -> None:
        if is_writer():
            act(metadata["step"])
            with moved:
                moved.wait_for(lambda: step[0] >= metadata["step"] + 2, timeout=20)
        writes.append((metadata["step"], step[0], is_writer()))
        write(path, tensors, metadata)

    monkeypatch.setattr(TrainingLoop, "training_step", count_step)
    monkeypatch.setattr(resume, "write_checkpoint", write_late)
    return writes


def test_a_late_writer_saves_the_values_of_the_snapshot(dataset, tmp_path, expected, monkeypatch) -> None:
    """The weights have changed twice when the file is written; every checkpoint is that of the run that waits."""
    writes = delay_writer(monkeypatch)
    train(dataset, tmp_path)
    assert writes == [(4, 6, True), (8, 10, True), (12, 12, False)], "the last one is written at the end, directly"
    assert differ(read_all(tmp_path), read_all(expected)) == []
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (tmp_path, expected)]
    assert names[0] == names[1], "the best ones are the same, and nothing incomplete is left"


def test_without_the_copy_the_late_writer_saves_later_values(dataset, tmp_path, expected, monkeypatch) -> None:
    """The counter-example of the test above."""
    delay_writer(monkeypatch)
    monkeypatch.setattr(resume, "copy_to_host", lambda tensors, buffers: dict(tensors))
    train(dataset, tmp_path)
    changed = differ(read_all(tmp_path), read_all(expected))
    assert {step for step, _ in changed} == {4, 8}
    assert (4, "model.embed_tokens.weight") in changed


def test_the_next_save_waits_for_the_previous_one(dataset, tmp_path, monkeypatch) -> None:
    """Validation after every update, and a writer that is slower: at most one file is in flight, in order."""
    active, most, steps, write = [], [], [], resume.write_checkpoint

    def write_slowly(path: Path, tensors: dict, metadata: dict) -> None:
        active.append(metadata["step"])
        most.append(len(active))
        threading.Event().wait(0.05)
        write(path, tensors, metadata)
        steps.append(active.pop())

    monkeypatch.setattr(resume, "write_checkpoint", write_slowly)
    best = train(dataset, tmp_path, val_check_interval=1, max_steps=5)["best"]
    assert (steps, max(most)) == ([1, 2, 3, 4, 5], 1)
    losses = {step: read_metadata(path)["val_loss"] for path in (tmp_path / "checkpoints").glob("step=*")
              for step in [read_metadata(path)["step"]]}  # fmt: skip
    assert len(losses) == 3
    assert read_metadata(best)["val_loss"] == min(losses.values())


def test_best_waits_for_a_file_that_is_not_complete(tmp_path, monkeypatch) -> None:
    """`best` during a write is the file that the write makes, not an earlier or an incomplete one."""
    started, go = threading.Event(), threading.Event()
    monkeypatch.setattr(resume, "checksum_metrics", lambda path: [0, 0])
    write = resume.write_checkpoint

    def write_later(path: Path, tensors: dict, metadata: dict) -> None:
        started.set()
        assert go.wait(20)
        write(path, tensors, metadata)

    monkeypatch.setattr(resume, "write_checkpoint", write_later)
    weights = {"model.weight": torch.zeros(3)}
    esm2 = SimpleNamespace(config={"num_layers": 1, "embed_dim": 16, "attention_heads": 2})
    module = SimpleNamespace(
        step=1, finished=False, last_validation={"val_loss": 2.0}, esm2=esm2,
        checkpoint_tensors=lambda: weights, checkpoint_details=dict,
    )  # fmt: skip
    writer, trainer = CheckpointWriter(tmp_path, 1, {}, 1), SimpleNamespace(is_global_zero=True, should_stop=False)
    writer.on_validation_end(trainer, module)
    assert started.wait(20)
    weights["model.weight"].fill_(7)
    assert not list(writer.folder.glob("*.safetensors"))
    threading.Timer(0.2, go.set).start()
    best = writer.best()
    assert best.name == "step=0000001-val_loss=2.0000.safetensors"
    assert read_checkpoint(best)[0]["model.weight"].tolist() == [0, 0, 0]


def test_a_full_disk_ends_the_run_in_one_line(dataset, tmp_path, expected, monkeypatch, capsys) -> None:
    """The thread's error appears at the end of an update; the run then resumes from the last complete checkpoint."""
    fsync, failed = files.fsync, []

    def fill_disk(path: Path) -> None:
        if is_writer() and Path(path).suffix == ".part" and not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(path)

    monkeypatch.setattr(files, "fsync", fill_disk)
    writes = delay_writer(monkeypatch)
    assert main(words(dataset, tmp_path)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    last = tmp_path / "checkpoints" / "last.safetensors"
    assert line.startswith(f"esm2kit: {last}: cannot write update 4 ([Errno 28] No space left on device")
    assert line.endswith("there is no checkpoint yet")
    assert writes == [(4, 6, True)], "it ends before the next save"
    assert not list(last.parent.iterdir())
    assert main(words(dataset, tmp_path)) == 0
    assert differ(read_all(tmp_path), read_all(expected)) == []


def test_an_error_of_the_training_waits_for_the_write(dataset, tmp_path, expected, monkeypatch) -> None:
    """The run diverges while the thread writes: its checkpoint is complete when the run has ended."""
    go, clip = threading.Event(), TrainingLoop._divergence_error

    def diverge(module: TrainingLoop) -> dict[str, float]:
        raise clip(module, Update(module.step + 1, [], 0.0, HostCopy(torch.full((6,), torch.nan))))

    def step(module: TrainingLoop, *arguments: object) -> None:
        if module.step == 5:
            threading.Timer(0.2, go.set).start()
            diverge(module)
        training_step(module, *arguments)

    write, training_step = resume.write_checkpoint, TrainingLoop.training_step
    monkeypatch.setattr(TrainingLoop, "training_step", step)
    monkeypatch.setattr(
        resume, "write_checkpoint", lambda *arguments: write(*arguments) if go.wait(20) else pytest.fail("no end")
    )
    with refused("run.diverged", update=6):
        train(dataset, tmp_path)
    assert differ(read_all(tmp_path), {4: read_all(expected)[4]}) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_during_a_write_saves_both(number: int, dataset, tmp_path, expected, monkeypatch) -> None:
    """The signal comes while the thread writes update 4; the run ends later, with that file and with its own."""
    writes = delay_writer(monkeypatch, lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    train(dataset, tmp_path)
    stopped = read_metadata(tmp_path / "checkpoints" / "last.safetensors")["step"]
    assert 4 < stopped < 8
    assert [(step, in_thread) for step, _, in_thread in writes] == [(4, True), (stopped, False)]
    assert sorted(read_all(tmp_path)) == [4, stopped]
    monkeypatch.undo()
    train(dataset, tmp_path)
    assert differ(read_all(tmp_path), read_all(expected)) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_while_the_thread_writes_ends_the_same(dataset, tmp_path, expected) -> None:
    """Killed in the first write, then in the second one of the rerun: each time it resumes from the last whole one."""
    for number, resumes_at in ((1, None), (2, 4)):
        command = [sys.executable, "-c", KILLED, str(number), *words(dataset, tmp_path)]
        killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()].count(".part") == 1
        last = tmp_path / "checkpoints" / "last.safetensors"
        assert (read_metadata(last)["step"] if last.exists() else None) == resumes_at
    train(dataset, tmp_path)
    assert differ(read_all(tmp_path), read_all(expected)) == []
    assert not list((tmp_path / "checkpoints").glob("*.part"))


def test_training_waits_for_each_save_where_memory_is_short(dataset, tmp_path, expected, monkeypatch, caplog) -> None:
    writes = delay_writer(monkeypatch)
    monkeypatch.setattr(resume, "read_free_memory", lambda device: 20_000)
    with caplog.at_level("INFO"):
        train(dataset, tmp_path)
    assert writes == [(4, 4, False), (8, 8, False), (12, 12, False)]
    assert caplog.text.count("training waits for each checkpoint: a copy would take 0.0 of 0.0 GiB") == 1
    assert differ(read_all(tmp_path), read_all(expected)) == []


def test_copies_are_independent_and_reuse_their_memory() -> None:
    """Also those made in inference mode, in which Lightning validates."""
    buffers: dict[str, torch.Tensor] = {}
    weights = {"model.x": torch.arange(3.0), "model.step": torch.tensor(2), "model.lm_head.weight": torch.ones(2)}
    with torch.inference_mode():
        first = copy_to_host(weights, buffers)
    weights["model.x"].fill_(9)
    assert first["model.x"].tolist() == [0, 1, 2]
    assert first.keys() == {"model.x", "model.step"}, "the tied matrix is not copied"
    address = first["model.x"].data_ptr()
    second = copy_to_host(weights, buffers)
    assert (second["model.x"].tolist(), second["model.x"].data_ptr()) == ([9, 9, 9], address)
    weights["model.x"] = torch.zeros(5, dtype=torch.float64)
    assert copy_to_host(weights, buffers)["model.x"].dtype == torch.float64
