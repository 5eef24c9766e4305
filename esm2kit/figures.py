"""Figures as inline SVG for reports and notebooks: they follow the page's light or dark theme, and no label is cut off.

The colours of text, axes and lines come from the page; the colours of data are the same on both themes.
"""

import hashlib
import io
import re
from html import escape

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from esm2kit.plots import PRIMARY

# JupyterLab's colour of text; other pages have no such variable.
TEXT = "color: var(--jp-content-font-color1, inherit)"
# Space around a figure, in inches.
PAD = 0.06
RASTER_DPI = 180
LEAST_TEXT = (
    9.0  # height of the smallest text of a picture on a narrow page, in CSS pixels; a page scrolls such pictures
)
PIXELS_PER_POINT = 4 / 3
# Colour in a figure -> colour of the page. Black text and areas have no attribute in matplotlib's SVG: they inherit.
INK, PAPER = "currentColor", "var(--paper, var(--jp-layout-color0, #fff))"
PRIMARY_HEX = to_hex(PRIMARY)


def render_svg(figure: Figure) -> str:
    """Render a figure as an <svg> element that takes its colours from the page, and close the figure.

    Args:
        figure: the figure. Its box is widened to hold all labels.

    Returns:
        The element. Its ids are unique on a page. Its style has the variable --least-width, the width at which its
        smallest text is readable; pages that can scroll a picture use it as a minimum.
    """
    for label in figure.findobj(Text):
        label.set_parse_math(False)  # it may contain dollar signs
    figure.draw_without_rendering()  # gives the ticks their labels
    for label in figure.findobj(Text):  # the powers of ten of a logarithmic axis are formulas
        label.set_parse_math("mathdefault" in label.get_text())
    sizes = [label.get_fontsize() for label in figure.findobj(Text) if label.get_visible() and label.get_text().strip()]
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esm2kit"}):
        figure.savefig(
            text, format="svg", transparent=True, bbox_inches="tight", pad_inches=PAD, dpi=RASTER_DPI,
            metadata={"Date": None, "Creator": None},
        )  # fmt: skip
    plt.close(figure)
    body = text.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body[body.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # would style the page
    body = body.replace("#000000", INK)
    if "<image" not in body:  # points that are pixels keep their colour, and so must the legend
        body = body.replace(PRIMARY_HEX, f"var(--primary, {PRIMARY_HEX})")
    body = re.sub(r"stroke: #ffffff", f"stroke: {PAPER}", body)
    salt = f"f{hashlib.sha256(body.encode()).hexdigest()[:10]}"
    body = re.sub(r'(\bid=")', rf"\1{salt}-", body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{salt}-", body)
    points = float(re.search(r'<svg [^>]*?width="([\d.]+)pt"', body)[1])
    least = points * min(LEAST_TEXT / min(sizes), PIXELS_PER_POINT) if sizes else 0
    look = f"fill: {INK}; stroke-linejoin: round; stroke-linecap: butt; max-width: 100%; height: auto"
    look += f"; --least-width: {least:.0f}px"
    return body.replace("<svg ", f'<svg style="{look}" ', 1)


def render_figure(figure: Figure, alt: str) -> str:
    """Render a figure as HTML with an alternative text, and close the figure.

    Args:
        figure: the figure.
        alt: its alternative text.

    Returns:
        A <div> element with an id, to which pages can link.
    """
    svg = render_svg(figure)
    name = f"figure-{hashlib.sha256(svg.encode()).hexdigest()[:10]}"
    return f'<div class="figure" id="{name}" role="img" aria-label="{escape(alt)}" style="{TEXT}">{svg}</div>'
