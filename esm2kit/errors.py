"""The one exception a person can mend: bad input, with what was found and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Raised for anything the user can mend; the command line prints its message alone and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, as the command line does; IPython asks for it by this name."""
        return [f"InputError: {self}"]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to tell after an unknown name: the known one it resembles, or all there are."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known) or 'none'}"
