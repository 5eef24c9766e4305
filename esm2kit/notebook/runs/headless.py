"""One notebook, headless: executed in a kernel of its own, rendered, and what it made put into the run's manifest."""

import ast
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, sha256_file
from esm2kit.core.provenance import git_commit, versions
from esm2kit.notebook.runs.history import HEADLESS, format_number, metric_label
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS, Artefact, NotebookRun, RunManifest
from esm2kit.notebook.runs.pages import notebook_page, run_page

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0
MAX_LINE_LENGTH = 100  # letters of a line
# Inputs larger than this are named in the manifest by size alone; the artefacts made from them carry their hashes.
MAX_HASHED_BYTES = 256 * 2**20


def known_parameters(notebook: Path) -> dict[str, Any]:
    """A notebook's parameters and their defaults, as papermill reads them.

    Raises: InputError if the notebook is not there, or a default is worked out instead of written down.
    """
    import papermill

    if not notebook.is_file():
        raise InputError(
            f"{notebook} is not there any more; `git log -- {notebook.name}` tells where it went",
            code="notebook.absent",
            path=str(notebook),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inspected = papermill.inspect_notebook(str(notebook))
    known = {}
    for name, facts in inspected.items():
        try:
            known[name] = ast.literal_eval(facts["default"])
        except (ValueError, SyntaxError):
            problem = f"parameter {name} is {facts['default']}; write a number, a text, True or False"
            raise InputError(
                f"{notebook}: {problem}, and work out the rest in a cell below",
                code="notebook.default",
                name=name,
                found=facts["default"],
            ) from None
    return known


def run_notebook(
    root: Path, folder: Path, notebook: str, parameters: dict[str, Any], manifest: RunManifest
) -> RunManifest:
    """Execute one notebook, render it, and write what it made into the manifest.

    Returns:
        The manifest with the notebook's entry, as it is on disk.

    Raises:
        InputError: the notebook failed; the manifest on disk says where.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, executed = root / "notebooks" / f"{notebook}.ipynb", folder / f"{notebook}.ipynb"
    artefacts = folder / "artefacts"
    known = known_parameters(source)
    if "work_dir" in known:
        parameters = {"work_dir": str(artefacts)} | parameters
    inputs = _hash_inputs(source.parent, known | parameters)
    entry = NotebookRun(known | parameters, "running", source_sha256=sha256_file(source), inputs=inputs)
    _write_run_files(folder, manifest.with_notebook(notebook, entry))
    began = time.monotonic()
    error = None
    with _log_progress(notebook, began, folder) as progress, _headless_environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            papermill.execute_notebook(
                str(source),
                str(executed),
                parameters,
                cwd=str(source.parent),
                progress_bar=False,
                log_output=True,
                kernel_name="python3",
                # a kernel on this machine's own loopback need not warn of eavesdroppers
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        except PapermillExecutionError as failure:
            # counted in the notebook as it is in git: papermill puts a cell of parameters before
            error = f"cell {failure.exec_count - bool(parameters)}: {failure.ename}: {failure.evalue}"
        except DeadKernelError:
            begun = json.loads(executed.read_text())["cells"][: progress.cell]
            number = sum(cell["cell_type"] == "code" for cell in begun) - bool(parameters)
            error = f"cell {number}: the kernel died, possibly out of memory"
    entry = replace(
        entry,
        status="failed" if error else "done",
        seconds=round(time.monotonic() - began, 1),
        silent_seconds=progress.longest_silences(executed, bool(parameters)),
        error=error,
        **({} if error else _read_record(source, parameters.get("work_dir", str(artefacts)))),
    )
    _write_text(folder / f"{notebook}.html", notebook_page(executed))
    manifest = manifest.with_notebook(notebook, entry)
    _write_run_files(folder, manifest)
    if error:
        again = f"esm2kit run --tier {manifest.tier} --resume"
        raise InputError(
            f"{notebook} failed in {error} (see {executed}); fix it, then `{again}`",
            code="run.notebook-failed",
            notebook=notebook,
            error=error,
        )
    figures = "  ".join(f"{metric_label(name)} {format_number(value)}" for name, value in entry.figures.items())
    print(f"{notebook:<16}{entry.seconds:>6.0f} s  {figures}", flush=True)
    return manifest


def _write_run_files(folder: Path, manifest: RunManifest) -> None:
    manifest.write(folder)
    _write_text(folder / "index.html", run_page(folder.name, manifest))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def _read_record(source: Path, work_dir: str) -> dict[str, Any]:
    """The fields `made`, `figures` and `result` from a notebook's record; relative paths count from its own folder."""
    path = source.parent / work_dir / "records" / f"{source.stem}.json"
    if not path.exists():
        return {}
    recorded = json.loads(path.read_text())
    made = {}
    for name, where in recorded["made"].items():
        there = os.path.normpath(source.parent / where)
        made[name] = hash_artefact(there, Path(there))
    return {"made": made, "figures": recorded["figures"], "result": recorded.get("result", "")}


class _ProgressHandler(logging.Handler):
    """Papermill's log of a notebook at work: what its cells print, when, and for how long they print nothing.

    Args:
        notebook: its name.
        began: when, on the monotonic clock.
        folder: the run's; a path in it is shown from there on.
    """

    def __init__(self, notebook: str, began: float, folder: Path) -> None:
        super().__init__()
        self.notebook, self.began, self.folder = notebook, began, folder
        self.shown = self.heard = began
        self.cell = 0
        self.silent: dict[int, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text, now = record.getMessage(), time.monotonic()
        started = re.match(r"Executing Cell (\d+)-", text)
        if started:
            self.cell, self.heard = int(started[1]), now
            return
        self.silent[self.cell] = max(self.silent.get(self.cell, 0.0), now - self.heard)
        self.heard = now
        if text.startswith(("Executing ", "Ending ", "Input Notebook", "Output Notebook")):
            return
        # a row of a table says nothing by itself
        lines = [line for line in text.splitlines() if line.strip(" -") and line[0] != "<" and " " * 3 not in line]
        if lines and now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            line = lines[-1].replace(f"{self.folder}/", "")
            line = line if len(line) <= MAX_LINE_LENGTH else f"{line[: MAX_LINE_LENGTH - 2]} …"
            logger.info("%-16s%6.0f s  %s", self.notebook, now - self.began, line)

    def longest_silences(self, executed: Path, injected: bool) -> dict[str, float]:
        """Code cell as counted in git -> seconds of its longest silence, where it is a second or more."""
        cells = json.loads(executed.read_text())["cells"]
        counts = {place: cell.get("execution_count") for place, cell in enumerate(cells, 1)}
        return {
            str(counts[place] - injected): round(seconds, 1)
            for place, seconds in self.silent.items()
            if seconds >= 1 and counts.get(place)
        }


@contextmanager
def _log_progress(notebook: str, began: float, folder: Path) -> Iterator[_ProgressHandler]:
    """Hand on the notebook's latest line of output every so often, so that a long cell is seen to move."""
    source = logging.getLogger("papermill")
    handler = _ProgressHandler(notebook, began, folder)
    source.handlers, source.propagate = [handler], False
    source.setLevel(logging.INFO)
    # what the kernel and the renderer say about themselves is nothing the reader can act on
    for name in ("traitlets", "asyncio", "blib2to3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield handler
    finally:
        source.handlers = []


@contextmanager
def _headless_environment() -> Iterator[None]:
    """Kernels started in here know that nobody looks at them, and that no notebook of JupyterLab's is theirs."""
    before = {name: os.environ.pop(name, None) for name in (HEADLESS, "JPY_SESSION_NAME")}
    os.environ[HEADLESS] = "1"
    try:
        yield
    finally:
        os.environ.pop(HEADLESS)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def hash_artefact(name: str, path: Path) -> Artefact:
    """Bytes and SHA-256 of a file, or of a folder's files and their names; a large one by its bytes alone.

    Args:
        name: the path as the manifest is to have it.
        path: where it is.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    if size > MAX_HASHED_BYTES:
        return Artefact(name, size)
    if path.is_file():
        return Artefact(name, size, sha256_file(path))
    lines = "\n".join(f"{sha256_file(file)}  {file.relative_to(path)}" for file in files)
    return Artefact(name, size, hashlib.sha256(lines.encode()).hexdigest())


def _hash_inputs(folder: Path, parameters: Mapping[str, Any]) -> dict[str, Artefact]:
    """Parameter -> the file or folder it names."""
    found = {}
    for name, value in parameters.items():
        path = folder / value if isinstance(value, str) and value and name not in LOCATION_PARAMETERS else None
        if path is None or not path.exists():
            continue
        found[name] = hash_artefact(value, path)
    return found


def new_manifest(tier: str, folder: Path) -> RunManifest:
    """A run's manifest before its first notebook; every installed package goes to environment.txt beside it."""
    installed = {f"{each.name}=={each.version}" for each in importlib.metadata.distributions()}
    _write_text(folder / "environment.txt", "\n".join(sorted(installed, key=str.lower)) + "\n")
    return RunManifest(
        tier,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        git_commit=git_commit(),
        versions=versions(),
        machine={"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    )
