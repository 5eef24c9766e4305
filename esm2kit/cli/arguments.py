"""Parse command-line arguments and YAML files into a stage's dataclass, with one-line errors and readable help."""

import dataclasses
import json
import math
import re
import textwrap
import types
from argparse import SUPPRESS
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.core.files import check_git_lfs
from esm2kit.core.options import TITLES, group_fields
from esm2kit.core.paths import expand_path
from esm2kit.core.yaml_text import parse_yaml

# short form -> the first of these fields that a stage has; `from` is a keyword in Python and cannot name a field
SHORT_FORMS = {"-o": ("out_dir", "out"), "-p": ("parameters",), "--from": ("from_notebook",)}
# the options of every stage that are not fields of its dataclass; `main` reads -q and -v
COMMON_OPTIONS = {
    "-h, --help": "Show this help and exit.",
    "--help_all": "Show all parameters and exit.",
    "-q, --quiet": "Show only warnings, errors and the result.",
    "-v, --verbose": "Also show details, such as each baseline that is fitted.",
    "--config FILE": "Read parameters from a YAML file.",
    "--print_config": "Print the parameters as YAML and exit.",
}
MAX_DESCRIBED, NAMES_WIDTH = 20, 22
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "null")
NUMBER = re.compile(r"-\.?\d")
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
TYPE_NAMES |= {type(None): "none"}
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
    hints = list_fields(config_class)
    given = _pair_names_and_values(words, hints, positional, program)
    shows_all = any(not key and word.replace("-", "_") == "__help_all" for key, word in given)
    parser = build_parser(config_class, program, positional, example, shows_all)
    if shows_all:
        parser.print_help()
        parser.exit()
    try:
        parsed = parser.parse_args([f"--{key}={value}" if key else value for key, value in given])
    except (ArgumentError, TypeError) as error:
        input_error = _convert_error(" ".join(str(error).split()), given, hints, example)
        raise input_error from error
    return config_class(**{name: parsed[name] for name in hints})


def list_fields(config_class: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass by its name."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def find_short_forms(fields: Iterable[str]) -> dict[str, str]:
    """Return the short forms that a stage with these fields has, such as {"-o": "out_dir"}."""
    fields = set(fields)
    found = {short: next((name for name in names if name in fields), "") for short, names in SHORT_FORMS.items()}
    return {short: name for short, name in found.items() if name}


def build_parser(
    config_class: type, program: str, positional: str = "", example: str = "", shows_all: bool = True
) -> ArgumentParser:
    """Build the parser of a stage.

    Args:
        config_class: The dataclass; the summary of its docstring is the description.
        program: The command, such as `esm2kit embed`.
        positional: The field that takes the arguments without a name.
        example: A complete command.
        shows_all: Whether --help describes all parameters. Otherwise it describes the usual ones and names the others
            if there are more than MAX_DESCRIBED.

    Returns:
        The parser, with one group of options per group of fields.
    """
    argument = f"[{positional.upper()}] " if positional else ""
    summary = [" ".join(part.split()) for part in (config_class.__doc__ or "").split("Args:")[0].split("\n\n")]
    note = f"{positional.upper()} can also be written as --{positional} {positional.upper()}." if positional else ""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} {argument}[--key value ...] [--config file.yaml]",
        description="\n".join(filter(None, [*summary, note, f"\nexample:\n  {example}" if example else ""])),
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help=SUPPRESS)
    parser.add_class_arguments(config_class)
    actions = {action.dest: action for action in parser._action_groups.pop()._group_actions}
    usual, *others = group_fields(config_class).items()
    describes_all = shows_all or len(actions) <= MAX_DESCRIBED
    for key, names in [usual, *(others if describes_all else [])]:
        parser.add_argument_group(TITLES[key])._group_actions += [actions[name] for name in names]
    if not describes_all:
        lines = [f"  {TITLES[key]}: {', '.join(names)}" for key, names in others]
        title = f"more parameters, described by `{program} --help_all`"
        parser.add_argument_group(title, "\n".join(lines))
    common = "\n".join(f"  {names:<{NAMES_WIDTH}}{text}" for names, text in COMMON_OPTIONS.items())
    parser._action_groups[:2] = []  # positional arguments, and argparse's own options
    parser.add_argument_group("every stage", common)
    return parser


