"""Start training in its own process, from a notebook or the command line, on one or several devices.

A Jupyter kernel cannot join a process group, and a crash in training must not end the kernel. On one node this module
starts torchrun for several devices. On several nodes the user starts `esm2kit` with torchrun or SLURM instead.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.errors import ERROR_FILE, InputError, read_recorded_error
from esm2kit.core.files import atomic_path, to_json
from esm2kit.core.processes import SRUN, TORCHRUN, check_platform, kill_group, new_group, stop_group
from esm2kit.training.resume import lock_run_folder


def worker_command(stage: str, config_path: Path, devices: int) -> list[str]:
    """Build the worker's command line: plain Python for one device, torchrun for several."""
    check_platform(devices)
    arguments = ["-m", "esm2kit", stage, "--config", str(config_path)]
    torchrun = ["-m", "esm2kit.training.torchrun", "--standalone", f"--nproc-per-node={devices}"]
    return [sys.executable, *(torchrun if devices > 1 else []), *arguments]


def replace_with_torchrun(stage: str, config: Any) -> NoReturn:
    """Replace this process with torchrun, so that signals reach the workers and their exit code is returned."""
    arguments = worker_command(stage, write_config(stage, config), config.devices)
    os.execve(arguments[0], arguments, _clean_environment())


def train(
    stage: str,
    config: Any,
    on_line: Callable[[str], None] = print,
    on_start: Callable[[subprocess.Popen], None] = lambda worker: None,
) -> dict[str, Any]:
    """Run a training stage in a separate process and wait for its result.

    Args:
        stage: `pretrain` or `finetune`.
        config: The stage's dataclass. It is written to `<out_dir>/<stage>.yaml`, which is enough to repeat the run.
        on_line: Called with each line of the log, without its line break.
        on_start: Called once with the worker process, for example to keep it for a Stop button.

    Returns:
        The content of `<out_dir>/<stage>.json`.

    Raises:
        InputError: The worker reported bad input, crashed or was killed.
        KeyboardInterrupt: The user interrupted the run; raised after the worker has saved.
    """
    arguments = worker_command(stage, write_config(stage, config), config.devices)
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        worker = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env=_clean_environment() | {ERROR_FILE: str(error_file), "PYTHONIOENCODING": "utf-8"},
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
    return read_sealed_json(Path(config.out_dir) / f"{stage}.json", "train again")


def stop_worker(worker: subprocess.Popen, on_line: Callable[[str], None] = print) -> None:
    """Send SIGTERM to a worker and wait until it has finished its update, saved and exited."""
    if worker.poll() is None:
        stop_group(worker)
        for line in worker.stdout:
            on_line(line.rstrip())
        worker.wait()


def write_config(stage: str, config: Any) -> Path:
    """Write a stage's configuration to `<out_dir>/<stage>.yaml`, for `esm2kit <stage> --config`.

    Args:
        stage: `pretrain` or `finetune`.
        config: The stage's dataclass.

    Returns:
        The path of the YAML file.

    Raises:
        InputError: Another run is training in the folder; its configuration is not overwritten.
    """
    path = Path(config.out_dir) / f"{stage}.yaml"
    with lock_run_folder(path.parent), atomic_path(path) as part:
        part.write_text(yaml.safe_dump(to_json(config), sort_keys=False), encoding="utf-8")
    return path


def _clean_environment() -> dict[str, str]:
    """Copy this process's environment without the variables that would make the worker take itself for a rank."""
    removed = (*TORCHRUN, *SRUN, "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
    # with this variable, a worker started from a notebook takes itself for a kernel and starts workers of its own
    removed += ("JPY_PARENT_PID",)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    # Unbuffered output delivers each log line immediately. After a stop signal a large model needs more than torchrun's
    # default of 30 seconds to finish its update and save; 600 seconds is enough.
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | environment | {"PYTHONUNBUFFERED": "1"}
