"""Ranks under torchrun and srun, and how workers exit."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esm2kit.core import processes

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN |= ADDRESS
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in TORCHRUN or name in ("NODE_RANK", "GROUP_RANK") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def identity() -> tuple[bool, int, int, int, int]:
    return (
        processes.is_worker(),
        processes.rank(),
        processes.world_size(),
        processes.local_rank(),
        processes.count_cores(),
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (False, 0, 1, 0, 16)),
        (TORCHRUN, (True, 5, 8, 1, 4)),
        (SRUN, (True, 5, 8, 1, 4)),
        (SRUN | TORCHRUN | {"RANK": "2"}, (True, 2, 8, 1, 4)),  # torchrun inside an srun task takes precedence
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, (False, 0, 1, 0, 16)),
        # a container's variable, and variables that are incomplete, not numbers or contradict each other
        ({"LOCAL_RANK": "0"}, (False, 0, 1, 0, 16)),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, (False, 0, 1, 0, 16)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (False, 0, 1, 0, 16)),
        (TORCHRUN | {"RANK": "abc"}, (False, 0, 1, 0, 16)),
        (TORCHRUN | {"RANK": "8"}, (False, 0, 1, 0, 16)),
        (TORCHRUN | {"MASTER_PORT": ""}, (False, 0, 1, 0, 16)),
        (SRUN | {"LOCAL_RANK": "0"}, (True, 5, 8, 1, 4)),
        (SRUN | {"SLURM_PROCID": "x"}, (False, 0, 1, 0, 16)),
        (SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, (False, 0, 1, 0, 16)),  # salloc's interactive step
        # two processes that Lightning started for a script
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"} | ADDRESS, (True, 1, 2, 1, 8)),
        # a plain command in an sbatch script of 8 tasks
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (False, 0, 1, 0, 16)),
    ],
)
def test_rank_and_cores_follow_torchrun_or_srun(
    environment: dict[str, str], expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert identity() == expected


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, None),
        (TORCHRUN, "started by torchrun: rank 5 of 8"),
        (SRUN | {"LOCAL_RANK": "0"}, "started by srun: rank 5 of 8"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK ignored (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set)"),
        (TORCHRUN | {"RANK": "abc"}, "RANK, LOCAL_RANK, WORLD_SIZE ignored (RANK is 'abc', not a number)"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS ignored: srun did not start this process"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)
def test_one_line_says_which_launcher_is_believed(
    environment: dict[str, str], line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = processes.describe_launch()
    assert found == line or found.split(":")[0] == line.split(":")[0]
    processes.ignore_incomplete_launch()
    launched = processes.is_worker()
    assert launched or not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys()


def test_cores_that_srun_bound_are_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    assert processes.count_cores() == 4


def test_cores_without_affinity_are_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processes.count_cores() == os.cpu_count()


RANK = """
import sys, time
from esm2kit.cli import main as cli
def load(name, arguments):
    print("loading", flush=True)
    time.sleep(60)
cli._run = load
cli.main(["pretrain"])
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="torchrun's workers are tested where SIGKILL exists")
def test_a_rank_that_is_still_loading_dies_with_its_launcher() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True, env=os.environ | TORCHRUN
    )
    rank = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "loading\n"
    launcher.send_signal(signal.SIGKILL)
    try:
        launcher.communicate(timeout=20)  # returns once the rank, which holds the pipe, has died
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


GROUP = """
import atexit, sys
import torch.distributed as dist
from esm2kit.core.processes import destroy_group_at_exit
atexit.register(lambda: print("in a group:", dist.is_initialized()))  # runs last, as it is registered first
destroy_group_at_exit()
destroy_group_at_exit()
if sys.argv[1:]:
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
"""


def test_the_group_is_destroyed_before_python_exits(tmp_path: Path) -> None:
    for store in ([str(tmp_path / "store")], []):
        done = subprocess.run([sys.executable, "-c", GROUP, *store], capture_output=True, text=True, check=True)
        assert done.stdout == "in a group: False\n"
        assert not done.stderr


FINISH = """
import atexit
from esm2kit.core.processes import exit_process
class Finalized:
    def __del__(self):
        print("finalized")
kept = Finalized()
atexit.register(lambda: print("exit function"))
exit_process(3)
"""


@pytest.mark.parametrize(("worker", "output"), [({}, "exit function\nfinalized\n"), (TORCHRUN, "exit function\n")])
def test_a_worker_skips_pythons_finalization(worker: dict[str, str], output: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in {*TORCHRUN, *SRUN}}
    done = subprocess.run([sys.executable, "-c", FINISH], capture_output=True, text=True, env=plain | worker)
    assert (done.returncode, done.stdout) == (3, output)
