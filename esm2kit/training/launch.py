"""Training runs in its own process, started here from a notebook or the command line, on one device or many.

A Jupyter kernel cannot hold a process group, and a process that dies must not take the notebook along. Several devices
of one node go through torchrun; across nodes torchrun or SLURM start `esm2kit` on each, without this module.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from esm2kit.core.errors import ERROR_FILE, InputError, read_recorded_error
from esm2kit.core.files import atomic_path, to_json
from esm2kit.core.processes import SLURM, TORCHRUN
from esm2kit.training.resume import lock_run_folder


def worker_command(stage: str, config_path: Path, devices: int) -> list[str]:
    """The worker's command line: plain Python for one device, torchrun for several."""
    arguments = ["-m", "esm2kit", stage, "--config", str(config_path)]
    torchrun = ["-m", "esm2kit.training.torchrun", "--standalone", f"--nproc-per-node={devices}"]
    return [sys.executable, *(torchrun if devices > 1 else []), *arguments]


def replace_with_torchrun(stage: str, config: Any) -> NoReturn:
    """Turn this process into torchrun over the stage, so that signals and the exit code are the workers' own."""
    arguments = worker_command(stage, write_config(stage, config), config.devices)
    os.execve(arguments[0], arguments, _clean_environment())


def train(
    stage: str,
    config: Any,
    on_line: Callable[[str], None] = print,
    on_start: Callable[[subprocess.Popen], None] = lambda worker: None,
) -> dict[str, Any]:
    """Run a training stage to its end in a process of its own.

    Args:
        stage: pretrain or finetune.
        config: the stage's dataclass; written to `<out_dir>/<stage>.yaml`, which repeats the run by itself.
        on_line: called with every line of the log, without its line break.
        on_start: called once with the worker, for whoever may want to stop it.

    Returns:
        What the stage wrote to `<out_dir>/<stage>.json`.

    Raises:
        InputError: the worker's own, or one with what is known of how it ended.
        KeyboardInterrupt: once the worker has saved.
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
            start_new_session=True,
            env=_clean_environment() | {ERROR_FILE: str(error_file)},
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
                os.killpg(worker.pid, signal.SIGKILL)
        error = read_recorded_error(error_file)
    if code and isinstance(error, InputError):
        raise error
    if code:
        raise InputError(
            f"{stage} stopped with code {code}: {error or 'see the last lines of its log'}",
            code="worker.failed",
            stage=stage,
            exit_code=code,
        )
    return json.loads((Path(config.out_dir) / f"{stage}.json").read_text())


def stop_worker(worker: subprocess.Popen, on_line: Callable[[str], None] = print) -> None:
    """Ask a worker to finish its update, save and end, and wait until it has."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGTERM)
        for line in worker.stdout:
            on_line(line.rstrip())
        worker.wait()


def write_config(stage: str, config: Any) -> Path:
    """Write a stage's configuration where `esm2kit <stage> --config` reads it: `<out_dir>/<stage>.yaml`.

    Raises: InputError while a run is at work in that folder: its configuration stays what it runs with.
    """
    path = Path(config.out_dir) / f"{stage}.yaml"
    with lock_run_folder(path.parent), atomic_path(path) as part:
        part.write_text(yaml.safe_dump(to_json(config), sort_keys=False))
    return path


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would make the worker think it is somebody's rank."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", TORCHRUN, SLURM)
    # a worker started from a notebook is no kernel: with this left in it would take itself for one, and start workers
    ours += ("JPY_PARENT_PID",)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    # lines, not blocks, so that the log arrives as it is written; and ten minutes, not torchrun's half, for a large
    # model to finish its update and its save after a stop signal
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | environment | {"PYTHONUNBUFFERED": "1"}
