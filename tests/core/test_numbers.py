"""Numbers of things in sentences."""

import pytest

from esm2kit.core.numbers import format_count


@pytest.mark.parametrize(
    ("count", "noun", "plural", "text"),
    [
        (0, "run", "", "0 runs"),
        (1, "run", "", "1 run"),
        (2_384, "protein", "", "2,384 proteins"),
        (1, "class", "classes", "1 class"),
        (3, "class", "classes", "3 classes"),
    ],
)
def test_one_thing_is_singular(count: int, noun: str, plural: str, text: str) -> None:
    assert format_count(count, noun, plural) == text
