"""InputError, the exception for problems that a user can fix, and the file through which a worker reports its error."""

import json
import logging
import os
import reprlib
import time
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from operator import ge, gt, le, lt
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

logger = logging.getLogger(__name__)
TYPE_NAMES = {
    int: "an integer", Integral: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path",
    type(None): "None",
}  # fmt: skip
SHOWN = (str, bytes, int, float, os.PathLike, list, tuple, dict)
PLURALS = {int: "integers", float: "numbers", str: "texts", Path: "paths"}
# environment variable with the path of a worker's error file; the name and the format are those of torch elastic
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class InputError(ValueError):
    """A problem that the user can fix. The command line prints only its message and exits with code 2.

    Args:
        message: One line: what was found and what to do.
        code: The kind of error, such as `fasta.sequence`. Code and tests rely on the code, never on the message.
        values: The details of this error, by name.
    """

    def __init__(self, message: str, code: str = "", **values: Any) -> None:
        super().__init__(message)
        self.code, self.values = code, values

    def _render_traceback_(self) -> list[str]:
        """Show only the message in a notebook, as the command line does; IPython calls this method by its name."""
        return [f"InputError: {self}"]


def record_error(error: BaseException) -> None:
    """Write an error to the file that ERROR_FILE names, in torch elastic's format; do nothing if it names none.

    Args:
        error: An InputError keeps its code and values; of any other exception the type, message and traceback are
            written.
    """
    if not os.environ.get(ERROR_FILE):
        return
    expected = isinstance(error, InputError)
    message: dict[str, Any] = {"message": str(error) if expected else f"{type(error).__name__}: {error}"}
    # torchrun prints py_callstack in its report when a user starts the workers with torchrun
    shown = message["message"] if expected else "".join(traceback.format_exception(error))
    message["extraInfo"] = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    if expected:
        message["input_error"] = {"code": error.code, "values": error.values}
    path = Path(os.environ[ERROR_FILE])
    try:  # atomic, and a failure here must not hide the error itself
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps({"message": message}, default=str), encoding="utf-8")
        part.replace(path)
    except (OSError, TypeError, ValueError) as problem:
        logger.warning("%s: cannot write the error file (%s)", path, problem)


def read_recorded_error(path: Path) -> Exception | None:
    """Read the error that a worker wrote with `record_error`.

    Args:
        path: The worker's error file.

    Returns:
        An InputError with its code and values (a value that JSON cannot represent is read as text), a RuntimeError for
        any other exception, or None if the file does not exist or has another format.
    """
    if not path.is_file():
        return None
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (ValueError, KeyError):
        return None
    if not isinstance(message, dict):  # written by torchrun itself for a worker that wrote no error
        return None
    if "input_error" in message:
        return InputError(message["message"], message["input_error"]["code"], **message["input_error"]["values"])
    return RuntimeError(" ".join(message["message"].split()))


def find_closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the known name that is most similar to `name`, or None if no similarity ratio reaches `cutoff`."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Format the hint for an unknown name: the most similar known name, or else all known names."""
    known = list(known)
    close = find_closest(name, known)
    return f"did you mean {close!r}?" if close else f"choose one of {', '.join(known) or 'none'}"


def check_type(value: Any, expected: type, name: str, hint: str = "") -> None:
    """Check the type of an argument.

    Args:
        value: The argument.
        expected: Its type.
        name: Its name, for the message.
        hint: Text to append to the message, such as how to make such a value.

    Raises:
        InputError: The value has another type.
    """
    if not isinstance(value, expected):
        _raise_type(name, _describe_type(expected), value, hint)


def _raise_type(name: str, expected: str, value: Any, hint: str = "") -> NoReturn:
    kind = type(value).__name__
    shown = f"{reprlib.repr(value)} ({kind})" if isinstance(value, SHOWN) else "None" if value is None else f"a {kind}"
    raise InputError(
        f"{name} must be {expected}, found {shown}{hint and '; ' + hint}",
        code="argument.type",
        name=name,
        expected=expected,
        found=kind,
    )


def check_types(config: Any) -> None:
    """Check the types of a dataclass's fields; text is accepted for a path, and a tuple or a range for a list.

    Args:
        config: A dataclass instance.

    Raises:
        InputError: A field has another type.
    """
    for name, hint in get_type_hints(type(config)).items():
        options = [option for part in _list_options(hint) for option in _list_options(part)]
        value = getattr(config, name)
        if not options or any(_fits(value, option) for option in options):
            continue
        _raise_type(name, " or ".join(dict.fromkeys(map(_describe_type, options))), value)


def _list_options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a type; a hint that is not known accepts every value."""
    if get_origin(hint) is list:
        return isinstance(value, list | tuple | range) and all(
            any(_fits(item, option) for option in _list_options(get_args(hint)[0])) for item in value
        )
    if hint in (int, float):
        numbers = Integral if hint is int else Real
        return isinstance(value, numbers) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str | os.PathLike)
    if hint is bool:  # also NumPy's, of which the type has the same name
        return isinstance(value, bool) or (getattr(value, "shape", None) == () and value.dtype == bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _describe_type(hint: Any) -> str:
    """Describe a type in words."""
    if get_origin(hint) is list:
        inner = " or ".join(PLURALS.get(option, str(option)) for option in _list_options(get_args(hint)[0]))
        return f"a list of {inner}"
    return TYPE_NAMES.get(hint) or f"of type {getattr(hint, '__name__', hint)}"


def check_choices(config: Any) -> None:
    """Check that the Literal fields of a dataclass hold one of their choices; None passes.

    Args:
        config: A dataclass instance.

    Raises:
        InputError: A field has another value; the message suggests the nearest choice.
    """
    for name, hint in get_type_hints(type(config)).items():
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        value = getattr(config, name)
        is_switch = isinstance(value, bool) and bool in get_args(hint)
        if choices and value is not None and not is_switch and value not in choices:
            raise InputError(
                f"{name} cannot be {value!r}; {suggest_name(str(value), map(str, choices))}",
                code="config.choice",
                name=name,
                found=value,
                allowed=tuple(choices),
            )


def check_range(config: Any, *names: str, hint: str = "", **bounds: float) -> None:
    """Check numeric fields of a dataclass against bounds; None passes.

    Args:
        config: A dataclass instance.
        names: The fields to check.
        hint: Text to append to the message, such as what to do instead.
        bounds: `at_least`, `above`, `at_most` or `below`, each with its limit.

    Raises:
        InputError: A field is outside the bounds.
    """
    comparisons = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
    for name in names:
        found = getattr(config, name)
        if found is not None and not all(comparisons[kind](found, bound) for kind, bound in bounds.items()):
            allowed = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
            raise InputError(
                f"{name} must be {allowed}, found {found}{hint and '; ' + hint}",
                code="option.range",
                name=name,
                found=found,
                **bounds,
            )
