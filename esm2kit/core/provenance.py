"""The provenance of an output file: stage, configuration, inputs, versions and commit."""

import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from esm2kit.core.files import sha256_file, to_json

logger = logging.getLogger(__name__)

VERSIONED = ("esm2kit", "torch", "lightning", "numpy", "h5py", "pyarrow", "scikit-learn")


@cache
def git_commit() -> str | None:
    """Return the git commit of the source tree, with `-dirty` if tracked files differ; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    """Run a git command and return its output."""
    return subprocess.run(
        ["git", "-C", root, *arguments], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect numerical results."""
    return {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED}


def _version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # such as esm2kit when it runs from a source tree
        return "not installed"


def build_provenance(stage: str, config: Any, inputs: Mapping[str, Path | str] | None = None) -> dict[str, Any]:
    """Build the provenance record that is stored with an output.

    Args:
        stage: The command that writes the output, as in `esm2kit <stage>`.
        config: The stage's dataclass; its `seed`, if it has one, is also recorded on its own.
        inputs: Name -> file. A str is a SHA-256 digest that was computed before.

    Returns:
        A dict for JSON: stage, config, seed, inputs {name: {path, sha256}}, versions, git_commit, created (UTC).
    """
    hashed = {
        name: {"sha256": source} if isinstance(source, str) else {"path": str(source), "sha256": sha256_file(source)}
        for name, source in (inputs or {}).items()
    }
    return {
        "stage": stage,
        "config": to_json(config),
        "seed": getattr(config, "seed", None),
        "inputs": hashed,
        "versions": versions(),
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
