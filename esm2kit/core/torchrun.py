"""`python -m esm2kit.core.torchrun`: torchrun without its failure report if a worker has reported the error."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from esm2kit.core.errors import ERROR_FILE, InputError, record_error
from esm2kit.core.processes import SUPERVISED, exit_with_parent

# exit code of a worker that has reported an InputError
INPUT_ERROR_EXIT_CODE = 2


def main() -> int:
    """Start workers with torchrun.

    If a worker reported an InputError, its error is forwarded, and not the connection errors of its peers.

    Returns:
        The exit code: 0, 2 if a worker reported an InputError, 128 + the number of a signal that stopped torchrun, or 1
        if a worker failed in another way and a parent process reports it.

    Raises:
        ChildFailedError: A worker failed in any other way; torchrun's report lists the failures.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, set here to avoid its warning
    supervised = bool(os.environ.pop(SUPERVISED, ""))
    if supervised:
        exit_with_parent()  # the workers notice the death of torchrun, and this is how torchrun notices its parent's
    # torchrun's report repeats these messages
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    if supervised:  # the parent process reports a signal or a failure
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    try:
        run.main()
    except SignalException as stopped:  # the workers have saved
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        reported = [failure for failure in error.failures.values() if failure.exitcode == INPUT_ERROR_EXIT_CODE]
        if reported:
            if os.environ.get(ERROR_FILE):
                Path(os.environ[ERROR_FILE]).write_text(json.dumps(reported[0].error_file_data), encoding="utf-8")
            return INPUT_ERROR_EXIT_CODE
        if not supervised:
            raise
        # a worker that was killed; the others failed because of it
        killed = [(rank, -failure.exitcode) for rank, failure in error.failures.items() if failure.exitcode < 0]
        if killed:
            rank, number = killed[0]
            name = signal.Signals(number).name
            error_line = f"worker {rank} was ended by {name}. Run the same command again to resume."
            record_error(InputError(error_line, code="worker.killed", rank=rank, signal=name))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
