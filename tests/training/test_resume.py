"""A run that is killed at any moment and resumed ends bit for bit like the uninterrupted run."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.errors import refused
from support.layouts import train_in_process, train_with_torchrun

from esm2kit.models.checkpoint import read_checkpoint, read_metadata

STEPS = 24
SECONDS_WITHOUT_WORK = 300
# how often each layout is killed; a release is tested with 10
KILLS = int(os.environ.get("ESM2KIT_KILLS", "2"))
LAYOUTS = {"1x1": {}, "ddp": {"devices": 2}, "tp": {"devices": 2, "tensor_model_parallel_size": 2}}
SETTINGS = {
    "model": "custom",
    "num_layers": 2,
    "embed_dim": 32,
    "attention_heads": 4,
    "global_batch_size": 8,
    "max_steps": STEPS,
    "warmup_steps": 4,
    "lr": 1e-3,
    "log_every_n_steps": 1,
    "val_check_interval": 4,
    "save_top_k": STEPS // 4,
    "accelerator": "cpu",
}


def arguments(out_dir: Path, data: Path, **settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in (SETTINGS | {"data": data, "out_dir": out_dir} | settings).items()]


def start(out_dir: Path, data: Path, **settings: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "esm2kit", "pretrain", *arguments(out_dir, data, **settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(out_dir: Path, data: Path, **settings: object) -> str:
    process = start(out_dir, data, **settings)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output[-2000:]
    return output


def family_of(process: subprocess.Popen) -> set[int]:
    """A process and all its descendants."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    family = {process.pid}
    while grown := {pid for pid, parent in parents if parent in family} - family:
        family |= grown
    return family


def running(pids: set[int]) -> set[int]:
    """The processes that still run; zombies do not count."""
    listing = subprocess.run(["ps", "-eo", "pid,stat"], capture_output=True, text=True, check=True).stdout
    states = dict(line.split() for line in listing.splitlines()[1:])
    return {pid for pid in pids if not states.get(str(pid), "Z").startswith("Z")}


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a process and its descendants: torchrun starts its workers in separate sessions."""
    for pid in family_of(process):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def curve(out_dir: Path) -> dict[tuple[int, str], str]:
    """All metrics of metrics.csv as text with all digits, by (update, name)."""
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("train_loss", "val_loss", "lr", "grad_norm", "tokens")
    return {(int(row["step"]), name): row[name] for row in rows for name in names if row[name]}


def tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / "checkpoints" / "last.safetensors")[0]


def assert_identical(found: Path, expected: Path) -> None:
    assert curve(found) == curve(expected)
    held, reference = tensors(found), tensors(expected)
    assert held.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(held[name], tensor), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dataset) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    runs = {name: arguments(folder, dataset, **LAYOUTS[name]) for name, folder in folders.items()}
    train_in_process([runs.pop("1x1")])
    train_with_torchrun(2, list(runs.values()))
    return folders


def test_the_losses_of_the_reference_runs_differ(uninterrupted) -> None:
    """The reference runs have 24 updates with different losses, so the comparison is meaningful."""
    for folder in uninterrupted.values():
        losses = [value for (_, name), value in curve(folder).items() if name == "train_loss"]
        assert len(losses) == len(set(losses)) == STEPS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_moments_ends_the_same(layout: str, tmp_path, dataset, uninterrupted) -> None:
    moments = random.Random(layout)
    checkpoints = tmp_path / "checkpoints"
    for number in range(KILLS):
        process = start(tmp_path, dataset, **LAYOUTS[layout])
        # at a random moment after the run has started; every other time in the middle of a save
        wait_for(process, lambda: (tmp_path / "metrics.csv").exists())
        time.sleep(moments.uniform(0, 1.0))
        if number % 2:
            wait_for(process, lambda: any(checkpoints.glob("*.part")), seconds_between=0.0005)
        kill(process)
    finish(tmp_path, dataset, **LAYOUTS[layout])
    assert_identical(tmp_path, uninterrupted[layout])
    assert not [path for path in checkpoints.iterdir() if path.suffix != ".safetensors"]


def test_a_killed_launcher_leaves_no_process_behind(tmp_path, dataset) -> None:
    """SIGKILL reaches the launcher's process group only; its ranks have groups of their own, and data workers."""
    endless = {"max_steps": 100_000, "val_check_interval": 100_000, "num_workers": 1}
    process = start(tmp_path, dataset, **endless, **LAYOUTS["ddp"])
    wait_for(process, partial(has_metrics, tmp_path, 20))
    family = family_of(process)
    assert len(family) >= 1 + 2 + 2, "torchrun, two ranks, and a data worker of each"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    end = time.monotonic() + 60
    while running(family) and time.monotonic() < end:
        time.sleep(0.2)
    assert not running(family)


