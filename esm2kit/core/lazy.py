"""Lazy imports: the public names of a package are imported when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(
    package: str, public: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build a package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: The package's `__name__`.
        public: Module, relative to the package -> its public names. An empty list makes the module itself public, under
            the last part of its name.

    Returns:
        `(__getattr__, __dir__, __all__)`, to be assigned in the package's `__init__.py`.
    """
    home = {name: (module, name) for module, names in public.items() for name in names}
    home |= {module.rpartition(".")[2]: (module, "") for module, names in public.items() if not names}

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = home[name]
        value = import_module(f"{package}.{module}")
        value = getattr(value, attribute) if attribute else value
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *home}), sorted(home)
