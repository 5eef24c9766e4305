"""Hide installed packages from this process, from imports as well as from their metadata."""

from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, MetadataPathFinder
from typing import Any


def hide_packages(modules: Iterable[str], distributions: Iterable[str]) -> None:
    """Hide packages as if they were not installed; call it before anything imports them.

    Args:
        modules: Names that are imported, such as `umap`.
        distributions: Names that pip installs, in lower case, such as `umap-learn`.
    """
    modules, distributions = set(modules), set(distributions)
    find_module, find_metadata = PathFinder.find_spec, MetadataPathFinder.find_distributions

    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in modules else find_module(name, path, target)

    def find_distributions(context: Any) -> Iterable[Distribution]:
        found = find_metadata(context)
        return [each for each in found if str(each.metadata["Name"]).lower().replace("_", "-") not in distributions]

    PathFinder.find_spec = find_spec
    MetadataPathFinder.find_distributions = find_distributions
