"""Who this process is among the workers of a job, by torchrun's word or SLURM's."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import NoReturn

# Set for each worker by torchrun, and by srun; a lone srun task, or a shell inside an allocation, is no worker.
TORCHRUN, SLURM = "LOCAL_RANK", "SLURM_PROCID"
# After each of these a training process finishes its update, saves and ends. SIGUSR1 is what Lightning's manual has
# SLURM send ahead of the time limit; Lightning's own answer would save in the middle of an update, beside our files.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def rank() -> int:
    """This process's rank among all workers; 0 where there are no others."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ[SLURM]) if is_worker() else 0


def world_size() -> int:
    """How many workers there are; 1 where there are no others."""
    if TORCHRUN in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return _srun_tasks() if is_worker() else 1


def local_rank() -> int:
    """This process's rank among the workers of its node, which is also the number of its GPU."""
    if TORCHRUN in os.environ:
        return int(os.environ[TORCHRUN])
    return int(os.environ.get("SLURM_LOCALID", "0")) if is_worker() else 0


def is_worker() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return TORCHRUN in os.environ or (SLURM in os.environ and _srun_tasks() > 1)


def count_cores() -> int:
    """Cores that are this process's share of its node, at least 1."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if TORCHRUN in os.environ:
        return max(1, seen // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if is_worker():  # srun may have bound each task to its own cores, or shown all of them to every task
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", seen))
        seen = min(seen, on_node // -(-world_size() // int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))))
    return max(1, seen)


def exit_with_parent() -> None:
    """Die when the process that started this one does, even by SIGKILL; to be called first, and again is as once.

    A rank whose launcher was killed would otherwise train on unseen, and hold the run's folder. A data worker whose
    rank was killed before it was ready would wait for ever: torch's own watch takes for its parent whoever is by then.
    """
    # what a spawned process was told: by the time it asks, its parent may be dead and the system stand in for it
    started_by = multiprocessing.parent_process()
    parent = started_by.pid if started_by else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    if not any(thread.name == "exit_with_parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="exit_with_parent", daemon=True).start()


def destroy_group_at_exit() -> None:
    """Have this process leave torch's group of processes before Python ends; again is as once.

    A gloo thread that lets go of its last message while Python ends aborts the process, its work done: a third of
    otherwise idle ones did. Lightning leaves the group at exit only where it is NCCL's.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")  # torch takes seconds, and who has not loaded it is in no group
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; a worker does without Python's own ending.

    There Python unwinds every thread that asks for its lock, and a gloo thread that does, to let go of its last
    tensors, aborts the process ("terminate called without an active exception"), its work done.
    """
    if is_worker():
        atexit._run_exitfuncs()  # where loggers end their runs, and this process leaves its group
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _srun_tasks() -> int:
    # of the step, which srun alone sets: an sbatch script has SLURM_PROCID 0 and the job's SLURM_NTASKS without it
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
