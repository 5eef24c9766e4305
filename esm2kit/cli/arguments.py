"""Parse command-line arguments and YAML files into a stage's dataclass, with one-line errors and readable help."""

import dataclasses
import json
import re
import types
from collections import deque
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.core.paths import expand_path

# short form -> field; `from` is a keyword in Python and cannot name a field
SHORT_FORMS = {"--from": "--from_notebook", "-p": "--parameters+"}
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "null")
NUMBER = re.compile(r"-\.?\d")
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
TYPE_NAMES |= {type(None): "null"}
PLURALS = {int: "integers", float: "numbers", str: "one or more names", Path: "paths"}
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
# how jsonargparse's messages start
REFUSED_VALUE = re.compile(r'Parser key "(\w+)"')
MISSING_ARGUMENTS = re.compile(r"arguments are required: (.*)")


def parse(config_class: type, program: str, words: list[str], positional: str = "", example: str = "") -> Any:
    """Parse arguments and YAML files into a dataclass; of two values for one parameter the later wins.

    Args:
        config_class: The dataclass.
        program: The command, such as `esm2kit embed`.
        words: The arguments of the command.
        positional: The field that takes the arguments without a name.
        example: A complete command, shown by --help and in errors about missing parameters.

    Returns:
        An instance of `config_class`.

    Raises:
        InputError: A parameter is unknown or missing, or a value has the wrong type.
    """
    parser = _build_parser(config_class, program, positional, example)
    hints = get_type_hints(config_class)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    given = _pair_names_and_values(words, hints, positional, program)
    try:
        parsed = parser.parse_args([f"--{key}={value}" if key else value for key, value in given])
    except (ArgumentError, TypeError) as error:
        input_error = _convert_error(" ".join(str(error).split()), given, hints, example)
        raise input_error from error
    return config_class(**{name: parsed[name] for name in hints})


def _build_parser(config_class: type, program: str, positional: str, example: str) -> ArgumentParser:
    """Build the parser whose description is the summary of the dataclass's docstring."""
    argument = f"[{positional.upper()}] " if positional else ""
    summary = [" ".join(part.split()) for part in (config_class.__doc__ or "").split("Args:")[0].split("\n\n")]
    note = f"{positional.upper()} is the value of --{positional}." if positional else ""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} {argument}[--key value ...] [--config file.yaml]",
        description="\n".join(filter(None, [*summary, note, f"\nexample:\n  {example}" if example else ""])),
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Read parameters from a YAML file.", metavar="FILE")
    parser.add_class_arguments(config_class)
    parser._action_groups[-1].title = "parameters"
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help, action.metavar = "Print the parameters as YAML and exit.", ""
    return parser


