"""`esm2kit <stage> --config file.yaml --key value` for every stage of the table in `commands`."""

import errno
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from typing import Any

from esm2kit.cli.commands import STAGES, import_object
from esm2kit.core.errors import InputError, find_closest, record_error, suggest_name
from esm2kit.core.processes import TORCHRUN, exit_with_parent, is_worker, rank

TOUR = """esm2kit: train, use and judge ESM-2 protein language models

usage: esm2kit <stage> [--key value ...] [--config file.yaml]

stages, in the order of the story:
{stages}

`esm2kit <stage> --help` shows a whole call and every parameter, which are the fields of the stage's dataclass.
New here: `make walkthrough`, or open notebooks/00_start_here.ipynb in JupyterLab.
"""
# Workers fail alike for the most part: the others wait until torchrun, once the first has ended, has stopped them.
SECONDS_FOR_FIRST_ERROR = 10
# what a person on a terminal reads of a result: the first of these that it has; other stages' last lines name a file
CLOSING = {"html": "report", "best": "best checkpoint", "predictions": "predictions"}
# what the system says of a place that cannot be written, where a person can choose another or make room
FIXABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Run one stage. Returns the exit code: 0, or 2 after one line on what was wrong with the input."""
    argv = sys.argv[1:] if argv is None else argv
    if TORCHRUN in os.environ:
        # it starts its workers in sessions of their own, which a killed group leaves behind; a parent that died while
        # this one was loading could not be told from the one that stands in for it, so the watch begins here
        exit_with_parent()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(TOUR.format(stages="\n".join(f"  {name:<11} {stage.help}" for name, stage in STAGES.items())))
        return 0
    if argv[0] == "--version":
        print(f"esm2kit {importlib.metadata.version('esm2kit')}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # one voice: of many ranks the first one tells how it goes
    logging.getLogger("esm2kit").setLevel(logging.WARNING if rank() else logging.INFO)
    # Lightning's own lines (devices it did not find, advertisements) say nothing that ours do not
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").propagate = False
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated", module="lightning")
    try:
        return _run(argv[0], argv[1:])
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("esm2kit: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except Exception as raised:
        error = _as_input_error(raised)
        if error and is_worker() and rank():
            time.sleep(SECONDS_FOR_FIRST_ERROR)
        record_error(error or raised)
        if error is None:
            raise
        print(f"esm2kit: {error}", file=sys.stderr)
        return 2


def _as_input_error(error: Exception) -> InputError | None:
    """What a user can fix as an InputError: a missing package, a place that cannot be written; None for a bug."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, ModuleNotFoundError) and not (error.name or "esm2kit").startswith("esm2kit"):
        fix = "`make setup` and `source .venv/bin/activate`, or install esm2kit into this Python"
        return InputError(
            f"{sys.executable} lacks the package {error.name}: {fix}", code="package.missing", name=error.name
        )
    if isinstance(error, OSError) and error.errno in FIXABLE:
        # a folder was to be made, and a file has its name
        found = "a file is there; name a folder" if error.errno == errno.EEXIST else error.strerror
        path = error.filename or "output"
        return InputError(f"{path}: {found}", code="output.unwritable", path=path, errno=error.errno)
    return None


def _run(name: str, arguments: list[str]) -> int:
    if name not in STAGES:
        raise InputError(
            f"unknown stage {name!r}; {suggest_name(name, STAGES)}",
            code="stage.unknown",
            name=name,
            nearest=find_closest(name, STAGES),
        )
    from esm2kit.cli.arguments import parse

    stage = STAGES[name]
    config = parse(import_object(stage.config), f"esm2kit {name}", arguments, stage.bare, stage.example)
    if stage.trains and not is_worker():
        from esm2kit.training import launch, trainer

        if config.num_nodes > 1:
            raise InputError(
                f"num_nodes {config.num_nodes}: start `esm2kit {name}` by torchrun or srun on every node",
                code="launch.nodes",
                num_nodes=config.num_nodes,
            )
        if config.devices > 1:
            # what this machine cannot do is reported once, and not by every worker
            config.layout  # noqa: B018
            trainer.check_devices(config)
            launch.replace_with_torchrun(name, config)
    result = import_object(stage.function)(config)
    summary = summarise(result, sys.stdout.isatty())
    if summary:
        print(summary)
    return 0


def summarise(result: Any, on_terminal: bool = False) -> str:
    """A stage's result in one line: JSON for a program, the long parts left to the files it names; for a person a path.

    Args:
        result: of the stage's function; text is printed as it is.
        on_terminal: a person reads it.
    """
    from esm2kit.core.files import to_json

    plain = to_json(result._asdict() if hasattr(result, "_asdict") else result)  # embed's is a NamedTuple
    if not isinstance(plain, dict) or not plain:
        return str(plain or "")
    if on_terminal:
        return next((f"{label}: {plain[name]}" for name, label in CLOSING.items() if plain.get(name)), "")
    return json.dumps({key: value for key, value in plain.items() if not isinstance(value, dict | list)})
