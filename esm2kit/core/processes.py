"""The rank of this process among the workers that torchrun or SLURM started, and how workers start and exit."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from esm2kit.core.errors import InputError

# Variables that a launcher sets for each worker. Containers, Kubernetes and sbatch set some of them too.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by Lightning for its children
# environment variables of esm2kit: how much a stage logs; the file into which the first worker writes its result; and
# whether a parent process waits for the workers and reports their errors
VERBOSITY, RESULT_FILE, SUPERVISED = "ESM2KIT_VERBOSITY", "ESM2KIT_RESULT_FILE", "ESM2KIT_SUPERVISED"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers of SLURM's batch, interactive and external steps, which are not srun's
# On each of these signals a training process finishes its update, saves and exits. Lightning's manual recommends that
# SLURM sends SIGUSR1 before the time limit; Lightning's own handler would save in the middle of an update. Windows has
# no SIGUSR1, and SIGBREAK is the only signal there that another process can send.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)
)


class Launch(NamedTuple):
    """The launcher that started this process, and the process's place among the workers.

    Args:
        launcher: torchrun, srun, Lightning, or "" for a single process.
        rank: Rank among all workers.
        world_size: Number of workers.
        local_rank: Rank among the workers of the node, which is also the index of the GPU.
        local_world_size: Number of workers on the node.
    """

    launcher: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_launch() -> Launch:
    """Read from the environment which launcher started this process; incomplete or invalid variables are ignored.

    torchrun comes first, because it can be used inside an srun task. A single srun task is a single process.

    Returns:
        The launcher and the place of this process.
    """
    found = {name: _read_number(name) for name in {*TORCHRUN, *SRUN, *LIGHTNING, "LOCAL_WORLD_SIZE"}}
    rank, size, local = (found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    has_address = bool(os.environ.get("MASTER_ADDR")) and found["MASTER_PORT"] is not None
    if has_address and None not in (size, local):
        on_node = found["LOCAL_WORLD_SIZE"] or 1
        if rank is not None and rank < size:
            return Launch("torchrun", rank, size, local, on_node)
        if "RANK" not in os.environ and found["NODE_RANK"] == 0 and local < size:  # Lightning starts one node only
            return Launch("Lightning", local, size, local, size)
    rank, size, local = (found[name] for name in SRUN)
    step = _read_number("SLURM_STEP_ID") or 0
    # not SLURM_NTASKS: an sbatch script has that and SLURM_PROCID too, but only srun sets the variables of a step
    if None not in (rank, size, local) and rank < size and size > 1 and step < FIRST_SPECIAL_STEP:
        return Launch("srun", rank, size, local, -(-size // (_read_number("SLURM_STEP_NUM_NODES") or 1)))
    return Launch()


def describe_launch() -> str | None:
    """Describe in one line which launcher started this process, or what is ignored; None if there is nothing to say."""
    launch = read_launch()
    if launch.launcher:
        return f"started by {launch.launcher}: rank {launch.rank} of {launch.world_size}"
    ignored = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    if ignored:
        wrong = [name for name in (*ignored, "MASTER_PORT") if name in os.environ and _read_number(name) is None]
        absent = [name for name in TORCHRUN if not os.environ.get(name)]
        if wrong:
            reason = f"{wrong[0]} is {os.environ[wrong[0]]!r}, not a number"
        else:
            reason = f"{', '.join(absent)} not set" if absent else "RANK is not below WORLD_SIZE"
        return f"{', '.join(ignored)} ignored ({reason}): no launcher started this process, so it runs on its own"
    if (_read_number("SLURM_NTASKS") or 1) > 1:
        return "SLURM_NTASKS ignored: srun did not start this process, so it runs on its own"
    return None


def ignore_incomplete_launch() -> None:
    """Remove the variables of a launcher that did not start this process, which other packages would believe."""
    launcher = read_launch().launcher
    for name in (*TORCHRUN[:3], "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE") if launcher in ("", "srun") else ():
        os.environ.pop(name, None)
    if launcher != "srun":  # Lightning reads it when it is imported
        os.environ.pop("SLURM_PROCID", None)


def rank() -> int:
    """Return the rank of this process among all workers, 0 for a single process."""
    return read_launch().rank


def world_size() -> int:
    """Return the number of workers, 1 for a single process."""
    return read_launch().world_size


def local_rank() -> int:
    """Return the rank of this process among the workers of its node, which is also the index of its GPU."""
    return read_launch().local_rank


def is_worker() -> bool:
    """Return whether a launcher started this process: torchrun, or srun with more than one task."""
    return bool(read_launch().launcher)


def is_torchrun_worker() -> bool:
    """Return whether torchrun started this process."""
    return read_launch().launcher == "torchrun"


def count_cores() -> int:
    """Return how many CPU cores this process may use: its share of the node's cores, at least 1."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    launch = read_launch()
    if launch.launcher == "srun":  # it may bind each task to its own cores, or let every task use all of them
        seen = min(seen, (_read_number("SLURM_CPUS_ON_NODE") or seen) // launch.local_world_size)
    elif launch.launcher:
        seen //= launch.local_world_size
    return max(1, seen)


def _read_number(name: str) -> int | None:
    """Read an environment variable as a number from 0; None if it is not set or is not one."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def exit_with_parent() -> None:
    """Kill this process as soon as its parent process has died, even by SIGKILL; repeated calls have no effect.

    Call it first in a worker. Without it, a rank whose launcher was killed continues to train and holds the lock of the
    run's folder. A data worker whose rank was killed early waits forever, as torch's own check compares with the parent
    at the time of the check.
    """
    # a spawned process knows the id of its parent; os.getppid() is wrong if the parent has died already
    started_by = multiprocessing.parent_process()
    parent = started_by.pid if started_by else os.getppid()

    def watch() -> None:
        # on Windows the id of the parent stays the same after its death
        while started_by.is_alive() if started_by and os.name == "nt" else os.getppid() == parent:
            time.sleep(1.0)
        kill_process()

    if not any(thread.name == "exit_with_parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="exit_with_parent", daemon=True).start()


def check_platform(devices: int) -> None:
    """Check that this system can use several devices.

    Args:
        devices: Devices per node.

    Raises:
        InputError: Several devices were requested on Windows.
    """
    if devices > 1 and sys.platform == "win32":
        raise InputError(
            f"devices {devices}: esm2kit uses one device on Windows. Use --devices 1, or WSL or Linux.",
            code="platform.devices",
            found=devices,
        )


def kill_process() -> NoReturn:
    """End this process immediately, without clean-up, as if it had been killed."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(137)  # the exit code that a shell gives to a killed process


def stop_group(worker: subprocess.Popen) -> None:
    """Ask a worker and the processes it started to save and exit.

    Args:
        worker: A process started with `new_group()`.
    """
    if hasattr(os, "killpg"):
        os.killpg(worker.pid, signal.SIGTERM)
    else:
        worker.send_signal(signal.CTRL_BREAK_EVENT)  # reaches the whole group; SIGTERM would end it without saving


def kill_group(worker: subprocess.Popen) -> None:
    """Kill a worker and the processes it started.

    Args:
        worker: A process started with `new_group()`.
    """
    if hasattr(os, "killpg"):
        os.killpg(worker.pid, signal.SIGKILL)
    else:
        worker.kill()  # its data workers end by `exit_with_parent`


def new_group() -> dict[str, Any]:
    """Return the arguments of `subprocess.Popen` that give a process a group of its own."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def destroy_group_at_exit() -> None:
    """Destroy torch's process group before Python exits; repeated calls have no effect.

    A gloo thread that releases its last message while Python exits aborts the process after its work is done. This
    happened to a third of otherwise idle processes. Lightning destroys only NCCL groups at exit.
    """
    atexit.unregister(_destroy_group)
    atexit.register(_destroy_group)


def _destroy_group() -> None:
    """Destroy torch's process group if there is one."""
    distributed = sys.modules.get("torch.distributed")  # a process that has not imported torch has no group
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Exit with a code; a worker skips Python's finalization.

    During finalization Python stops every thread that requests its lock. A gloo thread that does so to release its last
    tensors aborts the process with "terminate called without an active exception", after its work is done.

    Args:
        code: Exit code.
    """
    if is_worker():
        atexit._run_exitfuncs()  # loggers finish their runs, and the process group is destroyed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
