"""`python -m esm2kit.training.torchrun`: torchrun, without its own report where a worker has reported the error."""

import json
import logging
import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from esm2kit.core.errors import ERROR_FILE

# how a worker ends that has reported bad input
INPUT_ERROR_EXIT_CODE = 2


def main() -> int:
    """Start workers as torchrun does.

    Returns:
        0, or 2 where a worker ended so: its error, and not that of a peer who lost it, is the one handed on.

    Raises:
        ChildFailedError: a worker ended in any other way; torchrun's report says which.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default for several workers, of which it warns
    # whom it signalled and who failed is in its report, too, where there is one
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        reported = [failure for failure in error.failures.values() if failure.exitcode == INPUT_ERROR_EXIT_CODE]
        if not reported:
            raise
        if os.environ.get(ERROR_FILE):
            Path(os.environ[ERROR_FILE]).write_text(json.dumps(reported[0].error_file_data))
        return INPUT_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
