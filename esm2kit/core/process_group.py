"""Collective operations among the processes of a job."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.processes import destroy_group_at_exit, read_launch

RENDEZVOUS_SECONDS = 600.0  # how long srun's tasks wait for all of them to start


class Process(NamedTuple):
    """The position of this process among the processes that torchrun or srun started."""

    rank: int
    world_size: int
    local_rank: int


def join_process_group() -> Process:
    """Join the gloo process group of the job; it is used for small messages, never for vectors.

    Returns:
        The position of this process; without torchrun or srun it is rank 0 of 1, and no group is created.

    Raises:
        InputError: Not all of srun's tasks connected within RENDEZVOUS_SECONDS.
    """
    launch = read_launch()
    process = Process(launch.rank, launch.world_size, launch.local_rank)
    if process.world_size > 1 and not dist.is_initialized():
        # torchrun creates the store and passes its address in the environment; srun's tasks create their own
        if launch.launcher != "srun":
            options = {"rank": process.rank, "world_size": process.world_size}
        else:
            options = {"store": _srun_store(process), "rank": process.rank, "world_size": process.world_size}
        dist.init_process_group("gloo", timeout=timedelta(days=30), **options)
        destroy_group_at_exit()
    return process


def find_srun_host() -> str:
    """Return the host of srun's first task: MASTER_ADDR, or the first node of the step."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    # host[05-09,12],other -> host05; SLURM separates hosts by commas, outside brackets
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes)
    return os.environ.get("MASTER_ADDR") or re.split(r"[ ,]", first)[0]


def choose_srun_port() -> int:
    """Return the port of srun's tasks: MASTER_PORT, or one that differs between the jobs of a node."""
    numbers = [os.environ.get(name, "") for name in ("MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")]
    port, job, step = (int(text) if text.isdigit() else 0 for text in numbers)
    return port or 15_000 + (job + step) % 10_000


def _srun_store(process: Process) -> dist.Store:
    host = find_srun_host()
    port = choose_srun_port()
    try:
        return dist.TCPStore(
            host, port, process.world_size, is_master=process.rank == 0, timeout=timedelta(seconds=RENDEZVOUS_SECONDS)
        )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"not all of the {process.world_size} srun tasks connected to {host}:{port} ({reason}). Check that all "
            "tasks started, or set MASTER_ADDR and MASTER_PORT.",
            code="srun.incomplete",
            world_size=process.world_size,
            address=f"{host}:{port}",
        ) from None


def run_on_rank_0(process: Process, function: Callable[[], Any]) -> Any:
    """Run a function on rank 0 only; all processes wait for it and get its result.

    Args:
        process: The position of this process.
        function: Called without arguments; its result must be picklable.

    Returns:
        The result of the function on rank 0.

    Raises:
        Exception: The function failed on rank 0. Other ranks raise the same InputError, or a RuntimeError with the
            message of any other exception.
    """
    if process.world_size == 1:
        return function()
    dist.barrier()
    outcome: list[Any] = [None, None]  # result, error
    if process.rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if isinstance(error, InputError) else RuntimeError(str(error))
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_on_rank_0(process: Process, value: Any) -> list[Any] | None:
    """Gather one value of every process on rank 0, in the order of the ranks; all processes must call it.

    Args:
        process: The position of this process.
        value: Any picklable value.

    Returns:
        The values on rank 0, None on the others.
    """
    if process.world_size == 1:
        return [value]
    gathered = None if process.rank else [None] * process.world_size
    dist.gather_object(value, gathered, dst=0)
    return gathered


def sum_over_group(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """Sum a tensor over the ranks of a group, in place; None leaves it as it is."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def maximum_over_ranks(value: Tensor) -> Tensor:
    """Compute the maximum over all ranks of the job, tensor-parallel ranks included, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def is_set_on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank of the job, tensor-parallel ranks included; all ranks agree."""
    return bool(maximum_over_ranks(torch.tensor(float(flag), device=device)).item())


def gather_strings(items: list[str]) -> list[str]:
    """Gather the lists of all ranks into one list, in the order of the ranks; every rank gets the same list."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
