"""The one exception a person can mend: bad input, with what was found and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Raised for anything the user can fix; the command line prints its message alone and exits with 2.

    Args:
        message: one line: what was found and what to do.
        code: what went wrong, in a fixed word such as `fasta.letter`; code and tests rely on it, never on the message.
        values: the facts of the case, for whoever handles the error.
    """

    def __init__(self, message: str, code: str = "", **values: Any) -> None:
        super().__init__(message)
        self.code, self.values = code, values

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, as the command line does; IPython asks for it by this name."""
        return [f"InputError: {self}"]


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that an unknown one resembles, by at least so much of its letters; None where none does."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to tell after an unknown name: the known one it resembles, or all there are."""
    known = list(known)
    close = closest(name, known)
    return f"did you mean {close!r}?" if close else f"choose one of {', '.join(known) or 'none'}"


def refuse_unknown_choices(config: Any) -> None:
    """Hold a dataclass's Literal fields to their choices, which Python itself does not; None stands for left open.

    Raises: InputError for the first that is none of them, with the nearest.
    """
    for name, hint in get_type_hints(type(config)).items():
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{name} cannot be {value!r}; {nearest(str(value), map(str, choices))}")
