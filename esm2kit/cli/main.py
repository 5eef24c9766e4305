"""The entry point `esm2kit STAGE --key value --config file.yaml`; the table of stages is in `commands`."""

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from esm2kit.cli.commands import STAGES, import_object
from esm2kit.core.errors import InputError, find_closest, record_error, suggest_name
from esm2kit.core.processes import (
    RESULT_FILE,
    VERBOSITY,
    describe_launch,
    exit_with_parent,
    ignore_incomplete_launch,
    is_torchrun_worker,
    is_worker,
    rank,
)
from esm2kit.core.progress import LogHandler
from esm2kit.core.provenance import versions

logger = logging.getLogger(__name__)

HELP = """esm2kit: train, use and evaluate ESM-2 protein language models

usage: esm2kit STAGE [--key value ...] [--config file.yaml]

stages:
{stages}

examples:
  esm2kit embed my.fasta --out_dir vectors
  esm2kit benchmark gb1 --model esm2_t12_35M_UR50D
  esm2kit finetune --config my_settings.yaml --lr 1e-4

`esm2kit help STAGE` shows an example and the parameters of a stage. In names of parameters - and _ are the same.
`esm2kit --version` shows the version, `-q` shows less and `-v` shows more of what a stage does.
New users can start with `esm2kit notebooks DIR`, which copies the notebooks, or in a clone with `make walkthrough`.
"""
# Usually all workers fail with the same error. The others wait this long, so that only rank 0 prints it before torchrun
# stops them.
SECONDS_FOR_FIRST_ERROR = 10
# the path to print last on a terminal: the first of these that a result has
RESULT_PATHS = {"html": "report", "best": "best checkpoint", "predictions": "predictions", "out": "predictions"}
RESULT_PATHS |= {"map": "map", "page": "page", "scores": "scores", "nearest": "nearest"}
# how much a stage logs; workers read the environment variable
LOG_LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
VERBOSITY_OPTIONS = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
# name of a module -> name under which pip installs it, where they differ
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "umap": "umap-learn", "IPython": "ipython"}
DEBUG = "ESM2KIT_DEBUG"  # environment variable: show tracebacks
MAX_ERROR_CHARACTERS = 300
MAX_PATHS = 4
# system errors that a user can fix by choosing another output path or by freeing space
FIXABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Run one stage.

    Args:
        argv: The arguments. Default: those of the command line.

    Returns:
        The exit code: 0, 2 after an InputError, whose message is printed, 130 after an interrupt, or 1 after an
        unexpected exception, whose traceback is written to a file. `esm2kit verify` has two more: 3 if a check failed,
        4 if it could not check.

    Raises:
        Exception: Unexpected exceptions, if the environment variable ESM2KIT_DEBUG is set.
    """
    argv = _read_verbosity(sys.argv[1:] if argv is None else argv)
    if is_torchrun_worker():
        # torchrun starts each worker in its own session, so killing torchrun's process group does not kill the workers;
        # call this first, as a parent that dies while modules are imported would not be noticed
        exit_with_parent()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape what the terminal's encoding cannot represent
            stream.reconfigure(errors="backslashreplace")
    if argv[:1] == ["help"] and argv[1:]:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(stages="\n".join(f"  {name:<11} {stage.help}" for name, stage in STAGES.items())))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"esm2kit {versions()['esm2kit']}")
        return 0
    handler = LogHandler(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # only rank 0 logs its progress
    level = LOG_LEVELS.get(os.environ.get(VERBOSITY, ""), logging.INFO)
    logging.getLogger("esm2kit").setLevel(logging.WARNING if rank() else level)
    # Lightning's messages (unused devices, advertisements) add nothing to esm2kit's own
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").propagate = False
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    # it uses a temporary folder if HOME cannot be written to, which needs no message
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated", module="lightning")
    try:
        return _run(argv[0], argv[1:])
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        handler.close_bar()
        if not rank():
            print("esm2kit: interrupted. Run the same command again to resume.", file=sys.stderr)
        return 130
    except Exception as raised:
        handler.close_bar()
        error = _as_input_error(raised)
        if error and is_worker() and rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun stops this worker while it waits
            time.sleep(SECONDS_FOR_FIRST_ERROR)
        record_error(error or raised)
        if error is None and os.environ.get(DEBUG):
            raise
        print(f"esm2kit: {error or _describe_bug(raised, argv)}", file=sys.stderr)
        return 2 if error else 1


def _read_verbosity(argv: list[str]) -> list[str]:
    """Move -q, -v and their long forms from the arguments to the environment, which workers inherit."""
    for word in argv:
        if word in VERBOSITY_OPTIONS:
            os.environ[VERBOSITY] = VERBOSITY_OPTIONS[word]
    return [word for word in argv if word not in VERBOSITY_OPTIONS]


def _describe_bug(error: Exception, argv: list[str]) -> str:
    """Write the traceback of an unexpected exception to a file, and describe it in one line that names the file."""
    text = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS] or "no message"
    traceback_text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="esm2kit-error-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"esm2kit {' '.join(argv)}\n{json.dumps(versions())}\n\n{traceback_text}")
        place = f"the traceback is in {file.name}"
    except OSError:
        place = f"set {DEBUG}=1 to see the traceback"
    return f"unexpected {type(error).__name__}: {text}. This is a bug; please report it. {place[0].upper()}{place[1:]}."


def _as_input_error(error: Exception) -> InputError | None:
    """Convert errors that a user can fix (a missing package, an output path that cannot be written); None for a bug."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, ModuleNotFoundError) and not (error.name or "esm2kit").startswith("esm2kit"):
        package = error.name.partition(".")[0]
        package = DISTRIBUTIONS.get(package, package)
        return InputError(
            f"the package {package} is not installed for {sys.executable}. Run `pip install {_find_extra(package)}`, "
            "or activate the environment in which esm2kit is installed.",
            code="package.missing",
            name=package,
        )
    if isinstance(error, OSError) and error.errno in FIXABLE:
        # EEXIST: a folder cannot be created where a file has its name
        exists = error.errno == errno.EEXIST
        found = "a file with this name exists. Choose another folder." if exists else f"cannot write ({error.strerror})"
        path = error.filename or "the output"
        return InputError(f"{path}: {found}", code="output.unwritable", path=path, errno=error.errno)
    return None


