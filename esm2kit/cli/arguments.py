"""Words of a command line -> a stage's dataclass, or one line on the word that is wrong."""

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

# what people type, and the field it stands for; `from` is no name a Python field can have
SHORT_FORMS = {"--from": "--from_notebook", "-p": "--parameters+"}
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "null")
NUMBER = re.compile(r"-\.?\d")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
NAMES |= {type(None): "null"}
# how jsonargparse begins when it refuses a value
REFUSED = re.compile(r'Parser key "(\w+)"')
REQUIRED = re.compile(r"arguments are required: (.*)")


def parse(config_class: type, program: str, words: list[str], bare: str = "", example: str = "") -> Any:
    """A stage's dataclass from YAML files and `--key value` pairs, the later of two winning.

    Args:
        config_class: the dataclass.
        program: what was called, such as esm2kit embed.
        words: what followed it.
        bare: the field that words without a name are for.
        example: a whole call, for --help and for one who left out what is needed.
    Raises: InputError for an unknown or missing parameter or a value of the wrong type, with the nearest known name.
    """
    parser = _parser(config_class, program, bare, example)
    hints = get_type_hints(config_class)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    given = _named(words, hints, bare, program)
    try:
        parsed = parser.parse_args([f"--{key}={value}" if key else value for key, value in given])
    except (ArgumentError, TypeError) as error:
        raise _refusal(" ".join(str(error).split()), given, hints, example) from error
    return config_class(**{name: parsed[name] for name in hints})


def _parser(config_class: type, program: str, bare: str, example: str) -> ArgumentParser:
    stands = f"[{bare.upper()}] " if bare else ""
    summary = [" ".join(part.split()) for part in (config_class.__doc__ or "").split("Args:")[0].split("\n\n")]
    note = f"{bare.upper()} is --{bare} without its name." if bare else ""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} {stands}[--key value ...] [--config file.yaml]",
        description="\n".join(filter(None, [*summary, note, f"  {example}" if example else ""])),
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of parameters.")
    parser.add_class_arguments(config_class)
    parser._action_groups[-1].title = "parameters"
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help, action.metavar = "Print the parameters as YAML and exit.", ""
    return parser


class Help(DefaultHelpFormatter):
    """Types in words; a list once, not once more as `--key+`; the description line by line."""

    def _get_type_str(self, action: Any) -> str | None:
        hint = getattr(action, "_typehint", None)
        # choices stand beside the name already
        return None if hint is None or hint is bool or get_origin(hint) is Literal else describe_type(hint)

    def _get_help_string(self, action: Any) -> str:
        return super()._get_help_string(action).replace("type: %(type)s", "%(type)s")

    def _format_action_invocation(self, action: Any) -> str:
        action = copy(action)
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
        short = [name for name, field in SHORT_FORMS.items() if field.removesuffix("+") in action.option_strings]
        action.option_strings = [*short, *action.option_strings]
        if _list_of(getattr(action, "_typehint", None)):
            action.metavar = f"{action.dest.upper()} ..."
        return super()._format_action_invocation(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") else super(Help, self)._fill_text(line, width, indent) for line in lines
        )


def describe_type(hint: Any) -> str:
    """A field's type in a person's words: `a whole number or null`, `float32, bfloat16 or int8`."""
    words: list[str] = []
    for part in _parts(hint):
        if get_origin(part) is Literal:
            words += map(str, get_args(part))
        elif get_origin(part) is list:
            words.append(f"{NAMES[get_args(part)[0]].removeprefix('a ')}s")
        elif part is not int or float not in _parts(hint):  # a whole number is a number
            words.append(NAMES[part])
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _named(words: list[str], hints: dict[str, Any], bare: str, program: str) -> list[tuple[str, str]]:
    """(key, value) of every parameter; ("", word) of what goes on as it is, such as --help.

    A list takes every word up to the next name, a switch none where none follows, and words that are nobody's are for
    the field `bare`.
    """
    rest, given, alone = deque(words), [], []
    while rest:
        word = rest.popleft()  # as typed
        if not _is_name(word):
            alone.append(word)
            continue
        key = _known(word, hints, bare, program)
        if not key:
            given.append(("", word))
            continue
        _, equals, value = word.partition("=")
        field = key.removesuffix("+")
        hint = hints.get(field, Path)
        if not equals:
            appending = key != field
            taken = _taken(rest, hint, appending)
            value = _value(word, (appending and _list_of(hint)) or hint, taken)
        if field == "config":
            _check_config(Path(value), hints)
        given.append((key, value))
    if alone and bare in (key.removesuffix("+") for key, _ in given):
        raise InputError(
            f"{alone[0]!r} belongs to no parameter: {bare} is given already", code="argument.nobodys", found=alone[0]
        )
    if alone and not bare:
        raise InputError(
            f"{alone[0]!r} belongs to no parameter: write --key {alone[0]}", code="argument.nobodys", found=alone[0]
        )
    if len(alone) > 1 and not _list_of(hints[bare]):
        raise InputError(
            f"{bare} is {describe_type(hints[bare])}, found {len(alone)}: {', '.join(alone)}",
            code="argument.too-many",
            name=bare,
            found=tuple(alone),
        )
    return [*given, (bare, _value(f"--{bare}", hints[bare], alone))] if alone else given


