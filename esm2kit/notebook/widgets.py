"""What every control of the notebooks is: a view on parameters, whose `.value` the next cell reads.

A view begins with what the parameters cell says, so papermill's parameters win. Its value is worked out when it is
read, from what its controls show, and from nothing else. Without a front end it shows the value and goes on.
"""

import os
import sys
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import yaml
from IPython.display import Javascript, display

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.notebook.runs.history import HEADLESS

SHIPPED_TIERS = ("sample", "small", "full")
# JupyterLab's own colours where they are known, so that light and dark both read well
INK, QUIET, LINE = "var(--jp-ui-font-color1, #333)", "var(--jp-ui-font-color2, #666)", "var(--jp-border-color2, #bbb)"
ERROR = "var(--jp-error-color0, #b3261e)"
MONO = "margin:.4em 0 0;font-family:var(--jp-code-font-family, monospace);font-size:.9em"
LABEL = {"description_width": "11em"}
WIDE = {"width": "34em"}


def has_front_end() -> bool:
    """Whether somebody looks at this kernel: JupyterLab and Notebook say so, VS Code and Colab leave their traces.

    `esm2kit run` says the opposite by ESM2KIT_HEADLESS; a kernel that papermill or nbconvert started has no session.
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
    """Controls, and a card below them that tells about the choice, or why it cannot be made.

    Args:
        controls: notebook parameter -> the ipywidget that shows it.
        value_of: the parameters' literals -> the value, and the card's HTML. Raises: InputError for a choice that
            cannot be made, which the card shows and which reading `.value` raises.
    """

    def __init__(
        self,
        controls: Mapping[str, ipywidgets.ValueWidget],
        value_of: Callable[[dict[str, Any]], tuple[Any, str]],
    ) -> None:
        self.controls, self.value_of = dict(controls), value_of
        self.card = ipywidgets.HTML()
        for control in self.controls.values():
            control.observe(lambda change: self._show(), "value")
        self._show()

    @property
    def parameters(self) -> dict[str, Any]:
        """The notebook's parameters as the controls show them: name -> literal."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def value(self) -> Any:
        """The choice. Raises: InputError where it cannot be made, the line the card shows."""
        return self.value_of(self.parameters)[0]

    def follow(self, other: "View") -> None:
        """Show this view's card anew when another view, which its value is worked out from, is changed."""
        for control in other.controls.values():
            control.observe(lambda change: self._show(), "value")

    def _show(self) -> None:
        self.card.value = self._card()

    def _card(self) -> str:
        try:
            return card(self.value_of(self.parameters)[1])
        except InputError as error:
            return error_card(str(error))

    @property
    def empty_values(self) -> dict[str, str]:
        """What the empty ones among the parameters stand for: name -> the words that the control shows for them."""
        return {name: describe_empty_value(control) for name, control in self.controls.items() if control.value == ""}

    def __repr__(self) -> str:
        empty_values = {name: f" ({meaning})" for name, meaning in self.empty_values.items() if meaning}
        return " · ".join(f"{name} = {value!r}{empty_values.get(name, '')}" for name, value in self.parameters.items())

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        if has_front_end():
            return front_end_bundle(*self.controls.values(), self.card)
        return {"text/plain": repr(self), "text/html": f"<p><code>{escape(repr(self))}</code></p>{self._card()}"}


def describe_empty_value(control: ipywidgets.ValueWidget) -> str:
    """The words a control shows for its value where that is empty: an option's label, or what its field suggests."""
    options = getattr(control, "options", ())
    named = {option[1]: option[0] for option in options if isinstance(option, tuple)}
    return str(named.get(control.value) or getattr(control, "placeholder", "")).replace("\u200b", "")


# A list that has the focus wants its arrow keys, and letters to be found by; JupyterLab takes them for commands on
# cells. Keys without a modifier stay with the control; Escape and Shift-Enter still reach the notebook.
KEYS = """
const area = element.closest(".jp-OutputArea") || document.body;
area.addEventListener("keydown", event => {
  const held = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.key === "Escape";
  if (!held && event.target.closest(".jupyter-widgets")) event.stopPropagation();
});
"""


def front_end_bundle(*rows: ipywidgets.Widget) -> dict[str, Any]:
    """Widgets one below the other as what a front end shows, with their keys kept to themselves."""
    display(Javascript(KEYS))
    return ipywidgets.VBox(rows)._repr_mimebundle_()


