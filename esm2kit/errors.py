"""The one exception a person can mend: bad input, with what was found and what to do."""


class InputError(ValueError):
    """Raised for anything the user can mend; the command line prints its message alone and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, as the command line does; IPython asks for it by this name."""
        return [f"InputError: {self}"]
