"""Bad input as the one exception a user can fix: what was found and what to do; how a worker hands its error on."""

import json
import logging
import os
import time
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

logger = logging.getLogger(__name__)
# names the file in which a process leaves its error for the one that started it, as torch elastic has it
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class InputError(ValueError):
    """Raised for anything the user can fix; the command line prints its message alone and exits with 2.

    Args:
        message: one line: what was found and what to do.
        code: what went wrong, such as `fasta.sequence`; code and tests rely on it, never on the message.
        values: the facts of the case, for whoever handles the error.
    """

    def __init__(self, message: str, code: str = "", **values: Any) -> None:
        super().__init__(message)
        self.code, self.values = code, values

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, as the command line does; IPython asks for it by this name."""
        return [f"InputError: {self}"]


def record_error(error: BaseException) -> None:
    """Write an error into the file that the starting process named, if it named one, in torch elastic's format."""
    if not os.environ.get(ERROR_FILE):
        return
    expected = isinstance(error, InputError)
    message: dict[str, Any] = {"message": str(error) if expected else f"{type(error).__name__}: {error}"}
    # torchrun's own report, where a worker was started by hand, shows what stands at py_callstack
    shown = message["message"] if expected else "".join(traceback.format_exception(error))
    message["extraInfo"] = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    if expected:
        message["input_error"] = {"code": error.code, "values": error.values}
    path = Path(os.environ[ERROR_FILE])
    try:  # whole or absent, and never in the way of the error itself
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps({"message": message}, default=str))
        part.replace(path)
    except (OSError, TypeError, ValueError) as problem:
        logger.warning("%s: the error could not be written there (%s)", path, problem)


def read_recorded_error(path: Path) -> Exception | None:
    """The error that a process wrote by `record_error`.

    Args:
        path: its error file.

    Returns:
        An InputError with its code and its values (those that JSON has no form for as text), a RuntimeError for any
        other exception, None if there is no file.
    """
    if not path.is_file():
        return None
    try:
        message = json.loads(path.read_text())["message"]
    except (ValueError, KeyError):
        return None
    if not isinstance(message, dict):  # torchrun's own, of a worker that left nothing
        return None
    if "input_error" in message:
        return InputError(message["message"], message["input_error"]["code"], **message["input_error"]["values"])
    return RuntimeError(" ".join(message["message"].split()))


def find_closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that an unknown one resembles, by at least so much of its letters; None where none does."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """What to tell after an unknown name: the known one it resembles, or all there are."""
    known = list(known)
    close = find_closest(name, known)
    return f"did you mean {close!r}?" if close else f"choose one of {', '.join(known) or 'none'}"


def check_choices(config: Any) -> None:
    """Hold a dataclass's Literal fields to their choices, which Python itself does not; None stands for left open.

    Raises: InputError for the first that is none of them, with the nearest.
    """
    for name, hint in get_type_hints(type(config)).items():
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise InputError(
                f"{name} cannot be {value!r}; {suggest_name(str(value), map(str, choices))}",
                code="config.choice",
                name=name,
                found=value,
                allowed=tuple(choices),
            )


def check_range(config: Any, *names: str, hint: str = "", **bounds: float) -> None:
    """Check fields against bounds; None, a field left open, passes.

    Args:
        config: a dataclass.
        names: its fields to check.
        hint: ends the message, such as what to do instead.
        bounds: at_least, above, at_most and below, each with its number.

    Raises:
        InputError: the first field outside.
    """
    comparisons = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
    for name in names:
        found = getattr(config, name)
        if found is not None and not all(comparisons[word](found, bound) for word, bound in bounds.items()):
            allowed = " and ".join(f"{word.replace('_', ' ')} {bound}" for word, bound in bounds.items())
            raise InputError(
                f"{name} must be {allowed}, found {found}{hint and '; ' + hint}",
                code="option.range",
                name=name,
                found=found,
                **bounds,
            )
