"""Render a report as one HTML file that loads nothing from the network and follows the light or dark theme."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes

from esm2kit.figures import render_figure


def render_page(
    title: str,
    lead: str,
    facts: Sequence[str],
    sections: Sequence[Mapping[str, Any]],
    warnings: Sequence[str] = (),
    style: str = "",
    script: str = "",
) -> str:
    """Render the HTML page; all text is escaped except the figures from `build_figure`.

    Args:
        title: of the page.
        lead: first paragraph, the result.
        facts: further paragraphs.
        sections: `title`, and any of `text`, `points`, `table`, `figures`, `links`, `download`, and `code` with its
            `summary`.
        warnings: paragraphs with a mark.
        style: CSS that is added, as it is.
        script: JavaScript at the end of the page, as it is.

    Returns:
        The HTML text.
    """
    pages = Environment(loader=PackageLoader("esm2kit"), autoescape=True, trim_blocks=True)
    return pages.get_template("page.html.j2").render(
        title=title, lead=lead, facts=facts, sections=sections, warnings=warnings, style=style, script=script
    )


def build_figure(draw: Callable[[], Axes], alt: str, caption: str) -> dict[str, str]:
    """Build a figure of a section.

    Args:
        draw: Plots the figure and returns its axes.
        alt: Alternative text.
        caption: Text below the figure.

    Returns:
        The template's variables: html and caption.
    """
    with mpl.rc_context({"text.parse_math": False}):  # a label may contain dollar signs
        return {"html": render_figure(draw().figure, alt), "caption": caption}


def format_sentence(note: str) -> str:
    """Add a capital letter and a full stop to a note. A note that starts with a name, of a file or task, keeps it."""
    starts_with_word = re.match(r"[a-z]+,? |multi-label\b", note)
    return f"{note[:1].upper() if starts_with_word else note[:1]}{note[1:].rstrip('.')}."


def build_headers(names: Sequence[str], numbers_from: int = 1) -> list[dict[str, Any]]:
    """Build the headers of a table; columns from `numbers_from` on are numeric."""
    return [{"text": name, "number": column >= numbers_from} for column, name in enumerate(names)]
