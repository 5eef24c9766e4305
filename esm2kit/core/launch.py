"""Start a stage in processes of its own, on one device or several, and pass on its log lines, its result and its error.

A Jupyter kernel or a script cannot join a process group, and a crash of a worker must not end it. On one node torchrun
starts the workers. On several nodes the user starts `esm2kit` with torchrun or SLURM instead.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from esm2kit.core.errors import ERROR_FILE, InputError, read_recorded_error
from esm2kit.core.files import to_json
from esm2kit.core.processes import (
    RESULT_FILE,
    SRUN,
    SUPERVISED,
    TORCHRUN,
    VERBOSITY,
    check_platform,
    is_worker,
    kill_group,
    new_group,
    read_launch,
    stop_group,
)

logger = logging.getLogger(__name__)


def worker_command(stage: str, config_path: Path, devices: int) -> list[str]:
    """Build the worker's command line: plain Python for one device, torchrun for several."""
    check_platform(devices)
    arguments = ["-m", "esm2kit", stage, "--config", str(config_path)]
    torchrun = ["-m", "esm2kit.core.torchrun", "--standalone", f"--nproc-per-node={devices}"]
    return [sys.executable, *(torchrun if devices > 1 else []), *arguments]


def starts_workers(devices: int) -> bool:
    """Return whether this process starts the workers of a stage, and does not compute itself.

    Args:
        devices: Devices per node that were requested.

    Returns:
        True if several devices were requested and no launcher has started this process.

    Raises:
        InputError: A launcher has started another number of workers.
    """
    if devices == 1:
        return False
    found = read_launch().local_world_size
    if is_worker() and found != devices:
        raise InputError(
            f"{found} workers were started on this node, but devices is {devices}. Set --devices to the number of "
            "workers per node.",
            code="devices.workers",
            found=found,
            expected=devices,
        )
    return not is_worker()


def check_device_count(device: str, devices: int) -> None:
    """Check that several devices of a kind exist.

    Args:
        device: auto, cpu, cuda or mps; on the CPU each device is a process.
        devices: Number of devices.

    Raises:
        InputError: The system, or this machine's GPUs, do not allow so many.
    """
    check_platform(devices)
    import torch  # slow import

    from esm2kit.core.hardware import resolve_device

    kind = resolve_device(device)
    found = {"cuda": torch.cuda.device_count(), "cpu": devices}.get(kind, 1)
    if found < devices:
        raise InputError(
            f"{devices} devices were requested, but torch finds {found}. Lower --devices.",
            code="devices.missing",
            found=found,
            requested=devices,
        )


def run_in_workers(stage: str, config: Any, log: logging.Logger) -> dict[str, Any]:
    """Run a stage with one process per device, and wait for its result.

    Args:
        stage: Name of the command, such as `embed`.
        config: The stage's dataclass, with `device` and `devices`.
        log: Logger of the stage; it gets the lines of the first worker, and the warnings of the others.

    Returns:
        The result of the stage, as values of JSON.

    Raises:
        InputError: There are fewer devices, or a worker reported bad input, crashed or was killed.
        KeyboardInterrupt: The user interrupted the run; raised after the workers have recorded what is done.
    """
    check_device_count(config.device, config.devices)
    level = logging.INFO if log.isEnabledFor(logging.INFO) else logging.WARNING

    def show(line: str) -> None:
        if not line.startswith("esm2kit: ") or line.startswith("esm2kit: unexpected"):  # other errors are raised below
            log.log(level, "%s", line)

    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / f"{stage}.yaml", Path(folder) / "result.json"
        path.write_text(yaml.safe_dump(to_json(config), sort_keys=False), encoding="utf-8")
        more = {RESULT_FILE: str(result), SUPERVISED: "1"}
        if level == logging.WARNING:
            more[VERBOSITY] = "quiet"
        logger.debug("starting %d workers", config.devices)
        run_worker(worker_command(stage, path, config.devices), stage, show, environment=more)
        return json.loads(result.read_text(encoding="utf-8"))


def run_worker(
    arguments: list[str],
    stage: str,
    on_line: Callable[[str], None],
    on_start: Callable[[subprocess.Popen], None] = lambda worker: None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a worker or torchrun, and pass on its lines and its error.

    Args:
        arguments: The command line, from `worker_command`.
        stage: Name of the command, for messages.
        on_line: Called with each line of the log, without its line break.
        on_start: Called once with the worker process, for example to keep it for a Stop button.
        environment: More environment variables.

    Raises:
        InputError: The worker reported bad input, crashed or was killed.
        KeyboardInterrupt: The user interrupted the run; raised after the worker has saved.
    """
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        given = {ERROR_FILE: str(error_file), "PYTHONIOENCODING": "utf-8"} | dict(environment or {})
        worker = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env=clean_environment() | given,
            **new_group(),
            encoding="utf-8",
        )
        on_start(worker)
        try:
            for line in worker.stdout:
                on_line(line.rstrip())
            code = worker.wait()
        except KeyboardInterrupt:
            stop_worker(worker, on_line)
            raise
        finally:
            if worker.poll() is None:
                kill_group(worker)
        error = read_recorded_error(error_file)
    if code and isinstance(error, InputError):
        raise error
    if code:
        raise InputError(
            f"{stage} ended with exit code {code}: {error or 'see the last lines of its log'}",
            code="worker.failed",
            stage=stage,
            exit_code=code,
        )


def stop_worker(worker: subprocess.Popen, on_line: Callable[[str], None] = print) -> None:
    """Send SIGTERM to a worker and wait until it has finished its update, saved and exited."""
    if worker.poll() is None:
        stop_group(worker)
        for line in worker.stdout:
            on_line(line.rstrip())
        worker.wait()


def clean_environment() -> dict[str, str]:
    """Copy this process's environment without the variables that would make the worker take itself for a rank."""
    removed = (*TORCHRUN, *SRUN, "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
    # with this variable, a worker started from a notebook takes itself for a kernel and starts workers of its own
    removed += ("JPY_PARENT_PID",)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    # Unbuffered output delivers each log line immediately. After a stop signal a large model needs more than torchrun's
    # default of 30 seconds to finish its update and save; 600 seconds is enough.
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | environment | {"PYTHONUNBUFFERED": "1"}
