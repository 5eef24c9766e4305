"""A benchmark's folder: rows that are done and taken up again, predictions, and reports that were there before."""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.scores import protein_numbers
from esm2kit.core.files import atomic_path, to_json
from esm2kit.tasks.data import TaskData

logger = logging.getLogger(__name__)

FILES = ("predictions.npz", "report.html", "report.json")


def model_folder(model: Path | str) -> str:
    """What a model's folder is called: its name, or its path with -- for each /, so that no two models share one."""
    path, here = Path(os.path.abspath(model)), Path.cwd()
    parts = path.relative_to(here).parts if path.is_relative_to(here) else path.parts[1:]
    return "--".join(parts) or here.name


def keep_earlier(out_dir: Path, report: dict[str, Any]) -> None:
    """Make way for a report: one of another model, task or setting moves to a folder of its own in `earlier`.

    Args:
        out_dir: the benchmark's folder.
        report: what is about to be written there.
    """
    try:
        before = json.loads((out_dir / "report.json").read_text())
        if _decided(before) == _decided(json.loads(json.dumps(to_json(report)))):
            return
        name = f"{before['task']['name']} {before['model']['name']}"
    except FileNotFoundError:
        return
    except (json.JSONDecodeError, KeyError, TypeError):
        name = "another version's"
    number = 1
    while (folder := out_dir / "earlier" / str(number)).exists():
        number += 1
    folder.mkdir(parents=True)
    for file in FILES:
        if (out_dir / file).exists():
            os.replace(out_dir / file, folder / file)
    logger.info("the report that was here (%s) is now %s", name, folder / "report.html")


def _decided(report: dict[str, Any]) -> list[Any]:
    """What decides a report's figures: of two that agree in it one is enough."""
    inputs = {name: given["sha256"] for name, given in report["provenance"]["inputs"].items() if name != "embeddings"}
    model, rows = report["model"], [row["name"] for row in report["rows"]]
    return [report["task"], report["settings"], inputs, model["name"], model["embeddings"].get("fingerprint"), rows]


def file_key(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def finished(
    folder: Path, name: str, key: Any, fit: Callable[[], tuple[Fitted, str] | None]
) -> tuple[Fitted, str] | None:
    """A finished row from disk if it was made from the very same things by this version; otherwise fit and keep it."""
    key = {"key": key, "version": importlib.metadata.version("esm2kit")}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["digest"]) == digest:
                told = json.loads(str(stored["told"]))
                logger.info("%s: taken from an earlier run", name)
                return Fitted(stored["test"], stored["validation"], **told["fitted"]), told["note"]
    logger.info("%s: fitting", name)
    found = fit()
    if found is None:
        return None
    fitted, note = found
    told = {"note": note, "fitted": {key: getattr(fitted, key) for key in ("history", "selected", "seconds")}}
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file, digest=digest, test=fitted.test_SM, validation=fitted.validation_SM, told=json.dumps(told)
        )
    return found


def write_predictions(path: Path, data: TaskData, predictions: dict[str, np.ndarray]) -> None:
    """Test truth and every row's predictions: what a comparison of reports draws its replicates from."""
    rows = data.target_rows("test")
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            fingerprint=_test_fingerprint(data),
            task=data.sha256,
            truth=data.targets[rows],
            protein=protein_numbers(data),
            **{f"predicted/{name}": predicted for name, predicted in predictions.items()},
        )


def _test_fingerprint(data: TaskData) -> str:
    """SHA-256 of the scored test set alone: reports that share it can be compared pair by pair."""
    rows = data.target_rows("test")
    digest = hashlib.sha256("\n".join(data.ids[row] for row in data.rows("test")).encode())
    digest.update(len(rows).to_bytes(8, "little") + data.targets[rows].tobytes())
    return digest.hexdigest()