class Help(DefaultHelpFormatter):
    """Shows types as placeholders, defaults as they are typed, and each list parameter once (without `--key+`)."""

    def _get_help_string(self, action: Any) -> str:
        """Append `(required)` or the default, unless the text already describes the default."""
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        default = action.default
        if "default:" in text.lower() or default in (None, []):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        if isinstance(default, bool):
            shown = "on" if default else "off"
        return f"{text} (default: {shown})"

    def _format_action_invocation(self, action: Any) -> str:
        """Format the names of a parameter and the placeholder for its value, such as `--workers INT`."""
        field, hint = action.dest, action._typehint
        short = [name for name, long in find_short_forms([field]).items() if long == field]
        if bool in _union_members(hint):
            return ", ".join([*short, f"--[no-]{field}"])
        item = _list_item_type(hint)
        choices = [str(value) for value in list_choices(hint)]
        simple = [item] if item else [part for part in _union_members(hint) if part in METAVARS]
        metavar = (
            f"{{{','.join(choices)}}}"
            if choices
            else METAVARS[float if float in simple else str if str in simple else simple[0]]
        )
        return f"{', '.join([*short, f'--{field}'])} {metavar}{' ...' if item else ''}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap the text line by line; the further lines of an indented one are indented by two more blanks."""
        lines = []
        for line in text.splitlines():
            margin = " " * (len(line) - len(line.lstrip()))
            further = margin and f"{margin}  "
            whole = margin and not re.match(r"  [\w ]+: ", line)  # an example is one line, to be copied
            lines.append(line if whole else textwrap.fill(line, width, subsequent_indent=further))
        return "\n".join(lines)


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

    A list takes every argument up to the next name. A switch without a value is true, and with `--no-` before its name
    false. Arguments without a name are for the field `positional`.

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
        key, is_off = _resolve_name(word, hints, positional, program)
        if not key or is_off:
            given.append((key, "false" if is_off else word))
            continue
        name, equals, value = word.partition("=")
        field = key.removesuffix("+")
        hint = hints.get(field, Path)
        appending = key != field
        taken = [value] if equals else _take_values(rest, hint, appending)
        value = _to_yaml(name, (appending and _list_item_type(hint)) or hint, taken)
        if field == "config":
            value = _read_config(expand_path(value), hints)
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


def _resolve_name(word: str, hints: dict[str, Any], positional: str, program: str) -> tuple[str, bool]:
    """Resolve an argument such as `--key=value` to a field.

    Returns:
        The field with its + if it has one, or "" for --help and the like; and whether the argument is `--no-field`.

    Raises:
        InputError: There is no such field.
    """
    name, equals, _ = word.partition("=")
    if name in find_short_forms(hints):
        key = find_short_forms(hints)[name]
        return f"{key}+" if name == "-p" else key, False  # -p may be repeated
    key = name.lstrip("-").replace("-", "_")
    if name == "-h" or (name.startswith("--") and key in ("help", "help_all", "print_config")):
        return "", False
    field = key.removesuffix("+")
    if name.startswith("--") and field in (*hints, "config"):
        return key, False
    switches = [f"no_{each}" for each, hint in hints.items() if bool in _union_members(hint)]
    if name.startswith("--") and not equals and key in switches:
        return key.removeprefix("no_"), True
    # --fasta means train_fasta, although test_fasta is as similar
    near = positional if field in positional.split("_") else find_closest(field, [*hints, *switches])
    hint = f"did you mean --{near.replace('no_', 'no-') if near in switches else near}?" if near else ""
    hint = hint or f"`{program} --help_all` lists all parameters"
    raise InputError(f"unknown parameter {name}; {hint}", code="argument.unknown", name=name, nearest=near)


def _is_name(word: str) -> bool:
    """Return whether an argument is the name of a parameter, not a value such as `-1`."""
    return word.startswith("-") and word != "-" and not NUMBER.match(word)


