"""Write the repository's address wherever it is shown: README, documentation, Colab notebook, CITATION.cff.

The address is one setting, `Repository` under `[project.urls]` in pyproject.toml. Change it there, then run
`python docs/address.py`.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "CITATION.cff", "docs/**/*.md", "notebooks/**/*.ipynb")


def read_address() -> str:
    """Return the address in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def read_shown() -> str:
    """Return the address that the files show: the one in CITATION.cff, which this script writes."""
    return re.search(r"^repository-code: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1]


def replace_address(text: str, old: str, new: str) -> str:
    """Replace an address in a text: as a whole, and as `github/owner/name` in links to Colab."""
    path = {address: address.removeprefix("https://").replace("github.com/", "github/") for address in (old, new)}
    text = re.sub(rf"{re.escape(old)}(?![\w-])", new, text)
    return re.sub(rf"(colab\.research\.google\.com/){re.escape(path[old])}(?![\w-])", rf"\1{path[new]}", text)


def write_address() -> list[Path]:
    """Write the address into every file that shows another one; return the changed files."""
    old, new, changed = read_shown(), read_address(), []
    for path in sorted({path for pattern in FILES for path in ROOT.glob(pattern)}):
        if "_build" in path.parts:
            continue
        before = path.read_text(encoding="utf-8")
        after = replace_address(before, old, new)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for file in write_address():
        print(file.relative_to(ROOT))
