"""List all InputErrors of the library; `python tests/support/error_snapshot.py --write` updates the snapshot file.

A line is `code  message`, with the values that are inserted at run time in braces. A changed message shows as a diff.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "error_messages.txt"


class Raised(NamedTuple):
    """An `InputError(...)` in the source.

    Args:
        place: File and line.
        code: The literal value of its keyword `code`, if any.
        message: Its first argument, with expressions in braces.
    """

    place: str
    code: str | None
    message: str


def format_message(node: ast.expr) -> str:
    """Convert an expression to a template: literal text unchanged, other expressions in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return format_message(node.left) + format_message(node.right)
    return f"{{{ast.unparse(node)}}}"


def find_errors() -> list[Raised]:
    """Find the calls of InputError in esm2kit, file by file."""
    found = []
    for path in sorted((ROOT / "esm2kit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError":
                if any(keyword.arg is None for keyword in node.keywords):
                    continue  # an error that another process recorded
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                code = keywords["code"].value if isinstance(keywords.get("code"), ast.Constant) else None
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Raised(place, code, " ".join(format_message(node.args[0]).split())))
    return found


def format_snapshot() -> str:
    """Format the snapshot; it is sorted, so that moving code does not change it."""
    return "\n".join(sorted(f"{error.code or '-'}  {error.message}" for error in find_errors())) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        SNAPSHOT.write_text(format_snapshot())
    print(f"{len(find_errors())} errors, {sum(error.code is None for error in find_errors())} of them without a code")
