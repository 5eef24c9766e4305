"""Run the notebooks headless with the parameters of a tier; each run has its own folder and manifest.

The parameters of all notebooks are checked before the first one runs. If a notebook fails, the run stops with the cell
and its error, and the finished notebooks are retained.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError, check_choices, find_closest, suggest_name
from esm2kit.core.files import hold_lock
from esm2kit.core.numbers import format_count
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.notebook.runs.headless import create_manifest, read_parameters, run_notebook
from esm2kit.notebook.runs.history import (
    SPEEDS,
    Difference,
    compare_runs,
    describe_silent_cells,
    format_number,
    format_table,
)
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS, RunManifest, identify_process, read_manifest, read_runs
from esm2kit.notebook.runs.pages import write_runs_page
from esm2kit.notebook.runs.tiers import check_parameters, find_tier, format_plan, plan_tier

logger = logging.getLogger(__name__)
CHECKOUT = Path(__file__).resolve().parents[3]


def find_root() -> Path:
    """Find the folder of the notebooks: the current one, the one above it, or else the checkout.

    Returns:
        A folder with notebooks/ and papermill_runs/; the current folder if there is none.
    """
    here = Path.cwd()
    places = (here, here.parent, CHECKOUT)
    found = (place for place in places if (place / "notebooks").is_dir() and (place / "papermill_runs").is_dir())
    return next(found, here)


@dataclass(frozen=True)
class RunConfig:
    """Run the notebooks headless with the parameters of a tier.

    Args:
        tier: Name of a tier in papermill_runs, such as sample, or path of a YAML file: notebook -> {parameter: value}.
        from_notebook: First notebook to run, by number (03) or name; continues the latest run of this tier.
            Default: the first of the tier.
        only: The only notebook to run, by number (03) or name; continues the latest run of this tier. Default: all.
        resume: Resume the latest run of this tier after its last finished notebook.
        parameters: Values that override the tier: name=value for every notebook with that parameter, or
            notebook.name=value. Default: the values of the tier.
        dry_run: Check and print the parameters of every notebook without running anything.
        root: Folder that contains notebooks/ and papermill_runs/. Default: this folder, or the checkout of esm2kit.
    """

    tier: str = "sample"
    from_notebook: str | None = None
    only: str | None = None
    resume: bool = False
    parameters: list[str] = field(default_factory=list)
    dry_run: bool = False
    root: Path = field(default_factory=find_root)

    option_groups = OptionGroups(usual="tier from_notebook only resume parameters dry_run root")

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True)
class RunsConfig:
    """List the runs of the notebooks, or compare two of them.

    Args:
        compare: Folder names of two runs, to show the parameters and metrics that differ.
        root: Folder that contains papermill_runs/. Default: this folder, or the checkout of esm2kit.
        format: Output format.
    """

    compare: list[str] = field(default_factory=list)
    root: Path = field(default_factory=find_root)
    format: Literal["table", "json"] = "table"

    option_groups = OptionGroups(usual="compare format root")

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)


@dataclass(frozen=True)
class RerunConfig:
    """Repeat a run with its recorded parameters and report the metrics that differ.

    Args:
        run: Folder name of the run in papermill_runs.
        tolerance: Largest relative difference of two metrics that count as equal. Speeds are not compared.
        root: Folder that contains notebooks/ and papermill_runs/. Default: this folder, or the checkout of esm2kit.
    """

    run: str
    tolerance: float = 1e-4
    root: Path = field(default_factory=find_root)

    option_groups = OptionGroups(usual="run tolerance root")

    def __post_init__(self) -> None:
        expand_paths(self)
        if not 0 <= self.tolerance < math.inf:
            raise InputError(
                f"tolerance is {self.tolerance:g}: it must be 0 or a positive number, such as 1e-4",
                code="rerun.tolerance",
                found=self.tolerance,
            )


def run(config: RunConfig) -> str:
    """Run the notebooks of a tier in order.

    Args:
        config: parameters of the run.

    Returns:
        The path of the report; before it a line on cells without output for a long time, if any.

    Raises:
        InputError: a tier, notebook or parameter is unknown, or the run to be continued has other parameters (before
            anything runs); or a notebook failed.
    """
    options = [config.from_notebook and "--from", config.only and "--only", config.resume and "--resume"]
    if len(given := list(filter(None, options))) > 1:
        raise InputError(
            f"{' and '.join(given)} exclude each other: choose one",
            code="run.several-choices",
            options=given,
        )
    root, plan = Path(config.root), plan_run(config)
    if not plan:
        raise InputError(
            f"tier '{config.tier}' lists no notebook. Add one, as in papermill_runs/sample.yaml.",
            code="tier.empty",
            name=config.tier,
        )
    name = find_tier(root, config.tier).stem
    continuing = bool(config.from_notebook or config.only or config.resume)
    if config.dry_run:
        shown = format_plan(root, {name: plan[name] for name in _select_notebooks(config, plan, RunManifest(name, ""))})
        return f"{shown}\nevery parameter is known and has the right type; nothing was run"
    folder = find_latest_run(root, name) if continuing else None

    def choose(manifest: RunManifest) -> list[str]:
        chosen = _select_notebooks(config, plan, manifest)
        _check_recorded_parameters(config, plan, manifest, chosen)
        return chosen

    folder = _execute(root, name, folder, plan, choose)
    return "\n".join(filter(None, [describe_silent_cells(read_manifest(folder)), f"report: {folder / 'index.html'}"]))


def _check_recorded_parameters(
    config: RunConfig, plan: Mapping[str, Mapping[str, Any]], manifest: RunManifest, chosen: list[str]
) -> None:
    """Check that the notebooks of a continued run have the parameters of this command.

    Notebooks that --only or --from selects are run again and may have others, as may the next one of --resume if -p
    names the parameter.

    Raises:
        InputError: a parameter differs.
    """
    named = {given.partition("=")[0].rpartition(".")[2] for given in config.parameters}
    for notebook, entry in manifest.notebooks.items():
        if notebook not in plan or (notebook in chosen and not config.resume):
            continue
        values = read_parameters(Path(config.root) / "notebooks" / f"{notebook}.ipynb") | plan[notebook]
        for name in values.keys() & entry.parameters.keys() - set(LOCATION_PARAMETERS):
            before, now = entry.parameters[name], values[name]
            if before != now and not (notebook in chosen and name in named):
                raise InputError(
                    f"{notebook} of the latest run of {manifest.tier} has {name} {before!r}, this command has {now!r}. "
                    f"Add -p {notebook}.{name}={before} to continue that run, or start a new run without --resume, "
                    "--from and --only.",
                    code="run.other-parameters",
                    notebook=notebook,
                    name=name,
                    before=before,
                    now=now,
                )


def runs(config: RunsConfig) -> str:
    """List all runs, or compare two of them, as a table or as JSON.

    Args:
        config: runs to compare and output format.

    Returns:
        The text to print.

    Raises:
        InputError: a run does not exist, or the number of names is not two.
    """
    folder = Path(config.root) / "papermill_runs"
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist. Set --root to the folder that contains papermill_runs/.",
            code="run.no-folder",
            path=folder,
        )
    if not config.compare:
        found = read_runs(folder)
        for path in sorted(folder.glob("*/manifest.json")):
            if path.parent.name not in found:
                logger.warning("%s cannot be read, so this run is not listed", path)
        return json.dumps(_summarise_runs(found), indent=2) if config.format == "json" else _format_runs(found, folder)
    names = [_run_name(folder, given) for given in config.compare]
    if len(names) == 2 and names[0] == names[1]:
        raise InputError(f"{names[0]} is given twice. Pass two different runs.", code="run.same", name=names[0])
    if len(names) != 2:
        other = next((name for name in read_runs(folder) if name not in names), "RUN")
        example = f". Example: esm2kit runs {names[0]} {other}" if len(names) == 1 else ""
        raise InputError(
            f"a comparison requires two runs, found {len(names)}: {', '.join(names)}{example}",
            code="run.not-two",
            found=names,
        )
    before, after = (read_manifest(folder / name) for name in names)
    parameters, figures = compare_runs(before, after)
    if config.format == "table":
        return _format_comparison(parameters, figures, names)
    differences = {
        "parameters": [each._asdict() for each in parameters],
        "figures": [each._asdict() for each in figures],
    }
    return json.dumps({"runs": names} | differences, indent=2)


def _run_name(folder: Path, given: str) -> str:
    """Convert the name of a run, or the path of its folder, into the name."""
    name = Path(given).name
    if not (folder / name / "manifest.json").is_file():
        near = find_closest(name, read_runs(folder))
        hint = f"did you mean {near!r}?" if near else "`esm2kit runs` lists all runs"
        raise InputError(f"{given} is not a run in {folder}: {hint}", code="run.unknown", name=name, near=near)
    return name


def _summarise_runs(found: Mapping[str, RunManifest]) -> list[dict[str, Any]]:
    """Summarise each run for `--format json`: the head of its manifest, and its metrics by name."""
    heads = ("tier", "status", "created", "seconds", "git_commit")
    return [
        {"run": name, **{head: getattr(manifest, head) for head in heads}, "figures": manifest.figures}
        for name, manifest in found.items()
    ]


def _format_runs(found: Mapping[str, RunManifest], folder: Path) -> str:
    rows = [
        [name, each.status, each.created[:16], f"{each.seconds:,.0f}", str(each.git_commit)[:10]]
        for name, each in found.items()
    ]
    if not rows:
        return f"no runs in {folder} yet: esm2kit run --tier sample"
    return format_table(["run", "status", "started", "seconds", "commit"], rows)


def rerun(config: RerunConfig) -> str:
    """Repeat a run and compare the metrics.

    Args:
        config: run and tolerance.

    Returns:
        The differences within the tolerance, and the path of the new report.

    Raises:
        InputError: metrics differ by more than the tolerance; the command then exits with code 2.
    """
    root = Path(config.root)
    name = _run_name(root / "papermill_runs", config.run)
    before = read_manifest(root / "papermill_runs" / name)
    if all(metric.endswith(SPEEDS) for metric in before.figures):
        raise InputError(
            f"{name} recorded no metric except speeds, so there is nothing to compare. Choose a finished run.",
            code="rerun.no-metrics",
            name=name,
        )
    plan = {
        notebook: {name: value for name, value in entry.parameters.items() if name not in LOCATION_PARAMETERS}
        for notebook, entry in before.notebooks.items()
    }
    for notebook, parameters in plan.items():
        check_parameters(root, notebook, parameters, read_parameters(root / "notebooks" / f"{notebook}.ipynb"))
    folder = _execute(root, before.tier, None, plan, lambda manifest: list(plan))
    after = read_manifest(folder)
    parameters, figures = compare_runs(before, after, config.tolerance)
    shown = _format_comparison(parameters, figures, [name, folder.name])
    far = [difference.name for difference in figures if difference.beyond]
    if far:
        print(shown)
        raise InputError(
            f"{format_count(len(far), 'metric')} {'differs' if len(far) == 1 else 'differ'} by more than "
            f"{config.tolerance:g} (relative): {', '.join(far)}",
            code="rerun.figures-differ",
            figures=far,
        )
    return f"{shown}\nno metric differs by more than {config.tolerance:g} (relative); report: {folder / 'index.html'}"


def _format_comparison(parameters: list[Difference], figures: list[Difference], names: list[str]) -> str:
    parts = []
    for heading, differences in (("parameters that differ", parameters), ("metrics that changed", figures)):
        rows = [
            [
                name,
                *("absent" if value is None else format_number(value) for value in (one, other)),
                {None: "speed", True: "", False: "within tolerance"}[beyond],
            ]
            for name, one, other, beyond in differences
        ]
        parts.append(format_table([heading, *names, ""], rows) if rows else f"{heading}: none")
    return "\n\n".join(parts)


def _execute(
    root: Path,
    name: str,
    folder: Path | None,
    plan: Mapping[str, dict[str, Any]],
    choose: Callable[[RunManifest], list[str]],
) -> Path:
    """Run notebooks in the folder of a run, a new one if none is given; return the folder."""
    try:
        folder = folder or _new_folder(root, name)
        with hold_lock(
            folder / ".lock", f"{folder}: another process is using this run. Wait for it, or start a new run."
        ):
            exists = (folder / "manifest.json").exists()
            manifest = read_manifest(folder) if exists else create_manifest(name, folder)
            chosen = choose(manifest)
            planned = tuple(dict.fromkeys([*manifest.planned, *chosen]))
            manifest = replace(manifest, planned=planned, process=identify_process())
            print(f"{format_count(len(chosen), 'notebook')} to run; progress: {folder / 'index.html'}", flush=True)
            for notebook in chosen:
                manifest = run_notebook(root, folder, notebook, plan[notebook], manifest)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or folder}: {error.strerror}. Fix it, then run with --resume.",
            code="run.unwritable",
            path=str(error.filename or folder),
        ) from error
    finally:
        if folder is not None and (folder / "manifest.json").exists():
            write_runs_page(root / "papermill_runs")
    return folder


def _new_folder(root: Path, name: str) -> Path:
    """Create a new folder, also if two runs start in the same second."""
    stem = root / "papermill_runs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            folder = stem.with_name(stem.name + suffix)
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise InputError(
        f"{stem} and 98 folders with the same time stamp already exist: wait a second and try again",
        code="run.names-taken",
        path=str(stem),
    )


def plan_run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Read and check the parameters of a run, see `tiers.plan_tier`.

    Args:
        config: parameters of the run.

    Returns:
        Notebook -> {parameter: value}.
    """
    return plan_tier(Path(config.root), find_tier(Path(config.root), config.tier), config.parameters)


def find_latest_run(root: Path, tier: str) -> Path | None:
    """Find the newest run of a tier by the time stamp in its name.

    Args:
        root: folder that contains papermill_runs/.
        tier: name of the tier.

    Returns:
        Folder of the run; None if there are no runs.
    """
    stamped = re.compile(re.escape(tier) + r"-\d{8}-\d{6}(-\d+)?")
    folders = [path for path in (root / "papermill_runs").glob(f"{tier}-*") if stamped.fullmatch(path.name)]
    return max(folders, default=None)


def _select_notebooks(config: RunConfig, plan: Mapping[str, Any], manifest: RunManifest) -> list[str]:
    """Select the notebooks to run now."""

    def find(name: str) -> str:
        matches = [notebook for notebook in plan if notebook == name or notebook.split("_")[0] == name]
        if not matches:
            raise InputError(
                f"notebook {name!r} is not in the tier: {suggest_name(name, plan)}", code="tier.notebook", name=name
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
