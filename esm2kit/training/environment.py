"""What Lightning knows about the launcher of this process: what `core.processes` has read, and nothing else.

Lightning's own detection fails for an sbatch script with several tasks and for containers that set LOCAL_RANK.
"""

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from esm2kit.core.process_group import choose_srun_port, find_srun_host
from esm2kit.core.processes import read_launch


class SrunEnvironment(ClusterEnvironment):
    """A task of an srun step. Unlike Lightning's class it does not requeue the job and has no rules on options."""

    creates_processes_externally = True

    @staticmethod
    def detect() -> bool:
        """Return whether srun started this process."""
        return read_launch().launcher == "srun"

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return find_srun_host()

    @property
    def main_port(self) -> int:
        """Port of rank 0."""
        return choose_srun_port()

    def world_size(self) -> int:
        """Return the number of tasks."""
        return read_launch().world_size

    def global_rank(self) -> int:
        """Return the rank of this task."""
        return read_launch().rank

    def local_rank(self) -> int:
        """Return the rank of this task on its node."""
        return read_launch().local_rank

    def node_rank(self) -> int:
        """Return the number of this node."""
        return read_launch().rank // read_launch().local_world_size

    def set_world_size(self, size: int) -> None:
        """Do nothing: srun has set it."""

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: srun has set it."""


class OwnEnvironment(LightningEnvironment):
    """A process that nothing launched, or that Lightning itself launched in a script."""

    @property
    def creates_processes_externally(self) -> bool:
        """Whether this process is one that Lightning launched."""
        return bool(read_launch().launcher)

    def local_rank(self) -> int:
        """Return the rank of this process."""
        return read_launch().local_rank

    def node_rank(self) -> int:
        """Return the number of this node, of one."""
        return 0


def make_environment() -> ClusterEnvironment:
    """Build Lightning's view of the launcher."""
    environments = {"torchrun": TorchElasticEnvironment, "srun": SrunEnvironment}
    return environments.get(read_launch().launcher, OwnEnvironment)()
