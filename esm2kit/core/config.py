"""What the dataclasses of parameters share: fields that may change when a run resumes, and inherited help texts."""

import inspect
import re

# Metadata of a field that may change when a run resumes: paths and devices, which do not affect the loss curve;
# max_steps and precision, which a user changes to train longer or faster; and fields that only read the result.
FREE = {"resume": "free"}


def inherit_help(config_class: type, base: type) -> None:
    """Append the entries of a base class's `Args:` to a docstring, for the fields that it does not document itself.

    Args:
        config_class: A dataclass whose docstring ends with its entries.
        base: One of its base classes.
    """
    if not (config_class.__doc__ and base.__doc__):  # python -OO strips docstrings
        return
    own, entry = inspect.cleandoc(config_class.__doc__), re.compile(r"^    (?=\w+: )", re.M)
    described = {line.partition(":")[0] for line in entry.split(own)[1:]}
    shared = entry.split(inspect.cleandoc(base.__doc__))[1:]
    added = [f"    {line.rstrip()}" for line in shared if line.partition(":")[0] not in described]
    config_class.__doc__ = "\n".join([own, *added, ""])
