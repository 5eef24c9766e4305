"""The notebooks, headless: one tier's parameters, one folder a run, and a manifest of what came out.

Parameters are checked against every notebook before the first one runs; a notebook that fails ends the run with its
cell and its error, and what came before is kept.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError, check_choices, find_closest, suggest_name
from esm2kit.core.files import hold_lock
from esm2kit.notebook.runs.headless import known_parameters, new_manifest, run_notebook
from esm2kit.notebook.runs.history import Difference, compare_runs, describe_silent_cells, format_number, table
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS, RunManifest, read_manifest, read_runs, this_process
from esm2kit.notebook.runs.pages import runs_page
from esm2kit.notebook.runs.tiers import check_parameters, plan_table, plan_tier, tier_path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class RunConfig:
    """Run the notebooks headless with one tier's parameters.

    Args:
        tier: a name in papermill_runs, such as sample, or the path of a YAML file: notebook -> {parameter: value}.
        from_notebook: begin here, on the latest run of this tier; its number (03) or its name.
        only: run this notebook alone, on the latest run of this tier.
        resume: go on with the latest run of this tier where it failed.
        parameters: name=value, for every notebook that has the name, or notebook.name=value; the last word.
        dry_run: check every parameter of every notebook, print them all, and run nothing.
        root: the folder that holds notebooks/ and papermill_runs/.
    """

    tier: str = "sample"
    from_notebook: str | None = None
    only: str | None = None
    resume: bool = False
    parameters: list[str] = field(default_factory=list)
    dry_run: bool = False
    root: Path = ROOT


@dataclass(frozen=True)
class RunsConfig:
    """List the runs of the notebooks, or compare two of them.

    Args:
        compare: two runs' folder names: the parameters that differ and the figures that changed.
        root: the folder that holds papermill_runs/.
        format: table for people, json for programs.
    """

    compare: list[str] = field(default_factory=list)
    root: Path = ROOT
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class RerunConfig:
    """Repeat a run with the parameters it recorded, and say which figures differ.

    Args:
        run: the run's folder name in papermill_runs.
        tolerance: relative difference of a figure that is taken for equal; speeds are not compared.
        root: the folder that holds notebooks/ and papermill_runs/.
    """

    run: str
    tolerance: float = 1e-4
    root: Path = ROOT


def run(config: RunConfig) -> str:
    """Run a tier's notebooks in order.

    Returns: the lines that end it: where the report is, and before it the cells that were silent for long, if any.
    Raises: InputError for an unknown tier, notebook or parameter, before anything runs; and for a notebook that fails.
    """
    ways = [config.from_notebook and "--from", config.only and "--only", config.resume and "--resume"]
    if len(given := list(filter(None, ways))) > 1:
        raise InputError(
            f"{' and '.join(given)} each say which notebooks to run: give one of them",
            code="run.several-choices",
            options=given,
        )
    root, plan = Path(config.root), plan_run(config)
    name = tier_path(root, config.tier).stem
    continuing = bool(config.from_notebook or config.only or config.resume)
    if config.dry_run:
        shown = plan_table(root, {name: plan[name] for name in _select_notebooks(config, plan, RunManifest(name, ""))})
        return f"{shown}\nevery parameter is known and of its type; nothing was run"
    folder = latest_run(root, name) if continuing else None
    folder = _execute(root, name, folder, plan, lambda manifest: _select_notebooks(config, plan, manifest))
    return "\n".join(filter(None, [describe_silent_cells(read_manifest(folder)), f"report: {folder / 'index.html'}"]))


def runs(config: RunsConfig) -> str:
    """The runs there are, or what differs between two of them, as a table or as JSON.

    Raises: InputError for a run that is not there, with the nearest name, or a number of names other than two.
    """
    folder = Path(config.root) / "papermill_runs"
    if not config.compare:
        found = read_runs(folder)
        return json.dumps(_run_summaries(found), indent=2) if config.format == "json" else _list_table(found, folder)
    names = [_run_name(folder, given) for given in config.compare]
    if len(names) != 2:
        other = next((name for name in read_runs(folder) if name not in names), "RUN")
        example = f", as in `esm2kit runs {names[0]} {other}`" if len(names) == 1 else ""
        raise InputError(
            f"a comparison takes two runs, found {len(names)}: {', '.join(names)}{example}",
            code="run.not-two",
            found=names,
        )
    before, after = (read_manifest(folder / name) for name in names)
    parameters, figures = compare_runs(before, after)
    if config.format == "table":
        return _comparison_table(parameters, figures, names)
    differences = {
        "parameters": [each._asdict() for each in parameters],
        "figures": [each._asdict() for each in figures],
    }
    return json.dumps({"runs": names} | differences, indent=2)


def _run_name(folder: Path, given: str) -> str:
    """A run's name, given so or as its folder's path, as a shell completes it."""
    name = Path(given).name
    if not (folder / name / "manifest.json").is_file():
        near = find_closest(name, read_runs(folder))
        hint = f"did you mean {near!r}?" if near else "`esm2kit runs` lists those there are"
        raise InputError(f"{given} is no run in {folder}; {hint}", code="run.unknown", name=name, near=near)
    return name


def _run_summaries(found: Mapping[str, RunManifest]) -> list[dict[str, Any]]:
    """What `--format json` gives of each run: the head of its manifest, and its figures by name."""
    heads = ("tier", "status", "created", "seconds", "git_commit")
    return [
        {"run": name, **{head: getattr(manifest, head) for head in heads}, "figures": manifest.figures}
        for name, manifest in found.items()
    ]


def _list_table(found: Mapping[str, RunManifest], folder: Path) -> str:
    rows = [
        [name, each.status, each.created[:16], f"{each.seconds:,.0f}", str(each.git_commit)[:10]]
        for name, each in found.items()
    ]
    if not rows:
        return f"no runs in {folder} yet: esm2kit run --tier sample"
    return table(["run", "status", "started", "seconds", "commit"], rows)


def rerun(config: RerunConfig) -> str:
    """Repeat a run and compare.

    Returns: what differs within the tolerance, and the new run's report.
    Raises: InputError naming the figures that differ beyond the tolerance, so that a machine sees it by the exit code.
    """
    root = Path(config.root)
    name = _run_name(root / "papermill_runs", config.run)
    before = read_manifest(root / "papermill_runs" / name)
    plan = {
        notebook: {name: value for name, value in entry.parameters.items() if name not in LOCATION_PARAMETERS}
        for notebook, entry in before.notebooks.items()
    }
    for notebook, parameters in plan.items():
        check_parameters(root, notebook, parameters, known_parameters(root / "notebooks" / f"{notebook}.ipynb"))
    folder = _execute(root, before.tier, None, plan, lambda manifest: list(plan))
    after = read_manifest(folder)
    parameters, figures = compare_runs(before, after, config.tolerance)
    shown = _comparison_table(parameters, figures, [name, folder.name])
    far = [difference.name for difference in figures if difference.beyond]
    if far:
        print(shown)
        raise InputError(
            f"{len(far)} figures differ by more than {config.tolerance:g} of their value: {', '.join(far)}",
            code="rerun.figures-differ",
            figures=far,
        )
    return f"{shown}\nno figure differs by more than {config.tolerance:g} of its value; report: {folder / 'index.html'}"


def _comparison_table(parameters: list[Difference], figures: list[Difference], names: list[str]) -> str:
    parts = []
    for heading, differences in (("parameters that differ", parameters), ("figures that changed", figures)):
        rows = [
            [
                name,
                *("absent" if value is None else format_number(value) for value in (one, other)),
                {None: "speed", True: "", False: "within tolerance"}[beyond],
            ]
            for name, one, other, beyond in differences
        ]
        parts.append(table([heading, *names, ""], rows) if rows else f"{heading}: none")
    return "\n\n".join(parts)


def _execute(
    root: Path,
    name: str,
    folder: Path | None,
    plan: Mapping[str, dict[str, Any]],
    choose: Callable[[RunManifest], list[str]],
) -> Path:
    """Run notebooks into a run's folder, a new one where none is given; returns the folder."""
    try:
        folder = folder or _new_folder(root, name)
        with hold_lock(folder / ".lock", f"{folder}: another run is at work there; wait for it, or start a new one"):
            known = (folder / "manifest.json").exists()
            manifest = read_manifest(folder) if known else new_manifest(name, folder)
            chosen = choose(manifest)
            planned = tuple(dict.fromkeys([*manifest.planned, *chosen]))
            manifest = replace(manifest, planned=planned, process=this_process())
            print(f"{len(chosen)} notebooks to run; watch them in {folder / 'index.html'}", flush=True)
            for notebook in chosen:
                manifest = run_notebook(root, folder, notebook, plan[notebook], manifest)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or folder}: {error.strerror}; fix it, then --resume",
            code="run.unwritable",
            path=str(error.filename or folder),
        ) from error
    finally:
        if folder is not None and (folder / "manifest.json").exists():
            runs_page(root / "papermill_runs")
    return folder


