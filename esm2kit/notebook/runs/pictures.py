"""The figures of executed notebooks, for the page of their run."""

import json
import re
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# The score chart summarises a run best; then the other notebooks with results.
FIRST = ("04", "05", "03", "02")
FIGURE = re.compile(r'<div class="figure" id="([^"]+)"')


class Picture(NamedTuple):
    """A figure of a notebook.

    Args:
        html: the figure as an element.
        caption: Markdown.
        title: first words of the caption, as text.
        anchor: id of the figure on the notebook's page; empty for an image.
    """

    html: str
    caption: str
    title: str
    anchor: str


def read_pictures(executed: Path) -> list[Picture]:
    """Read the figures of an executed notebook, with their captions.

    Args:
        executed: the .ipynb file. One that is absent or half written has no figures.

    Returns:
        The figures that have a caption, in order.
    """
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return []
    found = []
    for cell in cells:
        outputs = [output.get("data", {}) for output in cell.get("outputs", ())]
        for data, following in pairwise([*outputs, {}]):
            caption = "".join(following.get("text/markdown", ""))
            html, anchor = _find_figure(data)
            if html and caption:
                title = re.sub(r"[*`]", "", (re.search(r"\*(.+?)\*", caption) or [caption, caption])[1]).rstrip(".:,")
                found.append(Picture(html, caption, title, anchor))
    return found


def _find_figure(data: dict[str, str | list[str]]) -> tuple[str, str]:
    """Return the element of a figure and its id; empty if the output is something else."""
    html = "".join(data.get("text/html", ""))
    if match := FIGURE.search(html):
        return html, match[1]
    if image := "".join(data.get("image/png", "")):
        return f'<img alt="" src="data:image/png;base64,{escape("".join(image.split()))}">', ""
    return "", ""


def choose_main(pictures: dict[str, list[Picture]]) -> tuple[str, Picture] | None:
    """Choose the figure for the top of the page.

    Args:
        pictures: notebook -> its figures.

    Returns:
        The notebook and its first figure; None if there is no figure.
    """
    order = sorted(pictures, key=lambda name: (FIRST.index(name[:2]) if name[:2] in FIRST else len(FIRST), name))
    return next(((name, pictures[name][0]) for name in order if pictures[name]), None)
