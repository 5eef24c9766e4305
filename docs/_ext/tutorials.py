"""Copy the notebooks into `tutorials/`: as the newest finished sample run executed them, or without outputs.

`python docs/_ext/tutorials.py` prints that run's name and the notebooks that changed since; 1 if there is no such run.
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from write import write_pages

from esm2kit.core.files import sha256_file
from esm2kit.notebook.runs.manifest import LOCATION_PARAMETERS, read_manifest, read_runs

ROOT = Path(__file__).resolve().parents[2]
TIER = "sample"
# of a longer log only the last lines are shown, and the others on request
MAX_LINES, LAST_LINES = 8, 3
# links of a notebook to files of the repository that have no page here
REPOSITORY_LINK = re.compile(r"\[([^]]*)\]\(\.\./[^)]*\)")


def newest_run(runs: Path = ROOT / "papermill_runs") -> Path | None:
    """Folder of the newest finished run of the sample tier that has every notebook."""
    names = {path.stem for path in notebooks()}
    finished = (
        runs / name
        for name, run in read_runs(runs).items()
        if run.tier == TIER and run.status == "done" and names <= set(run.notebooks)
    )
    return next(finished, None)


def notebooks() -> list[Path]:
    """The notebooks of the repository."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def fold(log: str) -> dict[str, Any]:
    """A long log as an output whose first lines are folded away."""
    lines = log.splitlines(keepends=True)
    first, last = ("".join(part) for part in (lines[:-LAST_LINES], lines[-LAST_LINES:]))
    summary = f"<summary>{len(lines) - LAST_LINES} earlier lines of the log</summary>"
    html = f'<details class="log">{summary}<pre>{escape(first)}</pre></details><pre class="log">{escape(last)}</pre>'
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": html, "text/plain": log}}


def outputs(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """A cell's outputs with its log in one piece, folded if it is long."""
    found: list[dict[str, Any]] = []
    for each in cell["outputs"]:
        if found and each["output_type"] == "stream" == found[-1]["output_type"] and each["name"] == found[-1]["name"]:
            found[-1]["text"] += "".join(each["text"])
        elif each["output_type"] == "stream":
            found.append(each | {"text": "".join(each["text"])})
        else:
            found.append(each)
    found = [each for each in found if each["output_type"] != "stream" or each["text"].strip()]
    return [
        fold(each["text"]) if each["output_type"] == "stream" and each["text"].count("\n") > MAX_LINES else each
        for each in found
    ]


def tutorial(path: Path, executed: bool, folders: list[Path]) -> str:
    """The notebook of a page, without paths of this machine and without links that lead nowhere.

    Args:
        path: the notebook.
        executed: keep the outputs.
        folders: paths are shown relative to these.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            # the cell that papermill added: shown if the run changed a parameter other than its folders
            lines = "".join(cell["source"]).splitlines()
            changed = [line for line in lines[1:] if line.partition(" =")[0] not in ("", *LOCATION_PARAMETERS)]
            if not changed:
                continue
            cell["source"] = "\n".join(["# changed in this run", *changed])
        cells.append(cell)
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
        # myst-nb does not show attachments: put the images into the text
        for name, images in cell.pop("attachments", {}).items():
            kind, image = next(iter(images.items()))
            source = "".join(cell["source"])
            cell["source"] = source.replace(f"attachment:{name}", f"data:{kind};base64,{''.join(image.split())}")
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs(cell) if executed else []
        else:
            cell["source"] = REPOSITORY_LINK.sub(r"\1", "".join(cell["source"]))
    metadata = {key: notebook["metadata"][key] for key in ("kernelspec", "language_info")}
    text = json.dumps(notebook | {"cells": cells, "metadata": metadata}, indent=1, ensure_ascii=False)
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return text


def overview() -> str:
    """The list of the tutorials with the sentence that each begins with, which `tutorials/index.md` includes."""
    entries = []
    for path in notebooks():
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, sentence = re.match(r"# (.*)\n+\*\*(.*?)\*\*", text).groups()
        entries.append(f"[{title}]({path.name})\n: {sentence}\n")
    pages = "\n".join(path.stem for path in notebooks())
    return "\n".join([*entries, f"```{{toctree}}\n:hidden:\n{pages}\n```\n"])


def generate(app: Sphinx) -> None:
    """Write the notebooks and their list into `tutorials/`."""
    executed = app.config.tutorial_notebooks != "plain"
    run = newest_run() if executed else None
    if executed and run is None:
        raise SystemExit("no finished run of the sample tier: `make walkthrough`, or build with NOTEBOOKS=plain")
    folders = [ROOT]
    if run:
        # where the run was made: the checkout may have moved since
        place = Path(read_manifest(run).notebooks["00_start_here"].parameters["work_dir"]).parent
        folders = [place, place.parents[1], ROOT]
    pages = {path.name: tutorial(run / path.name if run else path, executed, folders) for path in notebooks()}
    write_pages(Path(app.srcdir) / "tutorials", pages | {"notebooks.inc": overview()})


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_config_value("tutorial_notebooks", "executed", "env", types=(str,))
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    found = newest_run()
    if found is None:
        sys.exit(1)
    entries = read_manifest(found).notebooks
    changed = [path.stem for path in notebooks() if sha256_file(path) != entries[path.stem].source_sha256]
    note = f"; changed since then, so run `make walkthrough` again: {', '.join(changed)}" if changed else ""
    print(f"tutorials: outputs of {found.name}{note}")
