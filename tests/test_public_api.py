"""The public API: documented, importable without torch, and sufficient for the notebooks."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import esm2kit
import esm2kit.notebook

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("pandas", "torch", "numpy", "lightning", "IPython", "ipywidgets", "papermill", "matplotlib", "jsonargparse")
each_package = pytest.mark.parametrize("package", [esm2kit, esm2kit.notebook], ids=lambda package: package.__name__)


def documented(package: ModuleType) -> list[str]:
    """The first column of the tables under the package's heading in docs/reference/api.md."""
    parts = re.split(r"^## `([\w.]+)`$", (ROOT / "docs" / "reference" / "api.md").read_text(), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return re.findall(r"^\| `(\w+)` \|", sections[package.__name__], flags=re.M)


@each_package
def test_every_public_name_is_documented_once_and_importable(package: ModuleType) -> None:
    own = set(package.__all__)
    if package is esm2kit.notebook:  # the one import of a notebook adds those of esm2kit and shorthands such as np
        own -= {*esm2kit.__all__, *package.SHORTHANDS}
    assert sorted(documented(package)) == sorted(own)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


@each_package
def test_an_unknown_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = package.nosuch
    assert not hasattr(package, "_private")


@pytest.mark.parametrize("package", ["esm2kit", "esm2kit.notebook"])
def test_importing_a_package_loads_no_slow_module(package: str) -> None:
    code = f"import sys, {package}; print(*(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_use_only_the_public_api(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    public = {"esm2kit": esm2kit.__all__, "esm2kit.notebook": esm2kit.notebook.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "esm2kit":
            assert node.module in public, f"{node.module} is internal"
            assert {each.name for each in node.names} <= {*public[node.module], "*"}
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.startswith("esm2kit.")]
            assert not names, f"{names} are internal"
        elif isinstance(node, ast.Attribute):
            assert node.attr == "__version__" or not node.attr.startswith("_"), f"{node.attr} is private"
