"""Working folder, inputs and record of a notebook; the record goes into the manifest of the run."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json
from esm2kit.core.paths import expand_path
from esm2kit.notebook import name_errors


def work_folder(work_dir: str | Path) -> Path:
    """Create the folder that a notebook writes to and check that it is writable.

    Every notebook calls this first. It also installs `name_errors` in the kernel.

    Args:
        work_dir: folder, created if it does not exist.

    Returns:
        The folder.

    Raises:
        InputError: the folder cannot be created or written.
    """
    name_errors.install()
    work_dir = expand_path(work_dir)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            return work_dir
    except OSError as error:
        raise InputError(
            f"cannot write to {work_dir}: {error.strerror}. Set work_dir to another folder.",
            code="work-dir.unwritable",
            path=str(work_dir),
        ) from error


def need(path: str | Path, notebook: str) -> Path:
    """Check that a file of an earlier notebook exists.

    Args:
        path: the file.
        notebook: name of the notebook (or script) that creates it.

    Returns:
        The path.

    Raises:
        InputError: the file does not exist; the message names the notebook to run.
    """
    path = expand_path(path)
    if not path.exists():
        raise InputError(
            f"{path} does not exist: run {notebook} first", code="notebook.needs", path=str(path), notebook=notebook
        )
    return path


def record(
    notebook: str,
    work_dir: str | Path,
    made: Mapping[str, Path | str],
    figures: Mapping[str, float],
    result: str = "",
) -> None:
    """Record the artefacts and metrics of a notebook, for its reader and for the manifest of the run.

    Args:
        notebook: its name, such as 01_preprocess.
        work_dir: folder of the artefacts; the record is written to `<work_dir>/records/<notebook>.json`.
        made: name -> file or folder that the notebook created.
        figures: name -> value of a metric.
        result: one sentence with the result, for the top of the run's page.

    Raises:
        InputError: a file of `made` does not exist, or a metric is not a finite number.
    """
    work_dir = expand_path(work_dir)
    for name, value in figures.items():
        if not math.isfinite(value):
            raise InputError(
                f"{notebook}: the metric {name!r} is {value}, which is not a finite number. Check how it is computed.",
                code="record.not-finite",
                notebook=notebook,
                name=name,
            )
    absent = [str(path) for path in made.values() if not Path(path).exists()]
    if absent:
        raise InputError(
            f"{notebook} records artefacts that do not exist: {', '.join(absent)}",
            code="record.absent",
            notebook=notebook,
            paths=absent,
        )
    write_json(
        work_dir / "records" / f"{notebook}.json", {"made": dict(made), "figures": dict(figures), "result": result}
    )
    for name, path in made.items():
        print(f"created {name}: {path}")