def _find_extra(package: str) -> str:
    """Return what installs a package: the notebooks' extra if the package is in it, otherwise the package."""
    listed = re.compile(rf"{re.escape(package)}(?![\w.-]).*extra == .notebooks.")
    with contextlib.suppress(metadata.PackageNotFoundError):
        if any(listed.match(line) for line in metadata.requires("esm2kit") or []):
            return '"esm2kit[notebooks]"'
    return package


def _run(name: str, arguments: list[str]) -> int:
    """Parse the arguments of a stage and run it, on several devices through torchrun."""
    if name not in STAGES:
        raise InputError(
            f"unknown stage {name!r}; {suggest_name(name, STAGES)}",
            code="stage.unknown",
            name=name,
            nearest=find_closest(name, STAGES),
        )
    _check_locale(arguments)
    from esm2kit.cli.arguments import parse

    stage = STAGES[name]
    config = parse(import_object(stage.config), f"esm2kit {name}", arguments, stage.positional, stage.example)
    result_file = os.environ.get(RESULT_FILE)  # set by the process that started this one and reports for it
    if (launch := describe_launch()) and rank() == 0 and not result_file:
        logger.info("%s", launch)
    ignore_incomplete_launch()
    if hasattr(config, "check_inputs"):
        config.check_inputs()  # takes a fraction of the time that importing torch takes
    if stage.trains and not is_worker():
        from esm2kit.training import launch, trainer

        if config.num_nodes > 1:
            raise InputError(
                f"num_nodes is {config.num_nodes}: start `esm2kit {name}` with torchrun or srun on every node",
                code="launch.nodes",
                num_nodes=config.num_nodes,
            )
        if config.devices > 1:
            # report what this machine cannot do once, not once per worker
            config.layout  # noqa: B018
            trainer.check_devices(config)
            launch.replace_with_torchrun(name, config)
    if is_torchrun_worker() and not stage.trains:  # torchrun stops its workers with SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = import_object(stage.function)(config)
    if result_file:
        from esm2kit.core.files import write_json

        if not rank():
            write_json(Path(result_file), result._asdict() if hasattr(result, "_asdict") else result)
        return 0
    summary = summarise(result, sys.stdout.isatty(), getattr(config, "out_dir", None))
    if summary and not rank():  # every process of a torchrun or srun job has the result
        print(summary)
    return getattr(result, "exit_code", 0)


def _check_locale(arguments: list[str]) -> None:
    """Check that Python could decode the arguments; bytes that the locale's encoding lacks become surrogates."""
    for argument in arguments:
        if not argument.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in argument):
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            encoding = sys.getfilesystemencoding()
            remedy = "rename it" if encoding == "utf-8" else "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            raise InputError(
                f"'{shown}' cannot be read as text in the encoding of this locale, {encoding}: {remedy}",
                code="locale.argument",
                found=shown,
                encoding=encoding,
            )


def summarise(result: Any, on_terminal: bool = False, folder: Path | None = None) -> str:
    """Summarise the result of a stage.

    Args:
        result: The result of the stage's function.
        on_terminal: Whether a person reads the output.
        folder: The stage's out_dir, in which a manifest's files lie.

    Returns:
        JSON in one line, without nested parts except "files", the paths of all files that were written. On a terminal
        only these paths (their number and folder, if there are many), the main output last, and with --quiet the
        verdict. Text is returned unchanged.
    """
    from esm2kit.core.files import to_json

    plain = to_json(result._asdict() if hasattr(result, "_asdict") else result)  # embed returns a NamedTuple
    if not isinstance(plain, dict) or not plain:
        return str(plain or "")
    files = to_json(getattr(result, "paths", plain.get("files", [])))
    if isinstance(files, dict):  # the files of a dataset, by name
        files = [str(Path(folder or "") / name) for name in (*files, "manifest.json")]
    if on_terminal:
        shown = [(label, plain[name]) for name, label in RESULT_PATHS.items() if plain.get(name)][:1]
        others = [path for path in files if path not in [path for _, path in shown]]
        wrote = ", ".join(others)
        if len(others) > MAX_PATHS:
            wrote = f"{len(others)} files in {os.path.commonpath([Path(path).parent for path in others]) or '.'}"
        lines = [f"{label}: {path}" for label, path in [("wrote", wrote), *shown] if path]
        if plain.get("verdict") and not logger.isEnabledFor(logging.INFO):  # otherwise the log has shown it
            lines.append(plain["verdict"])
        return "\n".join(lines)
    values = {key: value for key, value in plain.items() if not isinstance(value, dict | list)}
    return json.dumps(values | {"files": files} if files else values)
