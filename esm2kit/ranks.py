"""Who this process is among the workers of a job, by torchrun's word or SLURM's."""

import os

# Set for each worker by torchrun, and by srun; a lone srun task, or a shell inside an allocation, is no worker.
TORCHRUN, SLURM = "LOCAL_RANK", "SLURM_PROCID"


def rank() -> int:
    """This process's rank among all workers; 0 where there are no others."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ[SLURM]) if is_worker() else 0


def is_worker() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return TORCHRUN in os.environ or (SLURM in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1)
