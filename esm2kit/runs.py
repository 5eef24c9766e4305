"""The notebooks, headless: one tier's parameters, one folder a run, and a manifest of what came out.

Parameters are checked against every notebook before the first one runs; a notebook that fails ends the run with its
cell and its error, and what came before is kept.
"""

import fcntl
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from esm2kit.errors import InputError
from esm2kit.pages import run_page, runs_page
from esm2kit.provenance import git_commit, sha256_file, to_json, versions, write_json

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_SIGNS = 20.0


@dataclass(frozen=True)
class RunConfig:
    """Run the notebooks headless with one tier's parameters.

    Args:
        tier: a name in papermill_runs, such as sample, or the path of a YAML file: notebook -> {parameter: value}.
        from_notebook: begin here, on the latest run of this tier; its number (03) or its name.
        only: run this notebook alone, on the latest run of this tier.
        resume: go on with the latest run of this tier where it failed.
        parameters: name=value, for every notebook that has the name, or notebook.name=value; the last word.
        root: the folder that holds notebooks/ and papermill_runs/.
    """

    tier: str = "sample"
    from_notebook: str | None = None
    only: str | None = None
    resume: bool = False
    parameters: list[str] = field(default_factory=list)
    root: Path = ROOT


def run(config: RunConfig) -> str:
    """Run a tier's notebooks in order.

    Returns: the line that ends it: where the report is.
    Raises: InputError for an unknown tier, notebook or parameter, before anything runs; and for a notebook that fails.
    """
    root = Path(config.root)
    plan = plan_run(config)
    continuing = bool(config.from_notebook or config.only or config.resume)
    name = _tier_path(config).stem
    folder = latest_run(root, name) if continuing else None
    if folder is None:
        folder = root / "papermill_runs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        manifest = _read_manifest(folder) if (folder / "manifest.json").exists() else _new_manifest(name)
        for notebook in _chosen(config, plan, manifest):
            _run_notebook(root, folder, notebook, plan[notebook], manifest)
        (folder / "index.html").write_text(run_page(folder.name, manifest))
    runs_page(root / "papermill_runs")
    return f"report: {folder / 'index.html'}"


def plan_run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Notebook -> parameters, the tier's with the command line's laid over them, every name known to its notebook.

    Raises: InputError naming an unknown tier, notebook or parameter, with the nearest known name.
    """
    root, path = Path(config.root), _tier_path(config)
    tier = yaml.safe_load(path.read_text()) or {}
    if not isinstance(tier, dict):
        raise InputError(f"{path}: a tier is `notebook: {{parameter: value}}`, found {type(tier).__name__}")
    files = {file.stem: file for file in sorted((root / "notebooks").glob("*.ipynb"))}
    plan = {}
    for notebook, parameters in tier.items():
        if notebook not in files:
            raise InputError(f"{path}: unknown notebook {notebook!r}; {_nearest(notebook, files)}")
        plan[notebook] = dict(parameters or {})
    known = {notebook: known_parameters(files[notebook]) for notebook in plan}
    for given in config.parameters:
        name, equals, value = given.partition("=")
        notebook, dot, parameter = name.rpartition(".")
        targets = [notebook] if dot else [candidate for candidate in plan if parameter in known[candidate]]
        if not equals or not targets or any(target not in plan for target in targets):
            names = sorted({name for names in known.values() for name in names})
            raise InputError(f"-p {given}: no notebook has a parameter {name!r}; {_nearest(name, names)}")
        for target in targets:
            plan[target][parameter] = yaml.safe_load(value)
    for notebook, parameters in plan.items():
        for name in parameters:
            if name not in known[notebook]:
                raise InputError(f"{notebook} has no parameter {name!r}; {_nearest(name, known[notebook])}")
    return plan


def known_parameters(notebook: Path) -> list[str]:
    """Names in a notebook's parameters cell, as papermill reads them."""
    import papermill

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(papermill.inspect_notebook(str(notebook)))


def record(notebook: str, work_dir: str | Path, made: Mapping[str, Path | str], figures: Mapping[str, float]) -> None:
    """What a notebook made and measured, for its reader and for the run's manifest.

    Args:
        notebook: its name, such as 01_preprocess.
        work_dir: the notebook's folder of artefacts; the record goes to `<work_dir>/records/<notebook>.json`.
        made: name -> file or folder.
        figures: name -> number.
    """
    work_dir = Path(work_dir)
    absent = [str(path) for path in made.values() if not Path(path).exists()]
    if absent:
        raise InputError(f"{notebook} names artefacts that are not there: {', '.join(absent)}")
    write_json(work_dir / "records" / f"{notebook}.json", {"made": dict(made), "figures": dict(figures)})
    for name, path in made.items():
        print(f"made {name}: {path}")


def latest_run(root: Path, tier: str) -> Path | None:
    """The newest run folder of a tier, by name; None where there is none."""
    folders = [path for path in (root / "papermill_runs").glob(f"{tier}-*") if path.is_dir()]
    return max(folders, default=None)


