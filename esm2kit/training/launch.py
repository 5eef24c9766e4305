"""Training runs in a process of its own, started here: from a notebook or the command line, on one device or many.

A Jupyter kernel cannot hold a process group, and a process that dies must not take the notebook along. Several devices
of one node go through torchrun; across nodes torchrun or SLURM start `esm2kit` on each, and this room is not entered.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, to_json
from esm2kit.core.processes import SLURM, TORCHRUN
from esm2kit.training.resume import alone_in

# the line of a worker's log that says what went wrong: ours, or the end of a traceback (not torchrun's own)
FAULT = re.compile(r"(^|\]:\s*)(esm2kit: |(?!torch\.distributed)[\w.]*(Error|Exception): )")


def command(stage: str, config_path: Path, devices: int) -> list[str]:
    """The worker's command line: plain Python for one device, torchrun for several."""
    arguments = ["-m", "esm2kit", stage, "--config", str(config_path)]
    if devices == 1:
        return [sys.executable, *arguments]
    return [
        sys.executable,
        "-m",
        "esm2kit.training.torchrun",
        "--standalone",
        f"--nproc-per-node={devices}",
        *arguments,
    ]


def start(stage: str, config: Any) -> subprocess.Popen:
    """Start a training stage in its own process; its log comes out of `stdout` line by line.

    Args:
        stage: pretrain or finetune.
        config: the stage's dataclass; written to `<out_dir>/<stage>.yaml`, which repeats the run by itself.
    """
    config_path = write_config(stage, config)
    return subprocess.Popen(
        command(stage, config_path, config.devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,
        env=_clean_environment(),
    )


def become(stage: str, config: Any) -> NoReturn:
    """Turn this process into torchrun over the stage, so that signals and the exit code are the workers' own."""
    arguments = command(stage, write_config(stage, config), config.devices)
    os.execve(arguments[0], arguments, _clean_environment())


def train(
    stage: str,
    config: Any,
    show: Callable[[str], None] = print,
    started: Callable[[subprocess.Popen], None] = lambda worker: None,
) -> dict[str, Any]:
    """Run a training stage to its end, handing on each line of its log.

    Args:
        stage: pretrain or finetune.
        config: the stage's dataclass.
        show: called with every line, without its line break.
        started: called once with the worker, for whoever may want to stop it.
    Returns: what the stage wrote to `<out_dir>/<stage>.json`.
    Raises: InputError with the line that tells why, if it failed; KeyboardInterrupt once the worker has saved.
    """
    worker = start(stage, config)
    started(worker)
    last = ""
    try:
        for line in worker.stdout:
            if FAULT.search(line):
                last = line.split("]:")[-1].strip()
            show(line.rstrip())
        code = worker.wait()
    except KeyboardInterrupt:
        stop(worker, show)
        raise
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    if code:
        raise InputError(f"{stage} stopped with code {code}: {last or 'see the last lines of its log'}")
    return json.loads((Path(config.out_dir) / f"{stage}.json").read_text())


def stop(worker: subprocess.Popen, show: Callable[[str], None] = print) -> None:
    """Ask a worker to finish its update, save and end, and wait until it has."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGTERM)
        for line in worker.stdout:
            show(line.rstrip())
        worker.wait()


def write_config(stage: str, config: Any) -> Path:
    """Write a stage's configuration where `esm2kit <stage> --config` reads it: `<out_dir>/<stage>.yaml`.

    Raises: InputError while a run is at work in that folder: its configuration stays what it runs with.
    """
    path = Path(config.out_dir) / f"{stage}.yaml"
    with alone_in(path.parent), atomic_path(path) as part:
        part.write_text(yaml.safe_dump(to_json(config), sort_keys=False))
    return path


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would make the worker think it is somebody's rank."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", TORCHRUN, SLURM)
    # a worker started from a notebook is no kernel: with this left in it would take itself for one, and start workers
    ours += ("JPY_PARENT_PID",)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    # lines, not blocks, so that the log arrives as it is written; and ten minutes, not torchrun's half, for a large
    # model to finish its update and its save once it is told to stop
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | environment | {"PYTHONUNBUFFERED": "1"}
