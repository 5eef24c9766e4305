"""Write the pages of the Python API: every name in the tables of `reference/api.md`, with its docstring."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from sphinx.application import Sphinx
from write import write_pages

PAGE = "reference/api"
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", re.M)


class Section(NamedTuple):
    """A table of `reference/api.md`: the package, its heading, and name -> what it is."""

    package: str
    heading: str
    names: dict[str, str]

    @property
    def slug(self) -> str:
        """File name of its page, such as `sequences-and-training-data`."""
        return re.sub(r"\W+", "-", self.heading.partition(":")[0].lower())


def sections(text: str) -> Iterator[Section]:
    """The sections of `reference/api.md` that have a table."""
    for part in re.split(r"^## `", text, flags=re.M)[1:]:
        package = part.partition("`")[0]
        for heading, body in re.findall(r"^(?:### )?(.*)\n((?:(?!###).*\n?)*)", part, re.M):
            if names := {name: what for name, what, _ in ROW.findall(body)}:
                yield Section(package, heading.strip("`") if heading.startswith(package) else heading, names)


def entry(package: str, name: str, what: str) -> str:
    """The directive that shows a public name; what is neither class nor function has the table's words as its text."""
    value, full = getattr(import_module(package), name), f"{package}.{name}"
    if inspect.ismodule(value):
        title = f"``{name}``"
        use = f".. code-block:: python\n\n   from {package} import {name}"
        alias = "" if value.__name__ == full else f".. py:module:: {full}\n\n"
        return f"{title}\n{'-' * len(title)}\n\n{use}\n\n{alias}.. automodule:: {value.__name__}\n   :members:\n"
    if inspect.isclass(value):
        return f".. autoclass:: {full}\n   :members:\n"
    if callable(value):
        return f".. autofunction:: {full}\n"
    return f".. py:data:: {full}\n   :type: {type(value).__name__}\n\n   {what[:1].upper()}{what[1:]}.\n"


def page(section: Section) -> str:
    """The page of one section."""
    title = section.heading.partition(":")[0]
    lines = [title, "=" * len(title), ""]
    return "\n".join([*lines, *(entry(section.package, name, what) for name, what in section.names.items())])


def generate(app: Sphinx) -> None:
    """Write a page per section below `reference/api`."""
    text = Path(app.srcdir, f"{PAGE}.md").read_text(encoding="utf-8")
    write_pages(Path(app.srcdir, PAGE), {f"{each.slug}.rst": page(each) for each in sections(text)})


def link(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make the names, commands and notebooks in the tables of `reference/api.md` links."""
    if docname != PAGE:
        return
    notebooks = {path.name[:2]: path.stem for path in Path(app.srcdir, "tutorials").glob("*.ipynb")}
    text = source[0]
    for section in sections(text):
        for name in section.names:
            text = text.replace(f"| `{name}` |", f"| {{py:obj}}`{name} <{section.package}.{name}>` |")

    def used_in(match: re.Match) -> str:
        cell = re.sub(r"\b0\d\b", lambda found: f"[{found[0]}](../tutorials/{notebooks[found[0]]}.ipynb)", match[1])
        return re.sub(r"`esm2kit (\w+)`", r"[`esm2kit \1`](cli/\1.md)", cell)

    text = re.sub(r"(\|[^|\n]*\|)$", used_in, text, flags=re.M)
    pages = "\n".join(f"api/{section.slug}" for section in sections(source[0]))
    source[0] = f"{text}\n```{{toctree}}\n:hidden:\n{pages}\n```\n"


def keep_text_whole(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Keep text from being taken for markup: a shape such as (P) for a list, what comes before a colon for a type."""
    lines[:] = [re.sub(r"^( *(?:\w+: )?)\((\w)\) ", r"\1\\(\2) ", line) for line in lines]
    starts = [position + 1 for position, line in enumerate(lines[:-1]) if line.strip() in ("Returns:", "Yields:")]
    if what in ("property", "attribute") and lines:
        starts.append(0)
    for start in starts:
        indent = len(lines[start]) - len(lines[start].lstrip())
        lines[start] = f"{' ' * indent}: {lines[start].lstrip()}" if ":" in lines[start] else lines[start]


def shown_signature(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A signature whose paths and lists are shown as a caller writes them."""
    if signature:
        signature = re.sub(r"PosixPath\(('[^']*')\)", r"\1", signature).replace("<factory>", "[...]")
    return signature, returns


def skip_fields(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    """Leave the fields of named tuples to their class's docstring."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("builder-inited", generate)
    app.connect("source-read", link)
    app.connect("autodoc-process-docstring", keep_text_whole, priority=400)
    app.connect("autodoc-process-signature", shown_signature)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True}
