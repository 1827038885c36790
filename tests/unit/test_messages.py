"""Values in messages."""

import numpy as np
import pytest

from jaxengine.messages import MAX_QUOTED, quote, shorten


@pytest.mark.parametrize(
    "value",
    [
        "x" * 2_000_000,
        ["x" * 1000] * 1000,
        {str(i): "x" * 1000 for i in range(1000)},
        1 << 40_000,
        -(1 << 1000),
        b"x" * 2_000_000,
        np.zeros(1_000_000),
        "\ud800\n\u2028\x1b[31m",
        [[[[[[[["deep"]]]]]]]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_quoted_values_are_short_and_on_one_line(value):
    text = quote(value)
    assert len(text) <= MAX_QUOTED
    assert text.isprintable()


def test_short_values_are_quoted_whole():
    for value in (1, -1.5, "it's", ["a", 1, None], {"a": [1]}, True, "\u00e9"):
        assert quote(value) == repr(value)
    assert shorten("x" * 999) == "x" * 999
    assert len(shorten("x" * 10**6)) == 1000
