"""Paths: `~` alike on the command line, in YAML, notebooks and Python, and file names that every system accepts."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError, check_type, check_types

# what Windows refuses in a file name: characters, and names of devices, with any ending
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)


def portable_name(text: str) -> str:
    """Convert a text of the input to a file name that every system accepts, so that results can be copied.

    Args:
        text: Such as the name of a file or a task.

    Returns:
        The text with - for each character that Windows refuses, without dots and blanks at its end, and with _ before
        the name of a device, such as `con`. Most names are returned unchanged.
    """
    name = FORBIDDEN.sub("-", text).rstrip(". ") or "-"
    return f"_{name}" if DEVICES.match(name) else name


def expand_path(path: Path | str) -> Path:
    """Replace a leading `~` or `~user` by the home folder, as a shell does.

    Args:
        path: A path; it is returned unchanged if it does not start with `~`, or if a file with such a name exists.

    Returns:
        The path.

    Raises:
        InputError: It is not a path, or the home folder is unknown.
    """
    if not isinstance(path, str | os.PathLike):
        check_type(path, Path, "path")
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
    """Check the types of a dataclass's fields, and expand `~` in those that hold paths or a model's path.

    Args:
        config: A dataclass instance, also a frozen one; its fields are replaced.

    Raises:
        InputError: A field has another type, or a home folder is unknown.
    """
    check_types(config)
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


def find_packaged_file(name: str) -> Path:
    """Find a file that the wheel contains and a checkout has at the same place, such as data/golden/published.yaml.

    Args:
        name: Path in the checkout, with /.

    Returns:
        The path of the file.

    Raises:
        InputError: The installation does not have it.
    """
    found = find_packaged_files(name)
    if not found:
        raise InputError(
            f"this installation of esm2kit has no {name}. Install esm2kit from its wheel or from a clone.",
            code="file.packaged",
            name=name,
        )
    return found[0]


def find_packaged_files(pattern: str) -> list[Path]:
    """Find all files of the wheel or the checkout that match a pattern, sorted."""
    package = Path(__file__).resolve().parents[1]
    packed = package / "walkthrough"
    root = packed if packed.is_dir() else package.parent
    return sorted(path for path in root.glob(pattern) if path.is_file())
