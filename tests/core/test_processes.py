"""Workers know who they are, whether torchrun or srun started them, and nobody else takes himself for one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esm2kit.core import processes as ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in TORCHRUN or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def said() -> tuple[bool, int, int, int, int]:
    return ranks.is_worker(), ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.count_cores()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (False, 0, 1, 0, 16)),
        (TORCHRUN, (True, 5, 8, 1, 4)),
        (SRUN, (True, 5, 8, 1, 4)),
        (SRUN | TORCHRUN | {"RANK": "2"}, (True, 2, 8, 1, 4)),  # torchrun inside an srun task has the last word
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, (False, 0, 1, 0, 16)),
        # a plain command in an sbatch script of 8 tasks
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (False, 0, 1, 0, 16)),
    ],
)
def test_who_this_process_is(environment: dict[str, str], expected: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said() == expected


def test_cores_that_srun_bound_are_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    assert ranks.count_cores() == 4


def test_cores_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert ranks.count_cores() == os.cpu_count()


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


def test_a_rank_that_is_still_loading_ends_with_its_launcher() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True, env=os.environ | TORCHRUN
    )
    rank = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "loading\n"
    launcher.send_signal(signal.SIGKILL)
    try:
        launcher.communicate(timeout=20)  # the rank holds the other end of the pipe: it is at its end when the rank is
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


GROUP = """
import atexit, sys
import torch.distributed as dist
from esm2kit.core.processes import destroy_group_at_exit
atexit.register(lambda: print("in a group:", dist.is_initialized()))  # the first registered is the last run
destroy_group_at_exit()
destroy_group_at_exit()
if sys.argv[1:]:
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
"""


def test_the_group_is_left_before_python_ends_and_none_is_no_fault(tmp_path: Path) -> None:
    for store in ([str(tmp_path / "store")], []):
        ended = subprocess.run([sys.executable, "-c", GROUP, *store], capture_output=True, text=True, check=True)
        assert ended.stdout == "in a group: False\n"
        assert not ended.stderr


FINISH = """
import atexit
from esm2kit.core.processes import exit_process
class AtPythonsEnd:
    def __del__(self):
        print("Python ended")
kept = AtPythonsEnd()
atexit.register(lambda: print("left"))
exit_process(3)
"""


@pytest.mark.parametrize(("worker", "told"), [({}, "left\nPython ended\n"), (TORCHRUN, "left\n")])
def test_a_worker_ends_before_python_does(worker: dict[str, str], told: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in {*TORCHRUN, *SRUN}}
    ended = subprocess.run([sys.executable, "-c", FINISH], capture_output=True, text=True, env=plain | worker)
    assert (ended.returncode, ended.stdout) == (3, told)
