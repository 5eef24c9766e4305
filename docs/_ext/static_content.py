"""Formulas as MathML and Mermaid graphs as SVG, so that pages need no script from the network."""

import re
from itertools import pairwise

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

WIDTH, HEIGHT, GAP_X, GAP_Y = 116, 34, 18, 44


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="math-block">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def arrange(arrows: list[tuple[str, str]]) -> tuple[dict[str, tuple[float, int]], list[list[str]]]:
    """Place a graph's nodes in rows.

    Returns:
        The x of every node's centre, and its row, which is below the rows of all nodes that point to it. For every
        arrow the nodes on its way: its ends, and a node without text in each row that it crosses.
    """
    rows = dict.fromkeys((name for arrow in arrows for name in arrow), 0)
    for _ in list(rows):
        for start, end in arrows:
            rows[end] = max(rows[end], rows[start] + 1)
    ways = []
    for start, end in arrows:
        crossed = range(rows[start] + 1, rows[end])
        ways.append([start, *(f"{start}-{end}-{row}" for row in crossed), end])
        rows |= dict(zip(ways[-1][1:-1], crossed, strict=True))
    places: dict[str, tuple[float, int]] = {}
    for row in range(max(rows.values()) + 1):
        members = [name for name in rows if rows[name] == row]
        steps = [step for way in ways for step in pairwise(way)]
        above = {name: [places[start][0] for start, end in steps if end == name] for name in members}
        members.sort(key=lambda name, above=above: sum(above[name]) / max(len(above[name]), 1))
        widths = [WIDTH / 3 if "-" in name else WIDTH for name in members]
        x = -(sum(widths) + GAP_X * (len(widths) - 1)) / 2
        for name, width in zip(members, widths, strict=True):
            places[name] = (x + width / 2, row)
            x += width + GAP_X
    return places, ways


def graph_svg(text: str) -> str:
    """A Mermaid graph of `a --> b` lines as an SVG that takes the page's colours."""
    arrows = re.findall(r"(\w+) --> (\w+)", text)
    places, ways = arrange(arrows)
    left, right = min(x for x, _ in places.values()) - WIDTH / 2, max(x for x, _ in places.values()) + WIDTH / 2
    height = max(row for _, row in places.values()) * (HEIGHT + GAP_Y) + HEIGHT
    parts = []
    for way in ways:
        line = ""
        for start, end in pairwise(way):
            (x1, row1), (x2, row2) = places[start], places[end]
            y1, y2 = row1 * (HEIGHT + GAP_Y) + HEIGHT, row2 * (HEIGHT + GAP_Y) - 5 * (end == way[-1])
            line += f"M{x1},{y1} " if not line else f"L{x1},{y1} "
            line += f"C{x1},{(y1 + y2) / 2} {x2},{(y1 + y2) / 2} {x2},{y2} "
        parts.append(f'<path d="{line}" marker-end="url(#arrow)"/>')
    for name, (x, row) in places.items():
        y = row * (HEIGHT + GAP_Y)
        if "-" not in name:
            parts.append(f'<rect x="{x - WIDTH / 2}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>')
            parts.append(f'<text x="{x}" y="{y + HEIGHT / 2}">{name}</text>')
    head = '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head = f'<defs>{head}<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    box = f"{left - 2} -2 {right - left + 4} {height + 4}"
    label = "; ".join(f"{start} imports {end}" for start, end in arrows)
    return f'<svg class="graph" role="img" aria-label="{label}" viewBox="{box}">{head}{"".join(parts)}</svg>'


def draw_graphs(app: Sphinx, doctree: nodes.document) -> None:
    """Replace the Mermaid blocks of a page."""
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") == "mermaid":
            block.replace_self(nodes.raw("", graph_svg(block.astext()), format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("doctree-read", draw_graphs)
    return {"parallel_read_safe": True}
