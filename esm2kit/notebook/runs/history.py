"""What runs of the notebooks left: their manifests read, and two of them compared."""

import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esm2kit.core.errors import InputError

# Figures that tell how fast a machine was just then, not what came out: shown, never held against each other.
SPEEDS = ("_per_s", "_gflops", "_seconds")
# Parameters that say where, not what.
PLACES = ("work_dir", "runs_dir")
# Set for kernels that nobody watches, so that widgets show their value instead.
HEADLESS = "ESM2KIT_HEADLESS"
# Names of figures as a page and a terminal say them; a name that is not here is said as it is.
WORDS = {
    "matmul_gflops": "GFLOP/s of a matrix product",
    "validation_records": "validation records",
    "val_perplexity": "validation perplexity",
    "unigram_perplexity": "perplexity by frequency",
    "tokens_per_s": "tokens/s",
    "neighbours_share_label": "nearest neighbours with the same label",
    "layouts_apart": "relative difference of two layouts' losses",
    "mean_of_means_error": "gradient's error by mean of means",
    "loss_at_end": "loss at the end",
}
# A cell that works for longer without a line of output leaves its reader wondering.
MAX_SILENT_SECONDS = 30.0


class Difference(NamedTuple):
    """One name's two values; `beyond` the tolerance or not, None where they cannot be held against each other."""

    name: str
    before: Any
    after: Any
    beyond: bool | None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run's manifest with its status, see `with_status`.

    Raises: InputError if there is none, or it cannot be read.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise InputError(f"{folder} is no run: it has no manifest.json; `esm2kit runs` lists those there are")
    try:
        return with_status(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} cannot be read ({error}); start a new run") from error


def with_status(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with what its entries add up to.

    Returns: besides what was there, "status" (done, failed, running, or interrupted: its process is gone), "at" (the
        notebook that failed, runs or comes next; "" for a run that is done) and "seconds" over all notebooks.
    """
    entries = manifest["notebooks"]
    seconds = sum(entry.get("seconds", 0.0) for entry in entries.values())
    left = [name for name in {**dict.fromkeys(manifest.get("planned", ())), **entries}
            if entries.get(name, {}).get("status") != "done"]  # fmt: skip
    failed = [name for name in left if entries.get(name, {}).get("status") == "failed"]
    at = (failed or left or [""])[0]
    status = "failed" if failed else "done" if entries and not left else "running"
    if status == "running" and not _alive(manifest.get("process")):
        status = "interrupted"
    return dict(manifest) | {"status": status, "at": at, "seconds": seconds}


def this_process() -> dict[str, Any]:
    """Who is at work on a run, so that a run whose process was killed can be told from one that goes on."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _alive(process: Mapping[str, Any] | None) -> bool:
    if process is None:
        return False
    if process["host"] != socket.gethostname():
        return True  # nobody here can tell
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def state(manifest: Mapping[str, Any]) -> str:
    """A run's status in words, with the notebook it is about."""
    words = {"failed": "failed in", "running": "at work on", "interrupted": "interrupted in"}
    if manifest["status"] not in words:
        return manifest["status"]
    return f"{words[manifest['status']]} {manifest['at'] or 'its first notebook'}"


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Run name -> manifest, the last begun first; a folder whose manifest cannot be read is left out."""
    found = {}
    for path in Path(folder).glob("*/manifest.json"):
        try:
            found[path.parent.name] = read_manifest(path.parent)
        except InputError:
            continue
    return dict(sorted(found.items(), key=lambda item: (item[1]["created"], item[0]), reverse=True))


def figures_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`<notebook number> <figure>` -> number."""
    return {
        f"{notebook.split('_')[0]} {name}": value
        for notebook, entry in manifest["notebooks"].items()
        for name, value in entry.get("figures", {}).items()
    }


def parameters_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`<notebook>.<parameter>` -> value, places left out."""
    return {
        f"{notebook}.{name}": value
        for notebook, entry in manifest["notebooks"].items()
        for name, value in entry.get("parameters", {}).items()
        if name not in PLACES
    }


def silent_cells(manifest: Mapping[str, Any], seconds: float = MAX_SILENT_SECONDS) -> list[tuple[str, int, float]]:
    """The cells that worked for longer than so many seconds without a line of output, the longest silence first.

    Returns: notebook, code cell as counted in git, seconds of its longest silence.
    """
    found = [
        (notebook, int(cell), silent)
        for notebook, entry in manifest["notebooks"].items()
        for cell, silent in entry.get("silent_seconds", {}).items()
        if silent > seconds
    ]
    return sorted(found, key=lambda item: -item[2])


def silences(manifest: Mapping[str, Any], seconds: float = MAX_SILENT_SECONDS) -> str:
    """One line on the cells that printed nothing for too long; empty where there are none."""
    quiet = silent_cells(manifest, seconds)
    told = ", ".join(f"{notebook} cell {cell} ({silent:.0f} s)" for notebook, cell, silent in quiet)
    return f"at work for over {seconds:g} s without a line, as on a busy machine: {told}" if quiet else ""


def run_figures(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The figures as a person reads them."""
    return {name: short(value) for name, value in figures_of(manifest).items()}


def worded(name: str) -> str:
    """A figure's name in words, with the notebook's number before it where it had one."""
    number, _, rest = name.partition(" ")
    return f"{number} {WORDS[rest]}" if rest in WORDS else WORDS.get(name, name)


def short(value: Any) -> str:
    """A number as a person reads it: four significant digits, whole numbers whole, thousands never as powers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def compare_runs(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float = 0.0
) -> tuple[list[Difference], list[Difference]]:
    """Parameters that differ, and figures that changed.

    Args:
        before: a manifest.
        after: another.
        tolerance: relative; figures that are closer are beyond=False.
    Returns: parameters, figures; both only where the two values are not equal. A name one run lacks is None there.
    """
    parameters = [
        Difference(name, one, other, True)
        for name, one, other in _paired(parameters_of(before), parameters_of(after))
        if one != other
    ]
    figures = []
    for name, one, other in _paired(figures_of(before), figures_of(after)):
        if one == other:
            continue
        if name.endswith(SPEEDS):
            beyond = None
        elif one is None or other is None:
            beyond = True
        else:
            beyond = not math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0)
        figures.append(Difference(name, one, other, beyond))
    return parameters, figures


def _paired(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of text, each as wide as its widest cell."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )
