"""Where an artefact came from: stage, configuration, inputs, versions and commit."""

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
    """Commit of the checkout this library runs from, `-dirty` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide an artefact's numbers."""
    return {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # esm2kit itself, where it runs from a source tree
        return "not installed"


def build_provenance(stage: str, config: Any, inputs: Mapping[str, Path | str] | None = None) -> dict[str, Any]:
    """The manifest an artefact carries.

    Args:
        stage: the command that makes it, as in `esm2kit <stage>`.
        config: the stage's dataclass; its `seed`, where it has one, is repeated at the top.
        inputs: name -> file; a str is taken as a hash computed before.
    Returns: a JSON-able dict: stage, config, seed, inputs {name: {path, sha256}}, versions, git_commit, created (UTC).
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
