"""Draw the packages of esm2kit and who imports whom, from the imports: `python docs/packages.py` writes packages.md."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("packages.md")
HEAD = """# The packages

Made by `python docs/packages.py` from the imports. An arrow means "imports"; one that a longer way implies is left
out of the picture, and the table has them all. `cli` also loads every stage by its name, when it is called
(`esm2kit/cli/commands.py`). CONTRIBUTING.md says what is in each package.
"""


def imports() -> dict[str, set[str]]:
    """Package -> the packages it imports from, at whatever place of its modules."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "esm2kit").rglob("*.py")):
        package = path.relative_to(ROOT / "esm2kit").parts[0].removesuffix(".py")
        if package.startswith("__"):
            continue
        targets = found.setdefault(package, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            targets |= {name.split(".")[1] for name in names if name.startswith("esm2kit.")} - {package}
    return found


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way implies."""

    def reached(package: str) -> set[str]:
        return arrows[package].union(*(reached(below) for below in arrows[package]))

    return {
        package: {to for to in below if not any(to in reached(other) for other in below - {to})}
        for package, below in arrows.items()
    }


def picture() -> str:
    """The page: a Mermaid graph, and a table of every package's imports."""
    arrows = imports()
    graph = [f"    {package} --> {to}" for package, below in reduced(arrows).items() for to in sorted(below)]
    rows = [f"| {package} | {', '.join(sorted(below)) or 'none'} |" for package, below in arrows.items()]
    table = ["| package | imports |", "| --- | --- |", *rows]
    return "\n".join([HEAD, "```mermaid", "graph TD", *graph, "```", "", *table, ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