def _tier_path(config: RunConfig) -> Path:
    folder = Path(config.root) / "papermill_runs"
    for path in (folder / f"{config.tier}.yaml", Path(config.tier)):
        if path.is_file():
            return path
    raise InputError(
        f"unknown tier {config.tier!r}; {_nearest(config.tier, [path.stem for path in folder.glob('*.yaml')])}"
    )


def _chosen(config: RunConfig, plan: Mapping[str, Any], manifest: dict[str, Any]) -> list[str]:
    """The notebooks to run now."""

    def find(wanted: str) -> str:
        matches = [notebook for notebook in plan if notebook == wanted or notebook.split("_")[0] == wanted]
        if not matches:
            raise InputError(f"the tier has no notebook {wanted!r}; {_nearest(wanted, plan)}")
        return matches[0]

    notebooks = list(plan)
    if config.only:
        return [find(config.only)]
    if config.from_notebook:
        return notebooks[notebooks.index(find(config.from_notebook)) :]
    if config.resume:
        done = [name for name in notebooks if manifest["notebooks"].get(name, {}).get("status") == "done"]
        return notebooks[len(done) :]
    return notebooks


def _run_notebook(
    root: Path, folder: Path, notebook: str, parameters: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Execute one notebook, render it, and write what it made into the manifest."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source, executed = root / "notebooks" / f"{notebook}.ipynb", folder / f"{notebook}.ipynb"
    artefacts = folder / "artefacts"
    if "work_dir" in known_parameters(source):
        parameters = {"work_dir": str(artefacts)} | parameters
    entry: dict[str, Any] = {"parameters": parameters, "status": "running", "source_sha256": sha256_file(source)}
    manifest["notebooks"][notebook] = entry
    write_json(folder / "manifest.json", manifest)
    began = time.monotonic()
    error = None
    with _signs_of_life(notebook, began), warnings.catch_warnings():
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
                extra_arguments=["--IPKernelApp.log_level=40"],
            )
        except PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    entry |= {"status": "failed" if error else "done", "seconds": round(time.monotonic() - began, 1)}
    (folder / f"{notebook}.html").write_text(_render(executed))
    if error:
        entry["error"] = error
    else:
        entry |= _recorded(artefacts, notebook)
    write_json(folder / "manifest.json", manifest)
    if error:
        raise InputError(f"{notebook} failed in {error} (see {executed}); mend it, then `esm2kit run --resume`")
    figures = "  ".join(f"{name} {_short(value)}" for name, value in entry["figures"].items())
    print(f"{notebook:<16}{entry['seconds']:>6.0f} s  {figures}", flush=True)


def _recorded(artefacts: Path, notebook: str) -> dict[str, Any]:
    path = artefacts / "records" / f"{notebook}.json"
    if not path.exists():
        return {"made": {}, "figures": {}}
    recorded = json.loads(path.read_text())
    made = {}
    for name, where in recorded["made"].items():
        file = Path(where) / "manifest.json" if Path(where).is_dir() else Path(where)
        made[name] = {"path": where} | ({"sha256": sha256_file(file)} if file.is_file() else {})
    return {"made": made, "figures": recorded["figures"]}


def _render(notebook: Path) -> str:
    from nbconvert import HTMLExporter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body, _ = HTMLExporter(
            template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True
        ).from_filename(str(notebook))
    return body


@contextmanager
def _signs_of_life(notebook: str, began: float) -> Iterator[None]:
    """Hand on the notebook's latest line of output every so often, so that a long cell is seen to move."""

    class Latest(logging.Handler):
        shown = began

        def emit(self, message: logging.LogRecord) -> None:
            lines = [line for line in message.getMessage().splitlines() if line.strip(" -")]
            if message.getMessage().startswith(("Executing ", "Ending ", "Input Notebook", "Output Notebook")):
                return
            if lines and time.monotonic() - self.shown > SECONDS_BETWEEN_SIGNS:
                self.shown = time.monotonic()
                logger.info("%s  %3.0f s  %s", notebook, self.shown - began, lines[-1][:100])

    source = logging.getLogger("papermill")
    handler = Latest()
    source.handlers, source.propagate = [handler], False
    source.setLevel(logging.INFO)
    # what the kernel and the renderer say about themselves is nothing the reader can act on
    for name in ("traitlets", "asyncio", "blib2to3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        source.handlers = []


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a second run in it is refused, not mixed in."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder}: another run is at work there; wait for it, or start a run of its own"
            ) from error
        yield


def _new_manifest(tier: str) -> dict[str, Any]:
    return {
        "tier": tier,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "notebooks": {},
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "manifest.json").read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'manifest.json'} cannot be read ({error}); start a new run") from error


def _short(value: Any) -> str:
    return (
        f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(to_json(value))
    )


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known) or 'none'}"
