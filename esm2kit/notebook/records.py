"""What a notebook needs, makes and measures: its working folder, its inputs, and its record for the run's manifest."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json
from esm2kit.notebook import name_errors


def work_folder(work_dir: str | Path) -> Path:
    """The folder a notebook writes to, created where it is absent, and checked.

    Every notebook calls this first, so from here on its kernel names the cell to run for a name that is not there yet.

    Raises:
        InputError: nothing can be written there.
    """
    name_errors.install()
    work_dir = Path(work_dir)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            return work_dir
    except OSError as error:
        raise InputError(
            f"cannot write to {work_dir}: {error.strerror}; set work_dir to another folder",
            code="work-dir.unwritable",
            path=str(work_dir),
        ) from error


def need(path: str | Path, notebook: str) -> Path:
    """A file that an earlier notebook makes. Raises: InputError naming that notebook where it is absent."""
    if not Path(path).exists():
        raise InputError(
            f"{path} is not there: run {notebook} first", code="notebook.needs", path=str(path), notebook=notebook
        )
    return Path(path)


def record(
    notebook: str,
    work_dir: str | Path,
    made: Mapping[str, Path | str],
    figures: Mapping[str, float],
    result: str = "",
) -> None:
    """What a notebook made and measured, for its reader and for the run's manifest.

    Args:
        notebook: its name, such as 01_preprocess.
        work_dir: the notebook's folder of artefacts; the record goes to `<work_dir>/records/<notebook>.json`.
        made: name -> file or folder.
        figures: name -> number.
        result: the result in a sentence, for the head of the run's page.
    """
    work_dir = Path(work_dir)
    absent = [str(path) for path in made.values() if not Path(path).exists()]
    if absent:
        raise InputError(
            f"{notebook} names artefacts that are not there: {', '.join(absent)}",
            code="record.absent",
            notebook=notebook,
            paths=absent,
        )
    write_json(
        work_dir / "records" / f"{notebook}.json", {"made": dict(made), "figures": dict(figures), "result": result}
    )
    for name, path in made.items():
        print(f"made {name}: {path}")
