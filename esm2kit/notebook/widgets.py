"""Widgets of the notebooks: each is a view of notebook parameters, and the next cell reads its `.value`.

A view starts with the values of the parameters cell, so that papermill's parameters apply. Its value is computed when
it is read, from its controls alone. Without a front end a view shows its value as HTML.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import yaml
from IPython.display import Javascript, display

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.core.paths import portable_name
from esm2kit.notebook.runs.history import HEADLESS

SHIPPED_TIERS = ("sample", "small", "full")
# JupyterLab's theme colours, with fallbacks elsewhere
INK, QUIET, LINE = "var(--jp-ui-font-color1, #333)", "var(--jp-ui-font-color2, #666)", "var(--jp-border-color2, #bbb)"
ERROR, STRIPE = "var(--jp-error-color0, #b3261e)", "var(--jp-warn-color0, #c77700)"
STALE = "Changed: what is below still shows the earlier choice. Run the cells below."
REDRAWN = "Changed: the pictures below follow as soon as no cell is running."
MONO = "margin:.4em 0 0;font-family:var(--jp-code-font-family, monospace);font-size:.9em"
LABEL = {"description_width": "11em"}
WIDE = {"width": "44em", "max_width": "99%"}


def has_front_end() -> bool:
    """Check whether a front end is attached to this kernel: JupyterLab, Notebook, VS Code or Colab.

    `esm2kit run` sets ESM2KIT_HEADLESS. Kernels of papermill and nbconvert have no session name.

    Returns:
        True if widgets can be shown.
    """
    if os.environ.get(HEADLESS):
        return False
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    in_kernel = shell is not None and hasattr(shell, "kernel")
    return in_kernel and (
        "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns or "google.colab" in sys.modules
    )


class View:
    """Controls, and a card below them that describes the choice or explains why it is invalid.

    Args:
        controls: notebook parameter -> the ipywidget that shows it.
        value_of: function from the parameters to the value and the HTML of the card. An InputError that it raises
            is shown in the card, and raised again when `.value` is read.
        extras: further widgets to show below the controls, which are not parameters.
    """

    def __init__(
        self,
        controls: Mapping[str, ipywidgets.ValueWidget],
        value_of: Callable[[dict[str, Any]], tuple[Any, str]],
        extras: Sequence[ipywidgets.Widget] = (),
    ) -> None:
        self.controls, self.value_of, self.extras = dict(controls), value_of, tuple(extras)
        self.card, self.stripe = ipywidgets.HTML(), ipywidgets.HTML()
        self.used: dict[str, Any] | None = None  # the parameters that a cell below has read
        self.redraws: dict[str, Callable[[], None]] = {}  # keep what is below up to date, by the name of the function
        self.waiting: set[str] = set()  # redraws that a change has asked for and that have not run yet
        for control in self.controls.values():
            control.observe(lambda change: self._change(), "value")
        self._show()

    @property
    def parameters(self) -> dict[str, Any]:
        """Notebook parameter -> value of its control."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def value(self) -> Any:
        """The chosen value. Reading it also means that what is below shows this choice.

        Raises:
            InputError: the choice is invalid; the card shows the same message.
        """
        parameters = self.parameters
        value = self.value_of(parameters)[0]
        self.used = parameters
        if not self.waiting:
            self.stripe.value = ""
        return value

    def follow(self, other: "View") -> None:
        """Update this view's card whenever another view changes.

        Args:
            other: a view that this view's value depends on.
        """
        for control in other.controls.values():
            control.observe(lambda change: self._show(), "value")

    def _show(self) -> None:
        self.card.value = self._card()

    def _change(self) -> None:
        self._show()
        stale = self.used is not None and self.parameters != self.used
        self.stripe.value = format_stripe(REDRAWN if self.redraws else STALE) if stale else ""
        for redraw in list(self.redraws.values()):
            redraw()

    def redraw_with(self, name: str, draw: Callable[[], None], run: Callable[[Callable[[], None]], None]) -> None:
        """Call a function after each change; the note that what is below is stale stays until it has run.

        Args:
            name: name of the function; it replaces an earlier one of the same name, as when a cell is run again.
            draw: the function.
            run: how to call it.
        """

        def draw_once() -> None:
            self.waiting.discard(name)
            try:
                draw()
            finally:
                if not self.waiting:
                    self.stripe.value = ""

        def ask() -> None:
            if name not in self.waiting:  # several quick changes are drawn once
                self.waiting.add(name)
                run(draw_once)

        self.redraws[name] = ask

    def _card(self) -> str:
        try:
            return format_card(self.value_of(self.parameters)[1])
        except InputError as error:
            return format_error_card(str(error))

    @property
    def empty_values(self) -> dict[str, str]:
        """Empty parameter -> the text that its control shows for it."""
        return {name: describe_empty_value(control) for name, control in self.controls.items() if control.value == ""}

    def __repr__(self) -> str:
        empty_values = {name: f" ({meaning})" for name, meaning in self.empty_values.items() if meaning}
        return " · ".join(f"{name} = {value!r}{empty_values.get(name, '')}" for name, value in self.parameters.items())

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        if has_front_end():
            return build_front_end_bundle(*self.controls.values(), *self.extras, self.card, self.stripe)
        return {"text/plain": repr(self), "text/html": f"<p><code>{escape(repr(self))}</code></p>{self._card()}"}


