"""Collective operations between the processes of a job."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.processes import TORCHRUN, destroy_group_at_exit, local_rank, rank, world_size

RENDEZVOUS_SECONDS = 600.0  # that srun's tasks wait for the last of them to start


class Process(NamedTuple):
    """This process among those of torchrun or srun."""

    rank: int
    world_size: int
    local_rank: int


def join_process_group() -> Process:
    """The group of all the job's processes, over gloo: it carries a few words, never vectors.

    Raises: InputError if srun's other tasks do not come.
    """
    process = Process(rank(), world_size(), local_rank())
    if process.world_size > 1 and not dist.is_initialized():
        # torchrun has made a store for its workers, which the environment names; srun's tasks make theirs
        if TORCHRUN in os.environ:
            met = {}
        else:
            met = {"store": _srun_store(process), "rank": process.rank, "world_size": process.world_size}
        dist.init_process_group("gloo", timeout=timedelta(days=30), **met)
        destroy_group_at_exit()
    return process


def _srun_store(process: Process) -> dist.Store:
    from lightning.fabric.plugins.environments import SLURMEnvironment  # slow, and only srun's tasks need it

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    # the port is the job's and the step's own, so that two on one node do not meet
    step = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    port = int(os.environ.get("MASTER_PORT", 15_000 + step % 10_000))
    try:
        return dist.TCPStore(
            host, port, process.world_size, is_master=process.rank == 0, timeout=timedelta(seconds=RENDEZVOUS_SECONDS)
        )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the {process.world_size} tasks of srun do not meet at {host}:{port} ({reason}); see whether all of them "
            "started, or set MASTER_ADDR and MASTER_PORT",
            code="srun.incomplete",
            world_size=process.world_size,
            address=f"{host}:{port}",
        ) from None


def run_on_rank_0(process: Process, function: Callable[[], Any]) -> Any:
    """Rank 0's result, or its InputError, in every process; all wait for it."""
    if process.world_size == 1:
        return function()
    dist.barrier()
    said: list[Any] = [None, None]
    if process.rank == 0:
        try:
            said[0] = function()
        except Exception as error:
            said[1] = error if isinstance(error, InputError) else RuntimeError(str(error))
            dist.broadcast_object_list(said, src=0)
            raise
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    return said[0]


def sum_over_group(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """The sum over a group's ranks, the same on each."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def is_set_on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank of the job, tensor-parallel peers included: all ranks get one answer."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gather_strings(items: list[str]) -> list[str]:
    """Every rank's items, rank by rank; the same list on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
