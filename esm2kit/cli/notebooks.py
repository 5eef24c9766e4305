"""`esm2kit notebooks`: copy the notebooks, the sample data and the tiers out of the installed package."""

import json
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, check_output_folder, sha256_file, write_json
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import expand_paths

RECORD = ".esm2kit_walkthrough.json"  # file in the folder -> SHA-256 of what was copied to it


@dataclass(frozen=True)
class NotebooksConfig:
    """Copy the notebooks, the sample data and the tiers to a folder, where the walkthrough runs.

    Args:
        out_dir: Folder for the files. In an existing copy, files of an older version are updated, and files that you
            changed are kept.
    """

    out_dir: Path

    def __post_init__(self) -> None:
        expand_paths(self)


def copy_notebooks(config: NotebooksConfig) -> str:
    """Copy the walkthrough to a folder; a file that the user changed there is kept.

    Args:
        config: The folder.

    Returns:
        Text for the user: what was copied, which files were kept, and how to continue.

    Raises:
        InputError: The folder cannot be written to, or it is inside the package or the checkout that is copied.
    """
    out_dir, sources = Path(config.out_dir), find_walkthrough()
    check_output_folder(out_dir)
    if any((out_dir / name).resolve() == source.resolve() for name, source in sources.items()):
        raise InputError(
            f"{out_dir} holds the notebooks that would be copied. Choose another folder, or use them where they are.",
            code="notebooks.source",
            path=out_dir,
        )
    recorded = _read_record(out_dir / RECORD)
    written, kept, copied = 0, [], {}
    for name, source in sources.items():
        target, digest = out_dir / name, sha256_file(source)
        found = sha256_file(target) if target.is_file() else None
        if found in (None, digest, recorded.get(name)):
            copied[name] = digest
            if found != digest:
                with atomic_path(target) as part:
                    shutil.copyfile(source, part)
                written += 1
        else:
            kept.append(name)
            if name in recorded:
                copied[name] = recorded[name]
    write_json(out_dir / RECORD, copied)
    return _describe(out_dir, written, kept)


def find_walkthrough() -> dict[str, Path]:
    """Find the files of the walkthrough: those inside an installed package, or those of a checkout.

    Returns:
        Path in the copy, with /, -> path of the file.

    Raises:
        InputError: Neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    packed, checkout = package / "walkthrough", package.parent
    if packed.is_dir():
        root, patterns = packed, ["**/*"]
    elif (checkout / "notebooks").is_dir() and (checkout / "pyproject.toml").is_file():
        settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
        root, patterns = checkout, settings["tool"]["esm2kit"]["walkthrough"]
    else:
        raise InputError(
            f"{package}: this installation has no notebooks. Install esm2kit from its wheel or from a clone.",
            code="notebooks.absent",
            path=package,
        )
    files = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return {str(PurePosixPath(path.relative_to(root))): path for path in sorted(files)}


def _read_record(path: Path) -> dict[str, str]:
    """Read what an earlier call copied; without a readable record every file that differs counts as changed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(out_dir: Path, written: int, kept: list[str]) -> str:
    """Describe in a few lines what was done and how to continue."""
    lines = [f"{out_dir}: {format_count(written, 'file')} copied" if written else f"{out_dir}: nothing to copy"]
    lines += [
        f"kept your changes: {name}; move the file and run this command again to get the original" for name in kept
    ]
    if any(find_spec(package) is None for package in ("papermill", "ipywidgets", "jupyterlab")):
        lines.append('pip install "esm2kit[notebooks]"   # the packages that the notebooks need')
    lines += [
        f"cd {shlex.quote(str(out_dir))}",
        "jupyter lab notebooks/00_start_here.ipynb   # read and run them",
        "esm2kit run sample   # or run all of them in the background, about 8 minutes on two cores",
    ]
    return "\n".join(lines)
