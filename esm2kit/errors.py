"""The one exception a person can mend: bad input, with what was found and what to do."""


class InputError(ValueError):
    """Raised for anything the user can mend; the command line prints its message alone and exits with 2."""