class Help(DefaultHelpFormatter):
    """Shows types as placeholders, defaults in YAML's notation, and each list parameter once (without `--key+`)."""

    def _get_help_string(self, action: Any) -> str:
        """Append `(required)` or the default, unless the text already describes the default."""
        text = action.help or ""
        if not hasattr(action, "_typehint"):
            return text[:1].upper() + text[1:].rstrip(".") + "."
        if action.required:
            return f"{text} (required)"
        if action.default is None or action.default == []:
            return text if "default:" in text.lower() else f"{text} (default: none)"
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.lower() if isinstance(default, bool) else shown})"

    def _format_action_invocation(self, action: Any) -> str:
        """Format the names of a parameter and the placeholder for its value, such as `--workers INT`."""
        action = copy(action)
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
        short = [name for name, field in SHORT_FORMS.items() if field.removesuffix("+") in action.option_strings]
        action.option_strings = [*short, *action.option_strings]
        hint = getattr(action, "_typehint", None)
        item = _list_item_type(hint)
        choices = [
            str(value) for part in _union_members(hint) if get_origin(part) is Literal for value in get_args(part)
        ]
        simple = [item] if item else [part for part in _union_members(hint) if part in METAVARS]
        if choices or simple:
            metavar = f"{{{','.join(choices)}}}" if choices else METAVARS[float if float in simple else simple[0]]
            metavar += " ..." if item else ""
            return f"{', '.join(action.option_strings)} {metavar}"
        return super()._format_action_invocation(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap the description line by line; indented lines, such as the example, are not wrapped."""
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") else super(Help, self)._fill_text(line, width, indent) for line in lines
        )


def describe_type(hint: Any) -> str:
    """Describe a field's type in English, such as `an integer or null` or `float32, bfloat16 or int8`."""
    words: list[str] = []
    for part in _union_members(hint):
        if get_origin(part) is Literal:
            words += map(str, get_args(part))
        elif get_origin(part) is list:
            words.append(PLURALS[get_args(part)[0]])
        elif part is not int or float not in _union_members(hint):  # an integer is a number
            words.append(TYPE_NAMES[part])
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _pair_names_and_values(
    words: list[str], hints: dict[str, Any], positional: str, program: str
) -> list[tuple[str, str]]:
    """Split arguments into (key, value) pairs; the pair ("", word) is passed on unchanged, such as --help.

    A list takes every argument up to the next name. A switch without a value is true. Arguments without a name are for
    the field `positional`.

    Returns:
        The pairs, with each value as YAML.

    Raises:
        InputError: A parameter is unknown or has no value, or an argument cannot be assigned.
    """
    rest, given, unnamed = deque(words), [], []
    while rest:
        word = rest.popleft()
        if not _is_name(word):
            unnamed.append(word)
            continue
        key = _resolve_name(word, hints, positional, program)
        if not key:
            given.append(("", word))
            continue
        _, equals, value = word.partition("=")
        field = key.removesuffix("+")
        hint = hints.get(field, Path)
        if not equals:
            appending = key != field
            taken = _take_values(rest, hint, appending)
            value = _to_yaml(word, (appending and _list_item_type(hint)) or hint, taken)
        if field == "config":
            value = str(expand_path(value))
            _check_config(Path(value), hints)
        given.append((key, value))
    if unnamed and (not positional or positional in (key.removesuffix("+") for key, _ in given)):
        reason = f"--{positional} is already given" if positional else f"write --key {unnamed[0]}"
        raise InputError(f"unexpected argument {unnamed[0]!r}: {reason}", code="argument.unexpected", found=unnamed[0])
    if len(unnamed) > 1 and not _list_item_type(hints[positional]):
        raise InputError(
            f"--{positional} takes one value ({describe_type(hints[positional])}), found {len(unnamed)}: "
            f"{', '.join(unnamed)}",
            code="argument.too-many",
            name=positional,
            found=tuple(unnamed),
        )
    return [*given, (positional, _to_yaml(f"--{positional}", hints[positional], unnamed))] if unnamed else given


def _resolve_name(word: str, fields: Iterable[str], positional: str, program: str) -> str:
    """Resolve an argument such as `--key=value` to a field, with its + if it has one; "" for --help and the like."""
    name = word.partition("=")[0]
    if "from_notebook" in fields:
        name = SHORT_FORMS.get(name, name)
    if name in ("-h", "--help", "--print_config"):
        return ""
    key = name.lstrip("-")
    field = key.removesuffix("+")
    if field not in (*fields, "config") or not name.startswith("--"):
        # --fasta means train_fasta, although test_fasta is as similar
        near = positional if field in positional.split("_") else find_closest(field, fields)
        hint = f"did you mean --{near}?" if near else f"`{program} --help` lists all parameters"
        raise InputError(f"unknown parameter {name}; {hint}", code="argument.unknown", name=name, nearest=near)
    return key


def _is_name(word: str) -> bool:
    """Return whether an argument is the name of a parameter, not a value such as `-1`."""
    return word.startswith("-") and word != "-" and not NUMBER.match(word)


def _take_values(rest: deque[str], hint: Any, appending: bool) -> list[str]:
    """Remove and return the values of a parameter from the arguments that follow its name."""
    taken: list[str] = []
    while rest and not _is_name(rest[0]) and (not taken or (_list_item_type(hint) and not appending)):
        if bool in _union_members(hint) and not find_closest(rest[0].lower(), SWITCH_VALUES):
            break  # `--per_residue my.fasta`: a switch, then an argument of its own
        taken.append(rest.popleft())
    return taken


def _to_yaml(name: str, hint: Any, words: list[str]) -> str:
    """Convert the values of a parameter to one YAML value."""
    if not words and bool in _union_members(hint):
        return "true"
    if not words:
        raise InputError(f"{name} requires a value: {describe_type(hint)}", code="argument.no-value", name=name)
    item = _list_item_type(hint)
    single = item is None or (len(words) == 1 and item in _union_members(hint))
    if single or words[0].startswith("[") or words == ["null"]:
        return " ".join(words)
    if item is not Path:
        # the comma in `others=a,b` belongs to the value
        parts = [part.strip() for word in words for part in ([word] if "=" in word else word.split(","))]
        words = [part for part in parts if part]
    return json.dumps(words) if item in (str, Path) else f"[{', '.join(words)}]"


def _list_item_type(hint: Any) -> Any:
    """Return the item type of a list type or of a union with one; None for other types."""
    return next((get_args(part)[0] for part in _union_members(hint) if get_origin(part) is list), None)


def _check_config(path: Path, hints: dict[str, Any]) -> None:
    """Check that a file of parameters is a YAML mapping with known names."""
    if not path.is_file():
        raise InputError(f"{path}: file not found. Check the path after --config.", code="config.absent", path=path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not valid YAML ({' '.join(str(error).split())})", code="config.not-yaml", path=path
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected lines such as `key: value`", code="config.not-a-mapping", path=path)
    for name in found:
        if name not in hints:
            raise InputError(
                f"{path}: unknown parameter {name!r}; {suggest_name(str(name), hints)}",
                code="argument.unknown",
                name=name,
                nearest=find_closest(str(name), hints),
                path=path,
            )


def _convert_error(message: str, given: list[tuple[str, str]], hints: dict[str, Any], example: str) -> InputError:
    """Convert jsonargparse's message to an InputError: the parameter, what was found, and what is allowed."""
    missing, refused = MISSING_ARGUMENTS.search(message), REFUSED_VALUE.search(message)
    if missing:
        fields = missing[1].split(", ")
        *names, last = (f"--{name}" for name in fields)
        line = f"{', '.join(names)} and {last} are required" if names else f"{last} is required"
        line += f", as in `{example}`" if example else ""
        return InputError(line, code="argument.missing", names=tuple(fields))
    if refused is None or refused[1] not in hints:
        return InputError(message, code="argument.value")
    field = refused[1]
    typed = [value for key, value in given if key.removesuffix("+") == field]
    found = typed[-1].strip("[]") if typed else re.split(r"(?:Got|Given) value: ", message)[-1]
    choices = [
        choice for part in _union_members(hints[field]) if get_origin(part) is Literal for choice in get_args(part)
    ]
    # people rarely mistype the first letter: gpu is more similar to cpu than to cuda
    near = find_closest(found, [choice for choice in choices if choice[0] == found[:1]], cutoff=0.4)
    hint = f"; did you mean {near!r}?" if near else ""
    return InputError(
        f"--{field} must be {describe_type(hints[field])}, found {found!r}{hint}",
        code="argument.value",
        name=field,
        found=found,
        nearest=near,
    )
