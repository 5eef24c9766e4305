"""Expand `~` in paths, alike for the command line, YAML, notebooks and Python."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError


def expand_path(path: Path | str) -> Path:
    """Replace a leading `~` or `~user` by the home folder, as a shell does.

    Args:
        path: A path; it is returned unchanged if it does not start with `~`, or if a file with such a name exists.

    Returns:
        The path.

    Raises:
        InputError: The home folder is unknown.
    """
    path = Path(path)
    first = path.parts[0] if path.parts else ""
    if not first.startswith("~") or (first != "~" and os.path.lexists(first)):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(
            f"'{path}': the home folder of '{first}' is not known. Write the complete path.",
            code="path.home",
            path=path,
        ) from None


def expand_paths(config: Any) -> None:
    """Expand `~` in all fields of a dataclass that hold paths, or text such as a model's path.

    Args:
        config: A dataclass instance, also a frozen one; its fields are replaced.

    Raises:
        InputError: A home folder is unknown.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        expanded = [_expand(item) for item in value] if isinstance(value, list) else _expand(value)
        if expanded != value:
            object.__setattr__(config, field.name, expanded)


def _expand(value: Any) -> Any:
    """Expand a path or text that starts with `~`; other values are returned unchanged."""
    if isinstance(value, Path | str) and str(value).startswith("~"):
        return type(value)(expand_path(value))
    return value
