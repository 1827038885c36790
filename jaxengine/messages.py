"""Values as messages and logs quote them: whoever sent them decides neither how long a line gets nor where it ends."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_QUOTED = 200
"""Characters of a quoted value at most."""
MAX_MESSAGE = 1000
"""Characters of a whole message at most: some are made by libraries, which quote what they like."""


class _Quoter(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, MAX_QUOTED, MAX_QUOTED, 60
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 10

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of very many digits, and takes long for those of many.
        return repr(x) if x.bit_length() <= 256 else f"<an integer of {x.bit_length()} bits>"


_QUOTER = _Quoter()


def quote(value: Any) -> str:
    """Returns `repr(value)`, at most `MAX_QUOTED` characters of it, without the work of making the rest.

    Line ends, control characters and halves of surrogate pairs are escaped, so the text fits on a line of a log.
    """
    text = shorten(_QUOTER.repr(value), MAX_QUOTED)
    # Objects may write themselves as they like, in several lines too.
    return text if text.isprintable() else shorten(text.encode("unicode_escape").decode(), MAX_QUOTED)


def shorten(text: str, max_length: int = MAX_MESSAGE) -> str:
    """Returns a text whose middle is left out if it is longer."""
    if len(text) <= max_length:
        return text
    head = (max_length - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (max_length - 5 - head) :]}"
