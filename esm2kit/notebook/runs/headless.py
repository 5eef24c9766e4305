"""Run one notebook headless: execute it in its own kernel, render it, and record the results in the manifest."""

import ast
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, sha256_file
from esm2kit.core.provenance import git_commit, versions
from esm2kit.notebook.runs.history import HEADLESS, format_number, metric_label
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS, Artefact, NotebookRun, RunManifest
from esm2kit.notebook.runs.pages import render_notebook_page, render_run_page, replace_navigation

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0
MAX_LINE_LENGTH = 100  # characters
# Larger files are recorded by size alone; the artefacts created from them contain their hashes.
MAX_HASHED_BYTES = 256 * 2**20


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Read the parameters of a notebook and their defaults with papermill.

    Args:
        notebook: the .ipynb file.

    Returns:
        Parameter -> default.

    Raises:
        InputError: the notebook does not exist or is damaged, or a default is not a literal.
    """
    import papermill

    if not notebook.is_file():
        raise InputError(
            f"{notebook} no longer exists: `git log -- {notebook.name}` shows when it was moved",
            code="notebook.absent",
            path=str(notebook),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inspected = papermill.inspect_notebook(str(notebook))
        except Exception as error:  # nbformat raises errors of many kinds
            raise InputError(
                f"{notebook} is not a notebook ({' '.join(str(error).split())[:100]}). Restore it, such as with git.",
                code="notebook.damaged",
                path=str(notebook),
            ) from error
    known = {}
    for name, found in inspected.items():
        try:
            known[name] = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError):
            problem = f"the default of {name} is {found['default']}: use a number, a string, True or False"
            raise InputError(
                f"{notebook}: {problem}, and compute the rest in a later cell",
                code="notebook.default",
                name=name,
                found=found["default"],
            ) from None
    return known


def run_notebook(
    root: Path, folder: Path, notebook: str, parameters: dict[str, Any], manifest: RunManifest
) -> RunManifest:
    """Execute one notebook, render it, and record its results in the manifest.

    Args:
        root: folder that contains notebooks/.
        folder: folder of the run.
        notebook: name of the notebook.
        parameters: parameter -> value; defaults apply to the others.
        manifest: manifest of the run so far.

    Returns:
        The manifest with the notebook's entry, as saved.

    Raises:
        InputError: the notebook failed; the saved manifest contains the error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, executed = root / "notebooks" / f"{notebook}.ipynb", folder / f"{notebook}.ipynb"
    artefacts = folder / "artefacts"
    known = read_parameters(source)
    if "work_dir" in known:
        parameters = {"work_dir": str(artefacts)} | parameters
    inputs = _hash_inputs(source.parent, known | parameters)
    entry = NotebookRun(known | parameters, "running", source_sha256=sha256_file(source), inputs=inputs)
    _write_run_files(folder, manifest.with_notebook(notebook, entry))
    started = time.monotonic()
    error = None
    with _log_progress(notebook, started, folder) as progress, _headless_environment(), warnings.catch_warnings():
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
                # suppress the kernel's warning about unencrypted connections: it listens on loopback only
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        except PapermillExecutionError as failure:
            # number the cells as in git: papermill inserts a cell of parameters
            error = f"cell {failure.exec_count - bool(parameters)}: {failure.ename}: {failure.evalue}"
        except DeadKernelError:
            executed_cells = json.loads(executed.read_text(encoding="utf-8"))["cells"][: progress.cell]
            number = sum(cell["cell_type"] == "code" for cell in executed_cells) - bool(parameters)
            error = f"cell {number}: the kernel died, possibly out of memory"
    entry = replace(
        entry,
        status="failed" if error else "done",
        seconds=round(time.monotonic() - started, 1),
        silent_seconds=progress.measure_silences(executed, bool(parameters)),
        error=error,
        **({} if error else _read_record(source, parameters.get("work_dir", str(artefacts)))),
    )
    _sign(executed)
    pages = [each for each in manifest.notebooks if (folder / f"{each}.html").exists()]
    _write_text(folder / f"{notebook}.html", render_notebook_page(executed, pages))
    _link_pages(folder, notebook, pages)
    manifest = manifest.with_notebook(notebook, entry)
    _write_run_files(folder, manifest)
    if error:
        command = f"esm2kit run --tier {manifest.tier} --resume"
        raise InputError(
            f"{notebook} failed in {error} (see {executed}). Fix it, then resume: {command}",
            code="run.notebook-failed",
            notebook=notebook,
            error=error,
        )
    metrics = "  ".join(f"{metric_label(name)} {format_number(value)}" for name, value in entry.figures.items())
    print(f"{notebook:<16}{entry.seconds:>6.0f} s  {metrics}", flush=True)
    return manifest


def _write_run_files(folder: Path, manifest: RunManifest) -> None:
    manifest.write(folder)
    _write_text(folder / "index.html", render_run_page(folder.name, manifest, folder))


def _sign(executed: Path) -> None:
    """Sign an executed notebook as made on this machine: JupyterLab shows the figures of trusted notebooks only."""
    import nbformat
    from nbformat.sign import NotebookNotary

    with suppress(OSError, sqlite3.Error):  # a folder of signatures that cannot be written to
        NotebookNotary().sign(nbformat.read(executed, as_version=4))


