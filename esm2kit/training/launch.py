"""Start training in its own process, from a notebook or the command line, on one or several devices."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.files import atomic_path, to_json
from esm2kit.core.launch import clean_environment, run_worker, stop_worker, worker_command
from esm2kit.training.resume import lock_run_folder

__all__ = ["replace_with_torchrun", "stop_worker", "train", "worker_command", "write_config"]


def replace_with_torchrun(stage: str, config: Any) -> NoReturn:
    """Replace this process with torchrun, so that signals reach the workers and their exit code is returned."""
    arguments = worker_command(stage, write_config(stage, config), config.devices)
    os.execve(arguments[0], arguments, clean_environment())


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
    run_worker(worker_command(stage, write_config(stage, config), config.devices), stage, on_line, on_start)
    return read_sealed_json(Path(config.out_dir) / f"{stage}.json", "train again")


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