def describe_empty_value(control: ipywidgets.ValueWidget) -> str:
    """Read the text that a control shows for an empty value.

    Args:
        control: a widget with an empty value.

    Returns:
        The label of the option, or the placeholder of the text field.
    """
    options = getattr(control, "options", ())
    named = {option[1]: option[0] for option in options if isinstance(option, tuple)}
    return str(named.get(control.value) or getattr(control, "placeholder", "")).replace("\u200b", "")


# A focused list uses arrow keys and letters, which JupyterLab would treat as cell commands. Keys without a modifier
# stay with the control; Escape and Shift-Enter still reach the notebook.
KEYS = """
const area = element.closest(".jp-OutputArea") || document.body;
area.addEventListener("keydown", event => {
  const held = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.key === "Escape";
  if (!held && event.target.closest(".jupyter-widgets")) event.stopPropagation();
});
"""


def build_front_end_bundle(*rows: ipywidgets.Widget) -> dict[str, Any]:
    """Stack widgets for a front end and keep their keyboard events from JupyterLab.

    Args:
        rows: widgets, from top to bottom.

    Returns:
        A MIME bundle.
    """
    display(Javascript(KEYS))
    bundle = ipywidgets.VBox(rows)._repr_mimebundle_()
    for row in rows:
        keep_responsive(row)
    return bundle


def keep_responsive(widget: ipywidgets.Widget) -> None:
    """Make a widget and its children respond while a cell runs.

    JupyterLab sends widget messages to a subshell, which runs in another thread. ipykernel 7.4 redirects them to the
    loop that last wrote to the widget, which a running cell keeps busy. Deleting that entry restores the original
    target. Without subshells, the messages arrive when the cell has ended.

    Args:
        widget: a widget that has been displayed.
    """
    vars(widget.comm).pop("_reply_subshell_id", None)
    for child in getattr(widget, "children", ()):
        keep_responsive(child)


def format_card(body: str) -> str:
    """Wrap HTML in a bordered block in the colours of the page.

    Args:
        body: HTML.

    Returns:
        A <div>.
    """
    style = f"border:1px solid {LINE};border-radius:4px;padding:.5em .9em;max-width:54em;line-height:1.45;color:{INK}"
    return f'<div style="{style}">{body}</div>'


def format_error_card(message: str) -> str:
    """Format an error as a card that screen readers announce.

    Args:
        message: plain text.

    Returns:
        A <div>.
    """
    style = f"border-left:4px solid {ERROR};padding:.4em .9em;max-width:54em;line-height:1.45;color:{INK}"
    return f'<div role="alert" style="{style}"><b style="color:{ERROR}">Cannot be used:</b> {escape(message)}</div>'


def format_stripe(message: str) -> str:
    """Format a note that what is below does not show the current choice.

    Args:
        message: plain text.

    Returns:
        A <div> that screen readers announce.
    """
    style = f"border-left:4px solid {STRIPE};padding:.2em .9em;max-width:54em;line-height:1.45;color:{INK}"
    return f'<div role="status" style="{style}">{escape(message)}</div>'


