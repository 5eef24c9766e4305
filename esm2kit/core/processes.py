"""The rank of this process among the workers that torchrun or SLURM started, and how workers start and exit."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import NoReturn

# Environment variables that torchrun and srun set for each worker. A single srun task and a shell inside an allocation
# have SLURM_PROCID too, but are not workers.
TORCHRUN, SLURM = "LOCAL_RANK", "SLURM_PROCID"
# On each of these signals a training process finishes its update, saves and exits. Lightning's manual recommends that
# SLURM sends SIGUSR1 before the time limit; Lightning's own handler would save in the middle of an update.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def rank() -> int:
    """Return the rank of this process among all workers, 0 for a single process."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ[SLURM]) if is_worker() else 0


def world_size() -> int:
    """Return the number of workers, 1 for a single process."""
    if TORCHRUN in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return _srun_tasks() if is_worker() else 1


def local_rank() -> int:
    """Return the rank of this process among the workers of its node, which is also the index of its GPU."""
    if TORCHRUN in os.environ:
        return int(os.environ[TORCHRUN])
    return int(os.environ.get("SLURM_LOCALID", "0")) if is_worker() else 0


def is_worker() -> bool:
    """Return whether this process is a worker: started by torchrun, or by srun with more than one task."""
    return TORCHRUN in os.environ or (SLURM in os.environ and _srun_tasks() > 1)


def count_cores() -> int:
    """Return how many CPU cores this process may use: its share of the node's cores, at least 1."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if TORCHRUN in os.environ:
        return max(1, seen // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if is_worker():  # srun may bind each task to its own cores, or let every task use all of them
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", seen))
        seen = min(seen, on_node // -(-world_size() // int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))))
    return max(1, seen)


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
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    if not any(thread.name == "exit_with_parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="exit_with_parent", daemon=True).start()


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


def _srun_tasks() -> int:
    """Return the number of tasks of this srun step, 1 outside one."""
    # not SLURM_NTASKS: an sbatch script has that and SLURM_PROCID too, but only srun sets the variables of a step
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
