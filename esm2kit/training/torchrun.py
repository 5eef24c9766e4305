"""`python -m esm2kit.training.torchrun`: torchrun, without its own report where a worker has reported the error."""

import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# how a worker ends that has told of bad input
TOLD = 2


def main() -> int:
    """Start workers as torchrun does. Returns 0, or 2 where one ended so; any other end is torchrun's to tell."""
    # torchrun's own default for several workers, set so that it does not warn of it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    held: list[str] = []  # who was signalled, who failed: of use with the report

    def hold(record: logging.LogRecord) -> bool:
        held.append(record.getMessage())
        return False

    api.logger.addFilter(hold)
    try:
        run.main()
    except ChildFailedError as error:
        if TOLD in (failure.exitcode for failure in error.failures.values()):
            return TOLD
        print(*held, sep="\n", file=sys.stderr)
        raise
    finally:
        api.logger.removeFilter(hold)
    return 0


if __name__ == "__main__":
    sys.exit(main())