def _link_pages(folder: Path, notebook: str, others: Sequence[str]) -> None:
    """Add links to a notebook's new page to the pages of the other notebooks."""
    for other in others:
        if other != notebook:
            path = folder / f"{other}.html"
            _write_text(path, replace_navigation(path.read_text(encoding="utf-8"), other, [*others, notebook]))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def _read_record(source: Path, work_dir: str) -> dict[str, Any]:
    """Read the fields `made`, `figures` and `result` of a notebook's record; paths are relative to its folder."""
    record = source.parent / work_dir / "records" / f"{source.stem}.json"
    if not record.exists():
        return {}
    recorded = json.loads(record.read_text(encoding="utf-8"))
    made = {}
    for name, path in recorded["made"].items():
        absolute = os.path.normpath(source.parent / path)
        made[name] = hash_artefact(absolute, Path(absolute))
    return {"made": made, "figures": recorded["figures"], "result": recorded.get("result", "")}


class _ProgressHandler(logging.Handler):
    """Log handler for papermill: shows the output of a running notebook and measures times without output.

    Args:
        notebook: name of the notebook.
        started: start time on the monotonic clock.
        folder: folder of the run; paths in it are shown relative to it.
    """

    def __init__(self, notebook: str, started: float, folder: Path) -> None:
        super().__init__()
        self.notebook, self.started, self.folder = notebook, started, folder
        self.shown = self.last_output = started
        self.cell = 0
        self.silent: dict[int, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Log the last line of output every so often."""
        text, now = record.getMessage(), time.monotonic()
        cell = re.match(r"Executing Cell (\d+)-", text)
        if cell:
            self.cell, self.last_output = int(cell[1]), now
            return
        self.silent[self.cell] = max(self.silent.get(self.cell, 0.0), now - self.last_output)
        self.last_output = now
        if text.startswith(("Executing ", "Ending ", "Input Notebook", "Output Notebook")):
            return
        # rows of a table are not informative alone
        lines = [line for line in text.splitlines() if line.strip(" -") and line[0] != "<" and " " * 3 not in line]
        if lines and now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            line = lines[-1].replace(f"{self.folder}/", "")
            line = line if len(line) <= MAX_LINE_LENGTH else f"{line[: MAX_LINE_LENGTH - 2]} …"
            logger.info("%-16s%6.0f s  %s", self.notebook, now - self.started, line)

    def measure_silences(self, executed: Path, injected: bool) -> dict[str, float]:
        """Report the longest time without output of each code cell.

        Args:
            executed: the executed notebook.
            injected: papermill inserted a cell of parameters.

        Returns:
            Number of the code cell as in git -> seconds, if at least one.
        """
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        counts = {place: cell.get("execution_count") for place, cell in enumerate(cells, 1)}
        return {
            str(counts[place] - injected): round(seconds, 1)
            for place, seconds in self.silent.items()
            if seconds >= 1 and counts.get(place)
        }


@contextmanager
def _log_progress(notebook: str, started: float, folder: Path) -> Iterator[_ProgressHandler]:
    """Log the latest line of output every so often, so that a long cell shows progress."""
    source = logging.getLogger("papermill")
    handler = _ProgressHandler(notebook, started, folder)
    source.handlers, source.propagate = [handler], False
    source.setLevel(logging.INFO)
    # the reader cannot act on messages of the kernel and the renderer
    for name in ("traitlets", "asyncio", "blib2to3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield handler
    finally:
        source.handlers = []


@contextmanager
def _headless_environment() -> Iterator[None]:
    """Start kernels with ESM2KIT_HEADLESS set and without the session name of JupyterLab."""
    before = {name: os.environ.pop(name, None) for name in (HEADLESS, "JPY_SESSION_NAME")}
    os.environ[HEADLESS] = "1"
    try:
        yield
    finally:
        os.environ.pop(HEADLESS)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def hash_artefact(name: str, path: Path) -> Artefact:
    """Measure and hash a file, or all files of a folder and their names.

    Args:
        name: path to record in the manifest.
        path: the file or folder.

    Returns:
        Size and SHA-256; only the size if it is over 256 MiB.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    if size > MAX_HASHED_BYTES:
        return Artefact(name, size)
    if path.is_file():
        return Artefact(name, size, sha256_file(path))
    lines = "\n".join(f"{sha256_file(file)}  {file.relative_to(path).as_posix()}" for file in files)
    return Artefact(name, size, hashlib.sha256(lines.encode()).hexdigest())


def _hash_inputs(folder: Path, parameters: Mapping[str, Any]) -> dict[str, Artefact]:
    """Hash the files and folders that parameters name."""
    found = {}
    for name, value in parameters.items():
        path = folder / value if isinstance(value, str) and value and name not in LOCATION_PARAMETERS else None
        if path is None or not path.exists():
            continue
        found[name] = hash_artefact(value, path)
    return found


def create_manifest(tier: str, folder: Path) -> RunManifest:
    """Create the manifest of a new run and write environment.txt with every installed package.

    Args:
        tier: name of the tier.
        folder: folder of the run.

    Returns:
        A manifest without notebooks.
    """
    installed = {f"{each.name}=={each.version}" for each in importlib.metadata.distributions()}
    _write_text(folder / "environment.txt", "\n".join(sorted(installed, key=str.lower)) + "\n")
    return RunManifest(
        tier,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        git_commit=git_commit(),
        versions=versions(),
        machine={"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    )