def _new_folder(root: Path, name: str) -> Path:
    """A folder nobody else has, even when two runs begin within a second."""
    stem = root / "papermill_runs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            folder = stem.with_name(stem.name + suffix)
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise InputError(f"{stem} and 98 more of the name are taken; wait a second", code="run.names-taken", path=str(stem))


def plan_run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Notebook -> parameters of a run, all checked; see `tiers.plan_tier`."""
    return plan_tier(Path(config.root), tier_path(Path(config.root), config.tier), config.parameters)


def latest_run(root: Path, tier: str) -> Path | None:
    """The newest run folder of a tier, by name; None where there is none."""
    stamped = re.compile(re.escape(tier) + r"-\d{8}-\d{6}(-\d+)?")
    folders = [path for path in (root / "papermill_runs").glob(f"{tier}-*") if stamped.fullmatch(path.name)]
    return max(folders, default=None)


def _select_notebooks(config: RunConfig, plan: Mapping[str, Any], manifest: RunManifest) -> list[str]:
    """The notebooks to run now."""

    def find(name: str) -> str:
        matches = [notebook for notebook in plan if notebook == name or notebook.split("_")[0] == name]
        if not matches:
            raise InputError(
                f"the tier has no notebook {name!r}; {suggest_name(name, plan)}", code="tier.notebook", name=name
            )
        return matches[0]

    notebooks = list(plan)
    if config.only:
        return [find(config.only)]
    if config.from_notebook:
        return notebooks[notebooks.index(find(config.from_notebook)) :]
    if config.resume:
        done = {name for name, entry in manifest.notebooks.items() if entry.status == "done"}
        return [name for name in notebooks if name not in done]
    return notebooks
