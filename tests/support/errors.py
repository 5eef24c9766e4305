"""Expect an `InputError` by its code and values, not by its message."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from esm2kit.core.errors import InputError


@contextmanager
def refused(code: str, **values: Any) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Expect the block to raise an InputError with this code and at least these values.

    Args:
        code: `InputError.code`.
        values: Some of `InputError.values`.

    Yields:
        The caught exception.
    """
    with pytest.raises(InputError) as caught:
        yield caught
    error = caught.value
    assert error.code == code, f"expected {code!r}, found {error.code!r}: {error}"
    found = {name: error.values.get(name) for name in values}
    assert found == values, f"{code}: expected {values}, found {found}: {error}"
    assert "\n" not in str(error), "the message has several lines"
