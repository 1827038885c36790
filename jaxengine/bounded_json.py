"""Bounds on JSON, looked at before anything is made of it: how deep and how many, whatever its strings say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

MAX_DEPTH = 128
"""Lists and objects within each other. What works on them recursively is far from its own limit then."""
MAX_CONTAINERS = 30_000
"""Lists and objects in all. Each costs some hundred bytes and a microsecond, an empty one two bytes to send."""
MAX_MEMBERS = 100_000
"""Members of objects in all."""
MAX_VALUES = 2**21
"""Values in all: prompts are sent as token ids too."""
_NUM_SAFE = MAX_DEPTH
"""So many lists and objects, and a hundred times as many commas, are within all bounds."""
_PIECE = 2**18
"""Bytes that are looked at together: NumPy lets other threads run meanwhile."""
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def check_shape(data: bytes) -> None:
    """Checks JSON against the bounds of this module. It may be anything: that it is JSON is not checked.

    Raises:
        ValueError: It is beyond one of them.
    """
    if data.count(b"[") + data.count(b"{") <= _NUM_SAFE and data.count(b",") <= 100 * _NUM_SAFE:
        return  # whatever of it is within strings
    depth = num_containers = num_members = num_values = 0
    in_string = escaped = False
    for start in range(0, len(data), _PIECE):
        piece = np.frombuffer(data, np.uint8, min(_PIECE, len(data) - start), start)
        outside, in_string, escaped = _outside_strings(piece, in_string, escaped)
        opens = ((piece == ord("[")) | (piece == ord("{"))) & outside
        closes = ((piece == ord("]")) | (piece == ord("}"))) & outside
        depths = depth + np.cumsum(opens.astype(np.int32) - closes)
        depth = int(depths[-1])
        num_containers += int(np.count_nonzero(opens))
        num_members += int(np.count_nonzero((piece == ord(":")) & outside))
        num_values += int(np.count_nonzero((piece == ord(",")) & outside))
        for what, number, bound in (
            ("lists and objects nested more than {} deep", int(depths.max()), MAX_DEPTH),
            ("more than {} lists and objects", num_containers, MAX_CONTAINERS),
            ("more than {} members of objects", num_members, MAX_MEMBERS),
            ("more than {} values", num_values, MAX_VALUES),
        ):
            if number > bound:
                raise ValueError(what.format(bound))


def loads(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: It is no JSON, or beyond a bound.
    """
    check_shape(text.encode("utf-8", "surrogatepass"))
    return json.loads(text)


def _outside_strings(piece: np.ndarray, in_string: bool, escaped: bool) -> tuple[np.ndarray, bool, bool]:
    """Returns which bytes are outside strings.

    Args:
        piece: u8[n].
        in_string: Whether the piece begins within a string.
        escaped: Whether its first byte follows a backslash that escapes it.

    Returns:
        bool[n], exact but for the quotes themselves; and the last two arguments for the next piece.
    """
    quotes = piece == _QUOTE
    backslashes = np.flatnonzero(piece == _BACKSLASH)
    if escaped or len(backslashes):
        # Of a run of backslashes every other one escapes what follows it.
        places = np.concatenate(([-1], backslashes)) if escaped else backslashes
        begins = np.concatenate(([True], np.diff(places) > 1))
        firsts = places[begins][np.cumsum(begins) - 1]
        escapes = places[(places - firsts) % 2 == 0] + 1
        escaped = bool(len(escapes)) and int(escapes[-1]) == len(piece)
        quotes[escapes[: len(escapes) - 1] if escaped else escapes] = False
    inside = np.bitwise_xor.accumulate(quotes) ^ in_string
    return ~inside, bool(inside[-1]), escaped
