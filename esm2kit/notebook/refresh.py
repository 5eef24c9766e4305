"""Show the results of a cell, and show them again whenever a choice above them changes."""

import uuid
from collections.abc import Callable, Container
from html import escape
from typing import Any

from IPython import get_ipython
from IPython.display import display, update_display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esm2kit import figures
from esm2kit.core.errors import InputError
from esm2kit.notebook.widgets import View, format_error_card, has_front_end

# These proteins are too few or too short for one picture, and good for the next.
LIMITS = ("map.too-few", "contacts.too-short")
Bundle = tuple[dict[str, Any], dict[str, Any]]


def redraw(draw: Callable[[], Any], *views: View) -> None:
    """Show what a function returns, and call it again whenever one of the views changes.

    The second call runs in the main thread of the kernel as soon as no cell is running. Without a front end the
    function is called once.

    Args:
        draw: function without arguments that reads the views' `.value` and returns what `render` accepts. An InputError
            of a later call is shown in place of the results, and so is that of the first if the proteins are too few
            or too short.
        views: the views that it reads.
    """
    shown = [(uuid.uuid4().hex, bundle) for bundle in _render_or_explain(draw, LIMITS)]
    for name, (data, metadata) in shown:
        display(data, metadata=metadata, raw=True, display_id=name)
    if not has_front_end():
        return
    names = [name for name, _ in shown]

    def draw_again() -> None:
        bundles = _render_or_explain(draw)
        for place, name in enumerate(names):
            data, metadata = bundles[place] if place < len(bundles) else ({"text/html": "", "text/plain": ""}, {})
            update_display(data, metadata=metadata, raw=True, display_id=name)

    for view in views:
        view.redraw_with(getattr(draw, "__name__", repr(draw)), draw_again, _run_in_main_thread)


def _render_or_explain(draw: Callable[[], Any], codes: Container[str] | None = None) -> list[Bundle]:
    """Render what a function returns, or the InputError that it raises; with codes, only errors with one of them."""
    try:
        return render(draw())
    except InputError as error:
        if codes is not None and error.code not in codes:
            raise
        return [({"text/html": format_error_card(str(error)), "text/plain": str(error)}, {})]


def _run_in_main_thread(call: Callable[[], None]) -> None:
    """Run a function when the kernel's main thread is idle: widget messages arrive in another thread."""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        call()
    else:
        kernel.io_loop.add_callback(call)


def render(shown: Any) -> list[Bundle]:
    """Render results as MIME bundles.

    Args:
        shown: a pair (axes, caption), an object that can be displayed, such as a DataFrame or HTML, or a list of these.

    Returns:
        (data, metadata) of each output. A figure and its caption are two.
    """
    if isinstance(shown, list):
        return [bundle for each in shown for bundle in render(each)]
    if isinstance(shown, tuple) and len(shown) == 2 and isinstance(shown[0], Axes):
        return render_figure(shown[0].figure, shown[1])
    formatter = get_ipython().display_formatter.format if get_ipython() else _format_html
    return [formatter(shown)]


def _format_html(shown: Any) -> Bundle:
    html = shown._repr_html_() if hasattr(shown, "_repr_html_") else f"<pre>{escape(repr(shown))}</pre>"
    return {"text/plain": repr(shown), "text/html": html}, {}


def render_figure(figure: Figure, caption: str) -> list[Bundle]:
    """Render a figure, and its caption as Markdown; the caption is also the alternative text. The figure is closed.

    Args:
        figure: the figure.
        caption: Markdown; line breaks are ignored.

    Returns:
        (data, metadata) of the figure, which follows the theme of the page, and of the caption.
    """
    caption = " ".join(caption.split())
    html = figures.render_figure(figure, caption.replace("*", "").replace("`", ""))
    data = {"text/html": html, "text/plain": repr(figure)}
    return [(data, {}), ({"text/markdown": caption, "text/plain": caption}, {})]


def show(shown: Any) -> None:
    """Show results once, see `render`.

    Args:
        shown: as in `render`.
    """
    for data, metadata in render(shown):
        display(data, metadata=metadata, raw=True)
