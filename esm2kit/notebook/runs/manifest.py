"""A run's manifest: what its notebooks ran with and made, and how far the run came; `manifest.json` in its folder."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json

# Parameters that say where, not what.
LOCATION_PARAMETERS = ("work_dir", "runs_dir")
STATES = {"failed": "failed in", "running": "at work on", "interrupted": "interrupted in"}


@dataclass(frozen=True)
class Artefact:
    """A file or folder, its size, and its SHA-256 where it is not too large for one."""

    path: str
    bytes: int | None = None
    sha256: str | None = None

    def path_within(self, run: str) -> str:
        """Its path from a run's folder on, so that a link moves along with the run; an outside path stays whole."""
        return self.path.split(f"/{run}/", 1)[-1]


@dataclass(frozen=True)
class NotebookRun:
    """One notebook of a run.

    Args:
        parameters: all it ran with, its defaults included.
        status: `to come` is never written, but shown for a notebook that is planned.
        source_sha256: of the notebook as it is in git.
        inputs: parameter -> the file or folder it names.
        seconds: None while it runs.
        silent_seconds: code cell -> its longest time without a line of output.
        error: of a failed notebook, beginning with its cell.
        made: name -> what it recorded as made.
        figures: name -> number it recorded.
        result: the result in a sentence.
    """

    parameters: dict[str, Any]
    status: Literal["to come", "running", "done", "failed"]
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
        tier: its parameters' name.
        created: date and time with the zone.
        git_commit: None outside a git repository.
        versions: package -> version.
        machine: system, processor and cores.
        notebooks: those that have begun, by name.
        planned: those that are to run.
        process: host and pid of who is or was at work on it.
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
        """A manifest from what `manifest.json` holds; keys of other versions of esm2kit are left out."""
        notebooks = {name: _read_notebook_run(entry) for name, entry in found["notebooks"].items()}
        return cls(**_known_fields(cls, found) | {"notebooks": notebooks, "planned": tuple(found.get("planned", ()))})

    def write(self, folder: Path) -> None:
        """Write `<folder>/manifest.json`; what is not known yet is left out."""
        kept = {"git_commit"}
        write_json(
            folder / "manifest.json",
            asdict(
                self,
                dict_factory=lambda items: {key: value for key, value in items if value is not None or key in kept},
            ),
        )

    def with_notebook(self, name: str, entry: NotebookRun) -> "RunManifest":
        """This manifest with one notebook's entry replaced or added."""
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
        """What the entries add up to; interrupted where the process is gone."""
        if self._failed:
            return "failed"
        if self.notebooks and not self._unfinished:
            return "done"
        return "running" if _is_alive(self.process) else "interrupted"

    @property
    def current_notebook(self) -> str:
        """The notebook that failed, runs or comes next; empty for a run that is done."""
        return next(iter([*self._failed, *self._unfinished]), "")

    @property
    def state(self) -> str:
        """The status in words, with the notebook it is about."""
        words = STATES.get(self.status)
        return f"{words} {self.current_notebook or 'its first notebook'}" if words else self.status

    @property
    def seconds(self) -> float:
        """Over all notebooks."""
        return sum(entry.seconds or 0.0 for entry in self.notebooks.values())

    @property
    def result(self) -> str:
        """What the run came to, in the sentences its notebooks gave."""
        return " ".join(entry.result for _, entry in sorted(self.notebooks.items()) if entry.result)

    @property
    def figures(self) -> dict[str, float]:
        """`<notebook number> <figure>` -> number."""
        return {
            f"{notebook.split('_')[0]} {name}": value
            for notebook, entry in self.notebooks.items()
            for name, value in entry.figures.items()
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """`<notebook>.<parameter>` -> value, places left out."""
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


def this_process() -> dict[str, Any]:
    """Who is at work on a run, so that a run whose process was killed is not taken for one at work."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_alive(process: Mapping[str, Any] | None) -> bool:
    if process is None:
        return False
    if process["host"] != socket.gethostname():
        return True  # nobody here can tell
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_manifest(folder: Path) -> RunManifest:
    """A run's manifest.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise InputError(
            f"{folder} is no run: it has no manifest.json; `esm2kit runs` lists those there are",
            code="run.no-manifest",
            path=str(folder),
        )
    try:
        return RunManifest.from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); start a new run", code="run.unreadable", path=str(path)
        ) from error


def read_runs(folder: Path) -> dict[str, RunManifest]:
    """Run name -> manifest, the last begun first; a folder whose manifest cannot be read is left out."""
    found = {}
    for path in Path(folder).glob("*/manifest.json"):
        try:
            found[path.parent.name] = read_manifest(path.parent)
        except InputError:
            continue
    return dict(sorted(found.items(), key=lambda item: (item[1].created, item[0]), reverse=True))
