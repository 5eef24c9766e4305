"""Every InputError of the library in one file: `python tests/support/error_snapshot.py --write` renews it.

A line is `code  message`, with what is filled in at run time in braces; a change of wording shows as a diff of it.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "error_messages.txt"


class Raised(NamedTuple):
    """One `InputError(...)` of the source.

    Args:
        place: file and line.
        code: the literal of its keyword `code`; None where there is none.
        message: its first argument as it is written.
    """

    place: str
    code: str | None
    message: str


def message_of(node: ast.expr) -> str:
    """An expression as a template: literal text as it is, anything else in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message_of(node.left) + message_of(node.right)
    return f"{{{ast.unparse(node)}}}"


def raised() -> list[Raised]:
    """Every call of InputError in esm2kit, file by file."""
    found = []
    for path in sorted((ROOT / "esm2kit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError":
                if any(keyword.arg is None for keyword in node.keywords):
                    continue  # an error handed on as another process recorded it
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                code = keywords["code"].value if isinstance(keywords.get("code"), ast.Constant) else None
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Raised(place, code, " ".join(message_of(node.args[0]).split())))
    return found


def snapshot() -> str:
    """The file's text: sorted, so that moving code changes nothing."""
    return "\n".join(sorted(f"{error.code or '-'}  {error.message}" for error in raised())) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        SNAPSHOT.write_text(snapshot())
    print(f"{len(raised())} errors, {sum(error.code is None for error in raised())} of them without a code")
