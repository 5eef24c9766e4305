"""Every message that docs/troubleshooting.md quotes is one that esm2kit prints."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
# of the shell, of torch and of JupyterLab
FOREIGN = {"esm2kit: command not found", "Running as root", "is not recommended"}
VALUE = "\0"  # place of a value in a message
LITERAL_SHARE = 0.6  # of the letters of a quote; the others may be values


@cache
def messages() -> list[str]:
    """All texts of the package, with VALUE for each value that a message inserts, and the lines of the Makefile."""
    found = set((ROOT / "Makefile").read_text(encoding="utf-8").splitlines())
    for path in (ROOT / "esm2kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found.add(re.sub(r"%[\d.]*[sdrgf]|\{\w*[^{}]*\}", VALUE, node.value))
    return sorted(found)


def quotes() -> list[str]:
    """The quoted parts in the first column of the page's tables; `...` separates parts."""
    rows = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    parts = [part.strip() for row in rows for quote in re.findall(r"`([^`]+)`", row) for part in quote.split("...")]
    return [part for part in parts if part and part not in FOREIGN]


def literal_letters(quote: str, message: str) -> int:
    """The most letters of a quote that are literal in a message; -1 if the message cannot contain the quote."""
    states = {0: 0}  # place in the quote -> literal letters so far
    result = -1
    for letter in message:
        reached: dict[int, int] = {0: 0}
        for place, count in states.items():
            if place == len(quote):
                continue
            if letter == VALUE:  # a value may be any part of the rest
                for end in range(place, len(quote) + 1):
                    reached[end] = max(reached.get(end, -1), count)
            elif quote[place] == letter:
                reached[place + 1] = max(reached.get(place + 1, -1), count + 1)
        result = max(result, reached.get(len(quote), -1))
        states = reached
    return result


def is_printed(quote: str) -> bool:
    words = [word for word in re.findall(r"[A-Za-z]+", quote) if len(word) > 2]
    texts = [message for message in messages() if any(word in message for word in words)]
    return any(literal_letters(quote, message) >= LITERAL_SHARE * len(quote) for message in texts)


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_exists(quote: str) -> None:
    assert is_printed(quote), f"{PAGE.name} quotes {quote!r}, which esm2kit does not print"


def test_the_page_has_quotes_and_others_are_found() -> None:
    assert len(quotes()) > 30
    assert not is_printed("the proteins are too tired to embed")
    assert not is_printed("the checkpoint is damagd")
    assert literal_letters("letter 'J' at", f"letter {VALUE} at residue") == len("letter  at")
    assert literal_letters("letter J on", f"letter {VALUE} at residue") == len("letter ")
