"""`python -m esm2kit.training.torchrun`: torchrun without its failure report if a worker has reported the error."""

import json
import logging
import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from esm2kit.core.errors import ERROR_FILE

# exit code of a worker that has reported an InputError
INPUT_ERROR_EXIT_CODE = 2


def main() -> int:
    """Start workers with torchrun.

    If a worker reported an InputError, its error is forwarded, and not the connection errors of its peers.

    Returns:
        The exit code: 0, or 2 if a worker reported an InputError.

    Raises:
        ChildFailedError: A worker failed in any other way; torchrun's report lists the failures.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, set here to avoid its warning
    # torchrun's report repeats these messages
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        reported = [failure for failure in error.failures.values() if failure.exitcode == INPUT_ERROR_EXIT_CODE]
        if not reported:
            raise
        if os.environ.get(ERROR_FILE):
            Path(os.environ[ERROR_FILE]).write_text(json.dumps(reported[0].error_file_data), encoding="utf-8")
        return INPUT_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
