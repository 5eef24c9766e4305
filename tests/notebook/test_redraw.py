"""Results that follow the choices above them: shown once without a front end, updated in place with one."""

import re
from typing import Any

import ipywidgets
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from support.errors import refused

from esm2kit import plots
from esm2kit.core.errors import InputError
from esm2kit.notebook import refresh, widgets
from esm2kit.notebook.refresh import redraw, render, render_figure
from esm2kit.notebook.widgets import REDRAWN, STALE, View

mpl.use("Agg")


class Page:
    """What a notebook page shows: display_id -> data."""

    def __init__(self) -> None:
        self.shown: dict[str, dict[str, Any]] = {}
        self.waiting: list[Any] = []

    def display(self, data: dict[str, Any], display_id: str, **_: Any) -> None:
        self.shown[display_id] = data

    def run_waiting(self) -> None:
        """The kernel is idle: run what was asked for."""
        while self.waiting:
            self.waiting.pop(0)()

    @property
    def texts(self) -> list[str]:
        return [data.get("text/html") or data["text/plain"] for data in self.shown.values()]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page()
    monkeypatch.setattr(refresh, "has_front_end", lambda: True)
    for name in ("display", "update_display"):
        monkeypatch.setattr(refresh, name, page.display)
    monkeypatch.setattr(refresh, "_run_in_main_thread", page.waiting.append)
    return page


def make_view(value: int = 1) -> View:
    def resolve(given: dict[str, int]) -> tuple[int, str]:
        if given["number"] < 0:
            raise InputError("a number below zero", code="test.negative")
        return given["number"], "card"

    return View({"number": ipywidgets.IntText(value=value)}, resolve)


class Text:
    """Something that can be displayed."""

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def test_a_change_is_drawn_in_place_when_the_kernel_is_idle(page: Page) -> None:
    view = make_view()
    redraw(lambda: [Text(f"<b>{view.value}</b>"), Text("<i>same</i>")], view)
    assert page.texts == ["<b>1</b>", "<i>same</i>"]
    view.controls["number"].value = 2
    assert page.texts == ["<b>1</b>", "<i>same</i>"], "drawn while a cell runs"
    assert REDRAWN in view.stripe.value
    view.controls["number"].value = 3
    assert len(page.waiting) == 1, "two quick changes are drawn once"
    page.run_waiting()
    assert page.texts == ["<b>3</b>", "<i>same</i>"]
    assert view.stripe.value == ""


def test_an_invalid_choice_takes_the_place_of_the_results_until_it_is_corrected(page: Page) -> None:
    view = make_view()
    redraw(lambda: [Text(f"<b>{view.value}</b>"), Text("<i>second</i>")], view)
    view.controls["number"].value = -1
    page.run_waiting()
    assert 'role="alert"' in page.texts[0]
    assert "a number below zero" in page.texts[0]
    assert "second" not in page.texts[1], "a result of the earlier choice is left"
    view.controls["number"].value = 4
    page.run_waiting()
    assert page.texts == ["<b>4</b>", "<i>second</i>"]


def test_a_cell_that_runs_again_replaces_its_earlier_function(page: Page) -> None:
    view, drawn = make_view(), []
    for name in ("first", "second"):

        def draw(name: str = name) -> Text:
            drawn.append(f"{name} {view.value}")
            return Text("")

        redraw(draw, view)
    view.controls["number"].value = 2
    page.run_waiting()
    assert drawn == ["first 1", "second 1", "second 2"]


def test_the_first_call_raises_for_an_invalid_choice_and_explains_the_limits_of_the_proteins(page: Page) -> None:
    def fail(code: str) -> Any:
        def draw() -> None:
            raise InputError("not possible", code=code)

        return draw

    with refused("map.field"):
        redraw(fail("map.field"))
    redraw(fail("contacts.too-short"))
    assert 'role="alert"' in page.texts[0], "the cells below would not run"


def test_without_a_front_end_the_function_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(refresh, "display", lambda data, **more: shown.append(data))
    view = make_view()
    redraw(lambda: Text(f"<b>{view.value}</b>"), view)
    view.controls["number"].value = 2
    assert [data["text/html"] for data in shown] == ["<b>1</b>"]
    assert view.redraws == {}


def test_a_choice_that_cells_below_have_read_is_marked_as_stale_until_they_read_it_again() -> None:
    view = make_view()
    view.controls["number"].value = 2
    assert view.stripe.value == "", "nothing below has read it yet"
    assert view.value == 2
    view.controls["number"].value = 3
    assert STALE in view.stripe.value
    view.controls["number"].value = 2
    assert view.stripe.value == "", "the choice that is shown below"
    view.controls["number"].value = 3
    assert view.value == 3
    assert view.stripe.value == ""


def test_the_card_and_the_stripe_are_shown_below_the_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(widgets, "has_front_end", lambda: True)
    monkeypatch.setattr(widgets, "build_front_end_bundle", lambda *rows: shown.extend(rows) or {})
    view = make_view()
    view._repr_mimebundle_()
    assert shown == [view.controls["number"], view.card, view.stripe]


def test_a_figure_is_as_wide_as_the_text_and_no_label_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_min_width", 9.4)
    ax = plots.scores_with_baselines(["a very long name of a model, in words " * 2], [0.5], [0.4], [0.6], "score " * 30)
    (image, _), (caption, _) = render_figure(ax.figure, "*A caption*\nin two lines.")
    assert caption["text/markdown"] == "*A caption* in two lines."
    assert 'aria-label="A caption in two lines."' in image["text/html"]
    (width,) = re.findall(r'<svg [^>]*width="([\d.]+)pt"', image["text/html"])
    assert float(width) > 9.4 * 72, "the label of the axis is wider than the figure, and is not cut off"
    assert not plt.fignum_exists(ax.figure.number), "a figure is left open"
    assert set(image) == {"text/html", "text/plain"}

    square = plots.predicted_vs_true(np.arange(5.0), np.arange(5.0))
    assert square.figure.get_size_inches()[0] < 5
    assert len(render([(square, "*one*"), Text("two")])) == 3