def card(body: str) -> str:
    """A bordered block of HTML in the page's own colours."""
    style = f"border:1px solid {LINE};border-radius:4px;padding:.5em .9em;max-width:54em;line-height:1.45;color:{INK}"
    return f'<div style="{style}">{body}</div>'


def error_card(message: str) -> str:
    """A card that says what is wrong, and is read out as soon as it appears."""
    style = f"border-left:4px solid {ERROR};padding:.4em .9em;max-width:54em;line-height:1.45;color:{INK}"
    return f'<div role="alert" style="{style}"><b style="color:{ERROR}">Cannot be used:</b> {escape(message)}</div>'


def definition_list(rows: Mapping[str, Any]) -> str:
    """Names and what is said of each, as a list of two columns; a value that is None is left out."""
    # a notebook as a page floats both in columns of a fifth and the rest: not here
    own = "margin:0;float:none;width:auto"
    entries = "".join(
        f'<dt style="{own};color:{QUIET};font-weight:normal;white-space:nowrap">{escape(name)}</dt>'
        f'<dd style="{own}">{value}</dd>'
        for name, value in rows.items()
        if value is not None
    )
    grid = f"display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.2em;color:{INK};margin:0"
    return f'<dl style="{grid}">{entries}</dl>'


def save_tier(name: str, choices: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Write choices as a tier of `folder` that `esm2kit run --tier` repeats.

    A new tier begins as a copy of `sample`, so that it makes every input it needs; an earlier one of the name keeps
    what is not chosen anew.

    Args:
        name: of the tier.
        choices: notebook -> {parameter: literal}.
        folder: papermill_runs.
    Raises: InputError for a name that is no file's name, or one of the shipped tiers.
    """
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{name!r} cannot name a tier: use letters, digits, - and _", code="tier.name", name=name)
    if name in SHIPPED_TIERS:
        raise InputError(
            f"{name} is a shipped tier and stays as it is: take another name", code="tier.shipped", name=name
        )
    folder = Path(folder)
    path = folder / f"{name}.yaml"
    begin = path if path.exists() else folder / "sample.yaml"
    tier = {notebook: dict(given or {}) for notebook, given in (yaml.safe_load(begin.read_text()) or {}).items()}
    for notebook, given in choices.items():
        tier.setdefault(notebook, {}).update(given)
    with atomic_path(path) as part:
        part.write_text(
            f"# Saved from the notebooks' widgets: esm2kit run --tier {name}\n" + yaml.safe_dump(tier, sort_keys=False)
        )
    return path


class Export:
    """A name and a button that save the choices of some views as a tier; without a front end, the YAML itself.

    Args:
        notebook: whose parameters the views show.
        views: the views.
        folder: papermill_runs.
    """

    def __init__(self, notebook: str, *views: View, folder: Path | str = "../papermill_runs") -> None:
        self.notebook, self.views, self.folder = notebook, views, Path(folder)
        self.name = ipywidgets.Text(description="Save as tier", placeholder="a name", style=LABEL)
        self.button = ipywidgets.Button(description="Save", tooltip="Write the choices above as a tier")
        self.message = ipywidgets.HTML()
        self.button.on_click(lambda button: self._save())

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Notebook -> the parameters its views show. Raises: InputError where a view's choice cannot be made."""
        for view in self.views:
            _ = view.value
        return {self.notebook: {name: value for view in self.views for name, value in view.parameters.items()}}

    def save(self, name: str) -> Path:
        """Write the tier; see `save_tier`."""
        return save_tier(name, self.choices, self.folder)

    def _save(self) -> None:
        try:
            path = self.save(self.name.value)
            self.message.value = card(f"Wrote <code>{escape(path.name)}</code>. Repeat it by machine: "
                                   f"<code>esm2kit run --tier {escape(path.stem)}</code>")  # fmt: skip
        except (InputError, OSError) as error:
            self.message.value = error_card(str(error))

    def __repr__(self) -> str:
        text = yaml.safe_dump(self.choices, sort_keys=False, width=1000).rstrip()
        for name, meaning in (item for view in self.views for item in view.empty_values.items()):
            text = text.replace(f"  {name}: ''", f"  {name}: ''  # {meaning}") if meaning else text
        return text

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        if has_front_end():
            return front_end_bundle(ipywidgets.HBox([self.name, self.button]), self.message)
        heading = "These choices as a tier for <code>esm2kit run</code>:"
        return {"text/plain": repr(self), "text/html": card(f"{heading}<pre style='{MONO}'>{escape(repr(self))}</pre>")}
