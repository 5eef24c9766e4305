"""Tiers: notebook -> parameters that differ from the defaults; all are checked before anything runs."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

import esm2kit
from esm2kit.core.errors import InputError, suggest_name
from esm2kit.core.files import check_git_lfs
from esm2kit.core.paths import expand_path
from esm2kit.core.yaml_text import parse_yaml
from esm2kit.notebook.runs.headless import read_parameters
from esm2kit.notebook.runs.history import format_table
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS

OWN_FILES = ("fasta", "labels")  # may be empty; otherwise they are files
TASK = ("task", "split")  # not used if labels are given
NO_TIERS = "{folder} has no tiers. Run `esm2kit notebooks DIR`, then repeat this command in DIR."


def find_tier(root: Path, tier: str) -> Path:
    """Find the file of a tier.

    Args:
        root: folder that contains papermill_runs/.
        tier: name in papermill_runs, or path of a YAML file.

    Returns:
        Path of the YAML file.

    Raises:
        InputError: the tier does not exist; the message suggests the nearest name.
    """
    folder = Path(root) / "papermill_runs"
    for path in (folder / f"{tier}.yaml", Path(tier)):
        if path.is_file():
            return path
    known = [path.stem for path in folder.glob("*.yaml")]
    raise InputError(
        f"unknown tier {tier!r}: " + (suggest_name(tier, known) if known else NO_TIERS.format(folder=folder)),
        code="tier.unknown",
        name=tier,
        known=known,
    )


def plan_tier(root: Path, path: Path, given: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read a tier, apply the overrides of the command line, and check every parameter.

    Args:
        root: folder that contains notebooks/.
        path: YAML file of the tier.
        given: overrides: `name=value` for every notebook with that parameter, or `notebook.name=value`.

    Returns:
        Notebook -> {parameter: value}.

    Raises:
        InputError: a notebook or parameter is unknown, a value has the wrong type or is not among the choices of the
            stage, or a file does not exist.
    """
    files = {file.stem: file for file in sorted((Path(root) / "notebooks").glob("*.ipynb"))}
    check_git_lfs(path)
    try:
        tier = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}", code="tier.not-yaml", path=str(path)
        ) from error
    if not isinstance(tier, dict):
        raise InputError(
            f"{path}: expected lines `notebook: {{parameter: value}}`, found {type(tier).__name__}",
            code="tier.form",
            path=str(path),
        )
    plan = {}
    for notebook, parameters in tier.items():
        if notebook not in files:
            raise InputError(
                f"{path}: unknown notebook {notebook!r}: {suggest_name(str(notebook), files)}",
                code="tier.notebook",
                name=notebook,
            )
        if not isinstance(parameters or {}, dict):
            raise InputError(
                f"{path}: expected lines `parameter: value` for {notebook}, found {parameters!r}",
                code="tier.form",
                path=str(path),
                notebook=notebook,
            )
        plan[notebook] = dict(parameters or {})
    known = {notebook: read_parameters(files[notebook]) for notebook in plan}
    for each in given:
        for notebook, parameter, value in _parse_override(each, known):
            plan[notebook][parameter] = value
    return {
        notebook: check_parameters(root, notebook, parameters, known[notebook]) for notebook, parameters in plan.items()
    }


def _parse_override(given: str, known: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, Any]]:
    """Parse one `-p name=value` into (notebook, parameter, value); the value of a string parameter stays a string."""
    name, equals, value = given.partition("=")
    if not equals:
        raise InputError(
            f"-p {given}: expected name=value or notebook.name=value", code="parameter.no-value", given=given
        )
    notebook, dot, parameter = name.rpartition(".")
    targets = [notebook] if dot else [candidate for candidate in known if parameter in known[candidate]]
    if not targets or any(target not in known for target in targets):
        names = sorted({name for names in known.values() for name in names})
        raise InputError(
            f"-p {given}: unknown parameter {name!r}: {suggest_name(name, names)}",
            code="parameter.unknown",
            name=name,
        )
    for target in targets:
        text = isinstance(known[target].get(parameter), str)
        try:
            yield target, parameter, value if text else yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"-p {given}: {value!r} is not a valid value of {parameter}",
                code="parameter.not-yaml",
                name=parameter,
                found=value,
            ) from None