def format_definitions(rows: Mapping[str, Any]) -> str:
    """Format names and values as a list of two columns.

    Args:
        rows: name -> HTML; a value of None is omitted.

    Returns:
        A <dl> element.
    """
    # override the floating columns of nbconvert's HTML
    layout = "margin:0;float:none;width:auto"
    entries = "".join(
        f'<dt style="{layout};color:{QUIET};font-weight:normal;white-space:nowrap">{escape(name)}</dt>'
        f'<dd style="{layout}">{value}</dd>'
        for name, value in rows.items()
        if value is not None
    )
    grid = f"display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.2em;color:{INK};margin:0"
    return f'<dl style="{grid}">{entries}</dl>'


def save_tier(name: str, choices: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Save choices as a tier that `esm2kit run --tier NAME` repeats.

    A new tier starts as a copy of `sample`, so that it creates every input it needs. An existing tier retains the
    parameters that are not in `choices`.

    Args:
        name: name of the tier: letters, digits, - and _.
        choices: notebook -> {parameter: value}.
        folder: papermill_runs.

    Returns:
        Path of the YAML file.

    Raises:
        InputError: the name is not valid, or is that of a shipped tier.
    """
    if not name or not name.replace("-", "").replace("_", "").isalnum() or portable_name(name) != name:
        raise InputError(
            f"{name!r} is not a valid tier name: use letters, digits, - and _", code="tier.name", name=name
        )
    if name in SHIPPED_TIERS:
        raise InputError(
            f"tier {name!r} is part of esm2kit and cannot be changed: choose another name",
            code="tier.shipped",
            name=name,
        )
    folder = Path(folder)
    path = folder / f"{name}.yaml"
    template = path if path.exists() else folder / "sample.yaml"
    saved = yaml.safe_load(template.read_text(encoding="utf-8")) or {}
    tier = {notebook: dict(given or {}) for notebook, given in saved.items()}
    for notebook, given in choices.items():
        tier.setdefault(notebook, {}).update(given)
    with atomic_path(path) as part:
        part.write_text(
            f"# Saved from the notebooks' widgets: esm2kit run --tier {name}\n" + yaml.safe_dump(tier, sort_keys=False),
            encoding="utf-8",
        )
    return path


class Export:
    """Name field and button that save the choices of views as a settings file (a tier) for `esm2kit run`.

    Without a front end, the content of the file is shown.

    Args:
        notebook: notebook whose parameters the views show.
        views: the views to save.
        folder: papermill_runs.
    """

    def __init__(self, notebook: str, *views: View, folder: Path | str = "../papermill_runs") -> None:
        self.notebook, self.views, self.folder = notebook, views, Path(folder)
        self.name = ipywidgets.Text(description="Save choices as", placeholder="a name", style=LABEL)
        self.button = ipywidgets.Button(
            description="Save", tooltip="Save the choices above as a settings file for esm2kit run"
        )
        self.message = ipywidgets.HTML()
        self.button.on_click(lambda button: self._save())

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Notebook -> {parameter: value} of its views.

        Raises:
            InputError: a choice is invalid.
        """
        for view in self.views:
            _ = view.value
        return {self.notebook: {name: value for view in self.views for name, value in view.parameters.items()}}

    def save(self, name: str) -> Path:
        """Save the tier, see `save_tier`.

        Args:
            name: name of the tier.

        Returns:
            Path of the YAML file.
        """
        return save_tier(name, self.choices, self.folder)

    def _save(self) -> None:
        try:
            path = self.save(self.name.value)
            self.message.value = format_card(f"Wrote <code>{escape(path.name)}</code>. Repeat these choices with "
                                   f"<code>esm2kit run --tier {escape(path.stem)}</code>")  # fmt: skip
        except (InputError, OSError) as error:
            self.message.value = format_error_card(str(error))

    def __repr__(self) -> str:
        text = yaml.safe_dump(self.choices, sort_keys=False, width=1000).rstrip()
        for name, meaning in (item for view in self.views for item in view.empty_values.items()):
            text = text.replace(f"  {name}: ''", f"  {name}: ''  # {meaning}") if meaning else text
        return text

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        if has_front_end():
            return build_front_end_bundle(ipywidgets.HBox([self.name, self.button]), self.message)
        heading = "These choices as a settings file, which <code>esm2kit run --tier NAME</code> repeats:"
        return {
            "text/plain": repr(self),
            "text/html": format_card(f"{heading}<pre style='{MONO}'>{escape(repr(self))}</pre>"),
        }
