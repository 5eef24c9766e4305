"""A tier: notebook -> the parameters that differ from the notebook's own, all of them checked before anything runs."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

import esm2kit
from esm2kit.core.errors import InputError, suggest_name
from esm2kit.notebook.runs.headless import known_parameters
from esm2kit.notebook.runs.history import table
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS


def tier_path(root: Path, tier: str) -> Path:
    """A tier's file, by its name in papermill_runs or by its path. Raises: InputError with the nearest known name."""
    folder = Path(root) / "papermill_runs"
    for path in (folder / f"{tier}.yaml", Path(tier)):
        if path.is_file():
            return path
    known = [path.stem for path in folder.glob("*.yaml")]
    raise InputError(
        f"unknown tier {tier!r}; " + (suggest_name(tier, known) if known else f"{folder} has none"),
        code="tier.unknown",
        name=tier,
        known=known,
    )


def plan_tier(root: Path, path: Path, given: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Notebook -> parameters, the tier's with the command line's laid over them.

    Args:
        root: the folder that holds notebooks/.
        path: the tier's YAML.
        given: `name=value` for every notebook that has the name, or `notebook.name=value`.
    Raises: InputError for an unknown notebook or parameter, with the nearest known name; for a value of another type,
        none of the stage's choices, or a file that is not there.
    """
    files = {file.stem: file for file in sorted((Path(root) / "notebooks").glob("*.ipynb"))}
    try:
        tier = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(
            f"{path} is no YAML: {' '.join(str(error).split())}", code="tier.not-yaml", path=str(path)
        ) from error
    if not isinstance(tier, dict):
        raise InputError(
            f"{path}: a tier is `notebook: {{parameter: value}}`, found {type(tier).__name__}",
            code="tier.form",
            path=str(path),
        )
    plan = {}
    for notebook, parameters in tier.items():
        if notebook not in files:
            raise InputError(
                f"{path}: unknown notebook {notebook!r}; {suggest_name(notebook, files)}",
                code="tier.notebook",
                name=notebook,
            )
        if not isinstance(parameters or {}, dict):
            raise InputError(
                f"{path}: {notebook} takes `parameter: value` lines, found {parameters!r}",
                code="tier.form",
                path=str(path),
                notebook=notebook,
            )
        plan[notebook] = dict(parameters or {})
    known = {notebook: known_parameters(files[notebook]) for notebook in plan}
    for each in given:
        for notebook, parameter, value in _parse_override(each, known):
            plan[notebook][parameter] = value
    return {
        notebook: check_parameters(root, notebook, parameters, known[notebook]) for notebook, parameters in plan.items()
    }


def _parse_override(given: str, known: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, Any]]:
    """(notebook, parameter, value) of one `-p name=value`; text stays text where the parameter is text."""
    name, equals, value = given.partition("=")
    if not equals:
        raise InputError(
            f"-p {given}: write name=value, or notebook.name=value", code="parameter.no-value", given=given
        )
    notebook, dot, parameter = name.rpartition(".")
    targets = [notebook] if dot else [candidate for candidate in known if parameter in known[candidate]]
    if not targets or any(target not in known for target in targets):
        names = sorted({name for names in known.values() for name in names})
        raise InputError(
            f"-p {given}: no notebook has a parameter {name!r}; {suggest_name(name, names)}",
            code="parameter.unknown",
            name=name,
        )
    for target in targets:
        text = isinstance(known[target].get(parameter), str)
        try:
            yield target, parameter, value if text else yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"-p {given}: {value!r} is no value of {parameter}",
                code="parameter.not-yaml",
                name=parameter,
                found=value,
            ) from None


def check_parameters(
    root: Path, notebook: str, parameters: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """A notebook's parameters, each known, of its default's type, among its stage's choices, its file there.

    Raises: InputError for the first that is not.
    """
    choices = _allowed_values(notebook) if parameters else {}
    values = {}
    for name, value in parameters.items():
        if name not in known:
            raise InputError(
                f"{notebook} has no parameter {name!r}; {suggest_name(name, known)}",
                code="parameter.unknown",
                notebook=notebook,
                name=name,
            )
        values[name] = value = _convert(notebook, name, value, known[name])
        if name in choices and value not in choices[name]:
            hint = suggest_name(str(value), [str(each) for each in choices[name]])
            raise InputError(
                f"{notebook}: {name} cannot be {value!r}; {hint}",
                code="parameter.choice",
                notebook=notebook,
                name=name,
                found=value,
            )
        if isinstance(value, str) and name not in LOCATION_PARAMETERS:
            _check_path(Path(root) / "notebooks", notebook, name, value, known[name])
    return values


def _convert(notebook: str, name: str, value: Any, default: Any) -> Any:
    """The value in its default's type; YAML reads 1e-3, without a point, as text."""
    typed = value
    if isinstance(default, float) and not isinstance(value, bool | float):
        with contextlib.suppress(TypeError, ValueError):
            typed = float(value)
    if type(typed) is not type(default) or typed != typed:
        raise InputError(
            f"{notebook}: {name} is of type {type(default).__name__}, like {default!r}; found {value!r}",
            code="parameter.type",
            notebook=notebook,
            name=name,
            found=value,
        )
    return typed


def _check_path(folder: Path, notebook: str, name: str, value: str, default: Any) -> None:
    """Where the notebook's own value is a file, another one has to be there; a folder may still be made."""
    if not default or not value or not (folder / default).exists():
        return
    path = folder / value
    if (folder / default).is_file() and not path.is_file():
        raise InputError(
            f"{notebook}: {name} {value} is not a file; a path counts from notebooks/",
            code="parameter.file",
            notebook=notebook,
            name=name,
            path=value,
        )
    if (folder / default).is_dir() and (path.is_file() or not path.parent.is_dir()):
        raise InputError(
            f"{notebook}: {name} {value} is no folder and cannot be one; a path counts from notebooks/",
            code="parameter.folder",
            notebook=notebook,
            name=name,
            path=value,
        )


def _allowed_values(notebook: str) -> dict[str, tuple[Any, ...]]:
    """Parameter -> what the stage that the notebook is named after allows, for those where the stage has a list."""
    config = getattr(esm2kit, f"{notebook.partition('_')[2].capitalize()}Config", None)
    if config is None:
        return {}
    hints = get_type_hints(config)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def plan_table(root: Path, plan: Mapping[str, Mapping[str, Any]]) -> str:
    """The plan as a table: every parameter that a notebook runs with, and where the value is from."""
    rows = []
    for notebook, parameters in plan.items():
        known = known_parameters(Path(root) / "notebooks" / f"{notebook}.ipynb")
        for name, value in (known | dict(parameters)).items():
            own = name == "work_dir" and name not in parameters
            shown = "artefacts/ of the run" if own else repr(value)
            rows.append([notebook, name, shown, "given" if name in parameters else ""])
    return table(["notebook", "parameter", "value", ""], rows)
