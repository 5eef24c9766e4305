"""Groups of the fields of a configuration, in the order in which --help and the documentation show them."""

import dataclasses

# group -> its title
TITLES = {
    "usual": "usual parameters",
    "data": "data",
    "model": "model",
    "training": "training",
    "optimizer": "optimizer",
    "probing": "probes and baselines",
    "evaluation": "evaluation",
    "hardware": "hardware and speed",
    "output": "output",
}


class OptionGroups:
    """The groups of the fields that a dataclass declares; a subclass may place inherited fields in other groups.

    Args:
        groups: Names of fields separated by blanks, by a key of TITLES.
    """

    def __init__(self, **groups: str) -> None:
        unknown = groups.keys() - TITLES.keys()
        assert not unknown, f"no title for {unknown}"
        self.group_of = {name: group for group, names in groups.items() for name in names.split()}


def group_fields(config_class: type) -> dict[str, list[str]]:
    """Group the fields of a dataclass by the `option_groups` of the class and its bases.

    Args:
        config_class: A dataclass. Without `option_groups` all its fields are usual ones.

    Returns:
        Key of TITLES -> names of fields, in the order of TITLES and of the declarations.

    Raises:
        KeyError: A field has no group.
    """
    fields = [field.name for field in dataclasses.fields(config_class)]
    declared = [vars(base)["option_groups"] for base in config_class.__mro__ if "option_groups" in vars(base)]
    declared = declared or [OptionGroups(usual=" ".join(fields))]
    group_of: dict[str, str] = {}
    for groups in declared:
        group_of |= {name: group for name, group in groups.group_of.items() if name not in group_of}
    missing = [name for name in fields if name not in group_of]
    if missing:
        raise KeyError(f"{config_class.__name__}: {', '.join(missing)} in no group of option_groups")
    grouped = {title: [name for name, group in group_of.items() if group == title] for title in TITLES}
    return {title: names for title, names in grouped.items() if names}
