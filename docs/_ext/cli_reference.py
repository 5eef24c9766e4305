"""Write a reference page per stage of the command line, from the stages' configuration dataclasses."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
from sphinx.application import Sphinx
from write import write_pages

import esm2kit
from esm2kit.cli.arguments import COMMON_OPTIONS, describe_type, find_short_forms
from esm2kit.cli.commands import STAGES, Stage, import_object
from esm2kit.core.options import TITLES, group_fields

ROOT = Path(__file__).resolve().parents[2]


def escape(text: str) -> str:
    """Plain text as Markdown: what is not in backticks keeps its `<`, `*`, `[` and `$`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<*\[$|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def shown_default(value: Any) -> str:
    """A default as it is typed on the command line; empty for one that means "not set"."""
    if value is None or value == [] or value == ROOT:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool) else str(value)


def option(field: dataclasses.Field, hint: Any, text: str) -> str:
    """The entry of one option: its names, type, default and description."""
    names = [*find_short_forms([field.name]), f"--{field.name}"]
    default = field.default_factory() if callable(field.default_factory) else field.default
    facts = [f"*{escape(describe_type(hint))}*"]
    if default is dataclasses.MISSING:
        facts.append("required")
    elif typed := shown_default(default):
        facts.append(f"default `{typed}`")
    return f"```{{option}} {', '.join(names)}\n{', '.join(facts)}\n\n{escape(text)}\n```"


def public(name: str, role: str) -> str:
    """A link to the entry of a public name, or the name as code."""
    name = name.rpartition(".")[2]
    return f"{{py:{role}}}`esm2kit.{name}`" if name in esm2kit.__all__ else ""


def page(name: str, stage: Stage) -> str:
    """The page of one stage."""
    config = import_object(stage.config)
    parsed = docstring_parser.parse(config.__doc__, style=docstring_parser.DocstringStyle.GOOGLE)
    texts = {each.arg_name: " ".join(each.description.split()) for each in parsed.params}
    hints = get_type_hints(config)
    summary = "\n\n".join(filter(None, [parsed.short_description, parsed.long_description]))
    lines = [f"# esm2kit {name}", escape(summary), f"```bash\n{stage.example}\n```"]
    lines.append(
        f"`{stage.positional.upper()}` can also be written as `--{stage.positional} {stage.positional.upper()}`."
    )
    python = [public(stage.config, "class"), public(stage.function, "func")]
    if all(python):
        lines.append(f"From Python: {python[1]} with a {python[0]}.")
    lines.append(f"```{{program}} esm2kit {name}\n```")
    fields = {field.name: field for field in dataclasses.fields(config)}
    for group, members in group_fields(config).items():
        lines.append(f"## {TITLES[group].capitalize()}")
        lines += [option(fields[member], hints[member], texts[member]) for member in members]
    return "\n\n".join(lines) + "\n"


def overview() -> str:
    """The table of the stages and the list of their pages, which `reference/cli.md` includes."""
    rows = [f"| [`{name}`](cli/{name}.md) | {escape(stage.help)} |" for name, stage in STAGES.items()]
    pages = "\n".join(f"cli/{name}" for name in STAGES)
    common = [f"| `{names}` | {escape(text)} |" for names, text in COMMON_OPTIONS.items()]
    return "\n".join(
        [
            *("| stage | what it does |", "| --- | --- |", *rows, "", "Every stage has these options:", ""),
            *("| option | what it does |", "| --- | --- |", *common, ""),
            f"```{{toctree}}\n:hidden:\n{pages}\n```\n",
        ]
    )


def generate(app: Sphinx) -> None:
    """Write the pages below `reference/cli`."""
    pages = {f"{name}.md": page(name, stage) for name, stage in STAGES.items()}
    write_pages(Path(app.srcdir) / "reference" / "cli", pages | {"stages.inc": overview()})


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}