def _known(word: str, fields: Iterable[str], bare: str, program: str) -> str:
    """The parameter that a word names, with its + where it has one; "" for --help and its like."""
    name = word.partition("=")[0]
    if "from_notebook" in fields:
        name = SHORT_FORMS.get(name, name)
    if name in ("-h", "--help", "--print_config"):
        return ""
    key = name.lstrip("-")
    field = key.removesuffix("+")
    if field not in (*fields, "config") or not name.startswith("--"):
        # --fasta where there are train_fasta and test_fasta means the first
        near = bare if field in bare.split("_") else find_closest(field, fields)
        hint = f"did you mean --{near}?" if near else f"`{program} --help` lists those there are"
        raise InputError(f"unknown parameter {name}; {hint}", code="argument.unknown", name=name, nearest=near)
    return key


def _is_name(word: str) -> bool:
    return word.startswith("-") and word != "-" and not NUMBER.match(word)


def _taken(rest: deque[str], hint: Any, appending: bool) -> list[str]:
    """The words that a parameter takes off those that follow its name."""
    taken: list[str] = []
    while rest and not _is_name(rest[0]) and (not taken or (_list_of(hint) and not appending)):
        if bool in _parts(hint) and not find_closest(rest[0].lower(), SWITCH_VALUES):
            break  # `--per_residue my.fasta`: the switch is on, the word is somebody else's
        taken.append(rest.popleft())
    return taken


def _value(name: str, hint: Any, words: list[str]) -> str:
    """Words as one value that YAML reads."""
    if not words and bool in _parts(hint):
        return "true"
    if not words:
        raise InputError(f"{name} needs a value: {describe_type(hint)}", code="argument.no-value", name=name)
    item = _list_of(hint)
    single = item is None or (len(words) == 1 and item in _parts(hint))
    if single or words[0].startswith("[") or words == ["null"]:
        return " ".join(words)
    if item is not Path:
        # the comma of `others=a,b` is the value's own
        parts = [part.strip() for word in words for part in ([word] if "=" in word else word.split(","))]
        words = [part for part in parts if part]
    return json.dumps(words) if item in (str, Path) else f"[{', '.join(words)}]"


def _list_of(hint: Any) -> Any:
    """What a field is a list of; None where it is none."""
    return next((get_args(part)[0] for part in _parts(hint) if get_origin(part) is list), None)


def _check_config(path: Path, hints: dict[str, Any]) -> None:
    """Refuse a file of parameters that is none, before its values are read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct --config", code="config.absent", path=path)
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not YAML: {' '.join(str(error).split())}", code="config.not-yaml", path=path
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold `parameter: value` lines", code="config.not-a-mapping", path=path)
    for name in found:
        if name not in hints:
            raise InputError(
                f"{path}: unknown parameter {name!r}; {suggest_name(str(name), hints)}",
                code="argument.unknown",
                name=name,
                nearest=find_closest(str(name), hints),
                path=path,
            )


def _refusal(message: str, given: list[tuple[str, str]], hints: dict[str, Any], example: str) -> InputError:
    """jsonargparse's message as one line of ours: the parameter, what was found, what is allowed."""
    missing, refused = REQUIRED.search(message), REFUSED.search(message)
    if missing:
        fields = missing[1].split(", ")
        *names, last = (f"--{name}" for name in fields)
        line = f"{', '.join(names)}{' and ' if names else ''}{last} must be given"
        line += f", as in `{example}`" if example else ""
        return InputError(line, code="argument.missing", names=tuple(fields))
    if refused is None or refused[1] not in hints:
        return InputError(message, code="argument.value")
    field = refused[1]
    typed = [value for key, value in given if key.removesuffix("+") == field]
    found = typed[-1].strip("[]") if typed else re.split(r"(?:Got|Given) value: ", message)[-1]
    choices = [choice for part in _parts(hints[field]) if get_origin(part) is Literal for choice in get_args(part)]
    # gpu is nearer to cpu than to cuda: a typing error is rarely in the first letter
    near = find_closest(found, [choice for choice in choices if choice[0] == found[:1]], cutoff=0.4)
    hint = f"; did you mean {near!r}?" if near else ""
    return InputError(
        f"--{field} takes {describe_type(hints[field])}, found {found!r}{hint}",
        code="argument.value",
        name=field,
        found=found,
        nearest=near,
    )