def _take_values(rest: deque[str], hint: Any, appending: bool) -> list[str]:
    """Remove and return the values of a parameter from the arguments that follow its name."""
    taken: list[str] = []
    while rest and not _is_name(rest[0]) and (not taken or (_list_item_type(hint) and not appending)):
        values = (*SWITCH_VALUES, *map(str, list_choices(hint)))
        if bool in _union_members(hint) and not find_closest(rest[0].lower(), values):
            break  # `--per_residue my.fasta`: a switch, then an argument of its own
        taken.append(rest.popleft())
    return taken


def _to_yaml(name: str, hint: Any, words: list[str]) -> str:
    """Convert the values of a parameter to one YAML value."""
    if not words and bool in _union_members(hint):
        return "true"
    if not words:
        raise InputError(f"{name} requires a value: {describe_type(hint)}", code="argument.no-value", name=name)
    if len(words) == 1 and (none := _convert_none(hint, words[0])):
        return none
    item = _list_item_type(hint)
    _check_not_empty(name, hint, words)
    single = item is None or (len(words) == 1 and item in _union_members(hint))
    if single or words[0].startswith("[") or words == ["null"]:
        return " ".join(words)
    if item is not Path:
        # the comma in `others=a,b` belongs to the value
        parts = [part.strip() for word in words for part in ([word] if "=" in word else word.split(","))]
        words = [part for part in parts if part]
    return json.dumps(words) if item in (str, Path) else f"[{', '.join(words)}]"


def _check_not_empty(name: str, hint: Any, values: Iterable[Any]) -> None:
    """Check that no path or text is empty: an empty path would be the current folder."""
    types_of_values = {*_union_members(hint), _list_item_type(hint)}
    if types_of_values & {Path, str} and not all(str(value).strip() for value in values):
        raise InputError(
            f"{name} is empty. Pass {describe_type(hint)}. A variable that is not set gives an empty value.",
            code="argument.empty",
            name=name.lstrip("-"),
        )


def _list_item_type(hint: Any) -> Any:
    """Return the item type of a list type or of a union with one; None for other types."""
    return next((get_args(part)[0] for part in _union_members(hint) if get_origin(part) is list), None)


def _read_config(path: Path, hints: dict[str, Any]) -> str:
    """Read a file or a pipe of parameters, a YAML mapping with known names.

    Returns:
        The mapping as YAML, with the names of the fields and null for `none`.

    Raises:
        InputError: The file does not exist, is not a YAML mapping, or names an unknown parameter.
    """
    if not path.is_file() and not path.is_fifo():
        raise InputError(f"{path}: file not found. Check the path after --config.", code="config.absent", path=path)
    check_git_lfs(path)
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not valid YAML ({' '.join(str(error).split())})", code="config.not-yaml", path=path
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected lines such as `key: value`", code="config.not-a-mapping", path=path)
    values = {}
    for name, value in found.items():
        field = str(name).replace("-", "_")
        if field not in hints:
            raise InputError(
                f"{path}: unknown parameter {name!r}; {suggest_name(str(name), hints)}",
                code="argument.unknown",
                name=name,
                nearest=find_closest(str(name), hints),
                path=path,
            )
        _check_not_empty(f"{path}: {name}", hints[field], value if isinstance(value, list) else [value])
        none = _convert_none(hints[field], value)
        values[field] = value if none is None else yaml.safe_load(none)
    return yaml.safe_dump(values, default_flow_style=True, width=math.inf)


def _convert_none(hint: Any, value: Any) -> str | None:
    """Convert `none` to the YAML of an empty list, or of null for other optional types; None for any other value."""
    members = _union_members(hint)
    if not isinstance(value, str) or value.lower() != "none" or value in list_choices(hint):
        return None
    if _list_item_type(hint) and not {str, Path} & set(members):
        return "[]"
    return "null" if type(None) in members else None


def list_choices(hint: Any) -> list[Any]:
    """List the choices of a Literal type or of a union with one."""
    return [choice for part in _union_members(hint) if get_origin(part) is Literal for choice in get_args(part)]


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
    choices = list_choices(hints[field])
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
