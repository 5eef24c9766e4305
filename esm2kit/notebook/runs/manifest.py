"""Manifest of a run: parameters, artefacts, metrics and status of its notebooks; `manifest.json` in its folder."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.checksums import SEAL, read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError

FORMAT = 2
# Parameters that name locations and do not affect results.
LOCATION_PARAMETERS = ("work_dir", "runs_dir")
STATES = {"failed": "failed in", "running": "running", "interrupted": "interrupted in"}


@dataclass(frozen=True)
class Artefact:
    """A file or folder, its size in bytes, and its SHA-256 unless it is too large to hash."""

    path: str
    bytes: int | None = None
    sha256: str | None = None

    def path_within(self, run: str) -> str:
        """Path relative to the folder of a run, so that links still work after the run was moved.

        Args:
            run: name of the run's folder.

        Returns:
            The relative path; the full path if it is outside that folder.
        """
        return self.path.replace("\\", "/").split(f"/{run}/", 1)[-1]  # a link, also for a run made on Windows


@dataclass(frozen=True)
class NotebookRun:
    """One notebook of a run.

    Args:
        parameters: all parameters, including defaults.
        status: `planned` is shown for a notebook that has not started; it is never saved.
        source_sha256: hash of the source notebook.
        inputs: parameter -> the file or folder it names.
        seconds: duration; None while the notebook runs.
        silent_seconds: number of the code cell -> its longest time without output.
        error: error of a failed notebook; starts with the cell.
        made: name -> artefact that the notebook recorded.
        figures: name -> metric that the notebook recorded.
        result: one sentence with the result.
    """

    parameters: dict[str, Any]
    status: Literal["planned", "running", "done", "failed"]
    source_sha256: str = ""
    inputs: dict[str, Artefact] = field(default_factory=dict)
    seconds: float | None = None
    silent_seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    made: dict[str, Artefact] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    result: str = ""


@dataclass(frozen=True)
class RunManifest:
    """A run of notebooks.

    Args:
        tier: name of its tier.
        created: date and time with time zone.
        git_commit: None outside a git repository.
        versions: package -> version.
        machine: system, processor and cores.
        notebooks: notebooks that have started, by name.
        planned: names of all notebooks of the run.
        process: host and pid of the process that runs or ran it.
    """

    tier: str
    created: str
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notebooks: dict[str, NotebookRun] = field(default_factory=dict)
    planned: tuple[str, ...] = ()
    process: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "RunManifest":
        """Build a manifest from the content of manifest.json; unknown keys are ignored.

        Args:
            found: the parsed JSON.

        Returns:
            The manifest.
        """
        notebooks = {name: _read_notebook_run(entry) for name, entry in found["notebooks"].items()}
        return cls(**_known_fields(cls, found) | {"notebooks": notebooks, "planned": tuple(found.get("planned", ()))})

    def write(self, folder: Path) -> None:
        """Write `<folder>/manifest.json`; values of None are omitted, except the git commit.

        Args:
            folder: folder of the run.
        """
        kept = {"git_commit"}
        content = asdict(
            self,
            dict_factory=lambda items: {key: value for key, value in items if value is not None or key in kept},
        )
        write_sealed_json(folder / "manifest.json", {"format": FORMAT} | content)

    def with_notebook(self, name: str, entry: NotebookRun) -> "RunManifest":
        """Copy the manifest with one notebook's entry replaced or added.

        Args:
            name: notebook.
            entry: its entry.

        Returns:
            The new manifest.
        """
        return replace(self, notebooks=self.notebooks | {name: entry})

    @property
    def _unfinished(self) -> list[str]:
        names = dict.fromkeys([*self.planned, *self.notebooks])
        return [name for name in names if name not in self.notebooks or self.notebooks[name].status != "done"]

    @property
    def _failed(self) -> list[str]:
        return [name for name, entry in self.notebooks.items() if entry.status == "failed"]

    @property
    def status(self) -> Literal["done", "failed", "running", "interrupted"]:
        """Status of the run; interrupted if its process has ended."""
        if self._failed:
            return "failed"
        if self.notebooks and not self._unfinished:
            return "done"
        return "running" if _is_alive(self.process) else "interrupted"

    @property
    def current_notebook(self) -> str:
        """The notebook that failed, is running or is next; empty for a finished run."""
        return next(iter([*self._failed, *self._unfinished]), "")

    @property
    def state(self) -> str:
        """The status as text, with the notebook concerned."""
        text = STATES.get(self.status)
        return f"{text} {self.current_notebook or 'its first notebook'}" if text else self.status

    @property
    def seconds(self) -> float:
        """Total duration of all notebooks in seconds."""
        return sum(entry.seconds or 0.0 for entry in self.notebooks.values())

    @property
    def result(self) -> str:
        """The result sentences of the notebooks."""
        return " ".join(entry.result for _, entry in sorted(self.notebooks.items()) if entry.result)

    @property
    def figures(self) -> dict[str, float]:
        """`<notebook number> <name>` -> metric."""
        return {
            f"{notebook.split('_')[0]} {name}": value
            for notebook, entry in self.notebooks.items()
            for name, value in entry.figures.items()
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """`<notebook>.<parameter>` -> value, without locations."""
        return {
            f"{notebook}.{name}": value
            for notebook, entry in self.notebooks.items()
            for name, value in entry.parameters.items()
            if name not in LOCATION_PARAMETERS
        }


def _known_fields(cls: type, found: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: found[each.name] for each in fields(cls) if each.name in found}


def _read_notebook_run(found: Mapping[str, Any]) -> NotebookRun:
    kept = _known_fields(NotebookRun, found)
    for group in kept.keys() & {"inputs", "made"}:
        kept[group] = {name: Artefact(**_known_fields(Artefact, item)) for name, item in kept[group].items()}
    return NotebookRun(**kept)


def identify_process() -> dict[str, Any]:
    """Identify this process, so that a run whose process was killed is recognised as interrupted.

    Returns:
        host and pid.
    """
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_alive(process: Mapping[str, Any] | None) -> bool:
    if process is None:
        return False
    if process["host"] != socket.gethostname():
        return True  # cannot be checked from this host
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_manifest(folder: Path) -> RunManifest:
    """Read the manifest of a run.

    Args:
        folder: folder of the run.

    Returns:
        The manifest.

    Raises:
        InputError: the manifest does not exist or cannot be read.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise InputError(
            f"{folder} is not a run: it has no manifest.json. `esm2kit runs` lists all runs.",
            code="run.no-manifest",
            path=str(folder),
        )
    try:
        found = json.loads(path.read_bytes())
        if "format" in found or SEAL in found:  # not in a manifest of version 0.1.0
            found = read_sealed_json(path, "start a new run")
        return RunManifest.from_json(found)
    except InputError:
        raise
    except Exception as error:  # whatever the content of a damaged file leads to
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())}). Start a new run.",
            code="run.unreadable",
            path=str(path),
        ) from error


def read_runs(folder: Path) -> dict[str, RunManifest]:
    """Read the manifests of all runs; a folder whose manifest cannot be read is skipped.

    Args:
        folder: papermill_runs.

    Returns:
        Run name -> manifest, newest first.
    """
    found = {}
    for path in Path(folder).glob("*/manifest.json"):
        try:
            found[path.parent.name] = read_manifest(path.parent)
        except InputError:
            continue
    return dict(sorted(found.items(), key=lambda item: (item[1].created, item[0]), reverse=True))
