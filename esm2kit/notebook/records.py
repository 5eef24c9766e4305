"""Working folder, inputs and record of a notebook; the record goes into the manifest of the run."""

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path

from IPython.display import display

from esm2kit import plots
from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json
from esm2kit.core.paths import expand_path
from esm2kit.notebook import name_errors
from esm2kit.sequences.fasta import strip_fasta_suffix

FIGURE_WIDTH = 9.4  # inches: the text of a page at 100 pixels per inch


def work_folder(work_dir: str | Path) -> Path:
    """Create the folder that a notebook writes to and check that it is writable.

    Every notebook calls this first. It also installs `name_errors` in the kernel and makes figures as wide as the text.

    Args:
        work_dir: folder, created if it does not exist.

    Returns:
        The folder.

    Raises:
        InputError: the folder cannot be created or written.
    """
    name_errors.install()
    plots.widen_figures(FIGURE_WIDTH)
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


def output_name(fasta: str | Path, folder: str | Path, *more: str) -> str:
    """Name the files made from a FASTA file after it, so that those of another FASTA file are not replaced.

    The name is the file's own, such as `enzymes` for lab/enzymes.fasta.gz, followed by the other words. If files of
    another FASTA file of this name are in the folder, a number is added; `inputs.json` in the folder records them.

    Args:
        fasta: the input.
        folder: folder of the outputs; it is created.
        more: further words, such as the name of a model.

    Returns:
        The first part of the names.
    """
    fasta, known = expand_path(fasta), Path(folder) / "inputs.json"
    path, stem = str(Path(fasta).resolve()), strip_fasta_suffix(fasta)
    inputs = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    name = next((name for name, source in inputs.items() if source == path), None)
    if name is None:
        free = (stem if number == 1 else f"{stem}_{number}" for number in itertools.count(1))
        name = next(name for name in free if name not in inputs)
        write_json(known, inputs | {name: path})
    return "_".join([name, *(re.sub(r"[^\w.-]+", "_", word) for word in more)])


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
    if not made:
        return
    lines = [f"created {name}: {path}" for name, path in made.items()]
    # relative to the notebook, so that the links also work in JupyterLab; the pages of a run adapt them
    links = "".join(
        f'<li><a href="{escape(os.path.relpath(path).replace(os.sep, "/"))}">{escape(name)}</a></li>'
        for name, path in made.items()
    )
    data = {"text/plain": "\n".join(lines), "text/html": f"Created:<ul style='margin:.2em 0'>{links}</ul>"}
    display(data, raw=True)
