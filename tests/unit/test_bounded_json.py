"""Bounds on JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine import bounded_json

VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a"\\[]{}:,'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a"\\[{'), inner, max_size=4),
    max_leaves=30,
)


def shape(value: object) -> tuple[int, int, int]:
    """Depth, lists and objects, and members of a value."""
    if not isinstance(value, (list, dict)):
        return 0, 0, 0
    inner = [shape(item) for item in (value.values() if isinstance(value, dict) else value)]
    depths, containers, members = zip(*inner, strict=True) if inner else ((), (), ())
    own = len(value) if isinstance(value, dict) else 0
    return 1 + max(depths, default=0), 1 + sum(containers), own + sum(members)


@given(VALUES, st.integers(1, 9))
def test_shapes_of_json_are_seen_whatever_its_strings_say(value, size):
    data = json.dumps(value).encode()
    words = ("deep", "lists and objects", "members")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_json, "_PIECE", size)
        for number, name, word in zip(shape(value), ("MAX_DEPTH", "MAX_CONTAINERS", "MAX_MEMBERS"), words, strict=True):
            if number == 0:
                continue
            with patch.context() as inner:
                inner.setattr(bounded_json, name, number)
                inner.setattr(bounded_json, "_NUM_SAFE", -1)  # it is always looked at
                bounded_json.check_shape(data)
                inner.setattr(bounded_json, name, number - 1)
                with pytest.raises(ValueError, match=word):
                    bounded_json.check_shape(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "deep"),
        ('{"a":' * 1400 + "1" + "}" * 1400, "deep"),
        ("[" + "{}," * 60_000 + "{}]", "lists and objects"),
        ("{" + ",".join(f'"{i}":1' for i in range(110_000)) + "}", "members"),
        ("[" + "1," * 2_100_000 + "1]", "values"),
    ],
)
def test_json_beyond_a_bound_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        bounded_json.loads(text)


def test_what_is_within_the_bounds_is_read():
    for value in (list(range(1_000_000)), [{"[{": "[{,:" * 1000}] * 100, "[{" * 1_000_000):
        assert bounded_json.loads(json.dumps(value)) == value