def check_parameters(
    root: Path, notebook: str, parameters: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the parameters of a notebook: names, types, choices of its stage, and files.

    Args:
        root: folder that contains notebooks/.
        notebook: name of the notebook.
        parameters: parameter -> value.
        known: parameter -> default, from `read_parameters`.

    Returns:
        Parameter -> value in the type of its default.

    Raises:
        InputError: a parameter is unknown, a value is not valid, or a file does not exist.
    """
    choices = _allowed_values(notebook) if parameters else {}
    values = {}
    for name, value in parameters.items():
        if name not in known:
            raise InputError(
                f"{notebook} has no parameter {name!r}: {suggest_name(str(name), known)}",
                code="parameter.unknown",
                notebook=notebook,
                name=name,
            )
        values[name] = value = _convert(notebook, name, value, known[name])
        if name in choices and value not in choices[name]:
            hint = suggest_name(str(value), [str(each) for each in choices[name]])
            raise InputError(
                f"{notebook}: {name} {value!r} is not valid: {hint}",
                code="parameter.choice",
                notebook=notebook,
                name=name,
                found=value,
            )
        if isinstance(value, str) and name in OWN_FILES and value:
            _check_own_file(Path(root) / "notebooks", notebook, name, value)
        elif isinstance(value, str) and name not in LOCATION_PARAMETERS:
            _check_path(Path(root) / "notebooks", notebook, name, value, known[name])
    _check_stage(notebook, values, known)
    return values


def _check_stage(notebook: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Check the parameters that the notebook passes to its stage's dataclass, in that dataclass."""
    config = _find_config(notebook)
    if config is None:
        return
    stage = [field.name for field in dataclasses.fields(config)]
    missing = dataclasses.MISSING
    required = [field.name for field in dataclasses.fields(config) if field.default is field.default_factory is missing]

    def build(parameters: Mapping[str, Any]) -> None:
        given = {name: value for name, value in parameters.items() if name in stage and value != ""}
        if given.get("labels"):
            given = {name: value for name, value in given.items() if name not in TASK}
        config(**{name: "unknown" for name in required if name not in given} | given)

    same = []  # the other parameters are converted by the notebook, such as a limit of 0
    for name, default in known.items():
        with contextlib.suppress(InputError):
            build({name: default})
            same.append(name)
    try:
        build({name: values.get(name, known[name]) for name in same})
    except InputError as error:
        raise InputError(f"{notebook}: {error}", code=error.code, **{"notebook": notebook} | error.values) from None


def _convert(notebook: str, name: str, value: Any, default: Any) -> Any:
    """Convert a value to the type of its default; YAML reads 1e-3, without a point, as a string."""
    typed = value
    if isinstance(default, float) and not isinstance(value, bool | float):
        with contextlib.suppress(TypeError, ValueError):
            typed = float(value)
    if type(typed) is not type(default) or typed != typed:
        raise InputError(
            f"{notebook}: {name} must be of type {type(default).__name__}, such as {default!r}; found {value!r}",
            code="parameter.type",
            notebook=notebook,
            name=name,
            found=value,
        )
    return str(expand_path(typed)) if isinstance(typed, str) and typed.startswith("~") else typed


def _check_own_file(folder: Path, notebook: str, name: str, value: str) -> None:
    """Check a file whose parameter may be empty; `table.xlsx:Sheet` is a sheet of a file."""
    if not any((folder / each).is_file() for each in (value, value.rpartition(":")[0] or value)):
        raise InputError(
            f"{notebook}: {name} {value} is not a file. Paths are relative to notebooks/.",
            code="parameter.file",
            notebook=notebook,
            name=name,
            path=value,
        )


def _check_path(folder: Path, notebook: str, name: str, value: str, default: Any) -> None:
    """If the default is an existing file, the new value must be one too; a folder may be created later."""
    if not default or not value or not (folder / default).exists():
        return
    path = folder / value
    if (folder / default).is_file() and not path.is_file():
        raise InputError(
            f"{notebook}: {name} {value} is not a file. Paths are relative to notebooks/.",
            code="parameter.file",
            notebook=notebook,
            name=name,
            path=value,
        )
    if (folder / default).is_dir() and (path.is_file() or not path.parent.is_dir()):
        raise InputError(
            f"{notebook}: {name} {value} is not a folder and cannot be created. Paths are relative to notebooks/.",
            code="parameter.folder",
            notebook=notebook,
            name=name,
            path=value,
        )


def _find_config(notebook: str) -> type | None:
    """Find the dataclass of a notebook's stage by its name."""
    return getattr(esm2kit, f"{notebook.partition('_')[2].capitalize()}Config", None)


def _allowed_values(notebook: str) -> dict[str, tuple[Any, ...]]:
    """Read the choices of the parameters that the notebook's stage restricts to a list."""
    config = _find_config(notebook)
    if config is None:
        return {}
    hints = get_type_hints(config)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def format_plan(root: Path, plan: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a plan as a table: every parameter of every notebook, its value, and whether it was given.

    Args:
        root: folder that contains notebooks/.
        plan: notebook -> {parameter: value}.

    Returns:
        The table.
    """
    rows = []
    for notebook, parameters in plan.items():
        known = read_parameters(Path(root) / "notebooks" / f"{notebook}.ipynb")
        for name, value in (known | dict(parameters)).items():
            in_run = name == "work_dir" and name not in parameters
            shown = "artefacts/ of the run" if in_run else repr(value)
            rows.append([notebook, name, shown, "given" if name in parameters else ""])
    return format_table(["notebook", "parameter", "value", ""], rows)