def test_killed_with_data_workers_ends_the_same(tmp_path, dataset, uninterrupted) -> None:
    complete = curve(uninterrupted["1x1"])
    for attempt in range(5):  # on a busy machine the run may end before the signal is sent
        folder = tmp_path / str(attempt)
        process = start(folder, dataset, num_workers=2)
        wait_for(process, partial(has_metrics, folder, 20), seconds_between=0.002)
        os.killpg(process.pid, signal.SIGKILL)  # includes its data workers, which have no session of their own
        process.communicate()
        if len(curve(folder)) < len(complete):
            break
    assert process.returncode == -signal.SIGKILL
    assert 20 < len(curve(folder)) < len(complete)
    train_in_process([arguments(folder, dataset)])
    assert_identical(folder, uninterrupted["1x1"])


def has_metrics(out_dir: Path, count: int) -> bool:
    """Whether metrics.csv has more than `count` values."""
    return (out_dir / "metrics.csv").exists() and len(curve(out_dir)) > count


def wait_for(process: subprocess.Popen, condition, seconds_between: float = 0.02) -> None:
    """Wait until a condition holds or the run ends, however slow the machine is, as long as the run computes."""
    used, since = "", time.monotonic()
    while not condition() and process.poll() is None:
        time.sleep(seconds_between)
        if time.monotonic() - since > SECONDS_WITHOUT_WORK:
            now = processor_time(process)
            assert now != used, f"the run has used no processor time for {SECONDS_WITHOUT_WORK} seconds"
            used, since = now, time.monotonic()


def processor_time(process: subprocess.Popen) -> str:
    """The processor time that each process of a run has used so far."""
    family = ",".join(map(str, sorted(family_of(process))))
    return subprocess.run(["ps", "-o", "pid,time", "-p", family], capture_output=True, text=True, check=False).stdout


def test_sigterm_saves_the_current_update(tmp_path, dataset, uninterrupted) -> None:
    """The launcher forwards the signal to two ranks."""
    process = start(tmp_path, dataset, **LAYOUTS["ddp"])
    wait_for(process, partial(has_metrics, tmp_path, 4))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    stopped_at = read_metadata(tmp_path / "checkpoints" / "last.safetensors")["step"]
    assert 0 < stopped_at < STEPS
    assert f"at update {stopped_at} of {STEPS}" in finish(tmp_path, dataset, **LAYOUTS["ddp"])
    assert_identical(tmp_path, uninterrupted["ddp"])


def test_resumed_on_another_layout_stays_within_tolerance(tmp_path, dataset, uninterrupted) -> None:
    """Resume from the middle of a run, as if it was killed after its third validation."""
    runs = {}
    for first, then in (("ddp", "1x1"), ("1x1", "tp"), ("tp", "ddp")):
        (middle,) = (uninterrupted[first] / "checkpoints").glob("step=0000012-*")
        (tmp_path / then / "checkpoints").mkdir(parents=True)
        shutil.copy(middle, tmp_path / then / "checkpoints" / "last.safetensors")
        shutil.copy(uninterrupted[first] / "metrics.csv", tmp_path / then)
        # also with another division of the batch: into two micro-batches, or, on the last layout, by a token budget
        division = {"micro_batch_tokens": 800} if then == "ddp" else {"accumulate_grad_batches": 2}
        given = LAYOUTS[then] | division | {"num_workers": int(then == "1x1")}
        runs[then] = arguments(tmp_path / then, dataset, **given)
    train_in_process([runs.pop("1x1")])
    train_with_torchrun(2, list(runs.values()))
    expected = curve(uninterrupted["1x1"])
    for then in LAYOUTS:
        found, held = curve(tmp_path / then), tensors(tmp_path / then)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(float(value), rel=1e-5), (then, key)
        for name, tensor in tensors(uninterrupted["1x1"]).items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "before", "now"), [("seed", 0, 1), ("global_batch_size", 8, 4), ("embed_dim", 32, 64)]
)
def test_another_run_is_not_resumed(name: str, before: int, now: int, dataset, uninterrupted) -> None:
    with refused("resume.another-run", changed=f"{name} was {before} and is now {now}"):
        train_in_process([arguments(uninterrupted["1x1"], dataset, **{name: now})])
