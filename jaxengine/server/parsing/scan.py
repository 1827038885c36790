"""Looking for markers and values in a text of which only the beginning has come."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SPECIAL = re.compile(r"""["'\\()\[\]{}]""")


def split_open(text: str, markers: Iterable[str]) -> tuple[str, str]:
    """Splits a text that holds no marker into what is certain and an end with which a marker may begin.

    Spaces before a marker are left out of an answer, so they are not certain either.
    """
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    certain = text[: len(text) - longest].rstrip()
    return certain, text[len(certain) :]


class ValueScanner:
    """Finds where a JSON or Python value in brackets ends, looking at each character once."""

    def __init__(self, start: int):
        """Args: start: Where its first bracket is."""
        self._position = start
        self._depth = 0
        self._quote = ""

    def end(self, text: str) -> int | None:
        """Where the value ends in a text that goes on with what the last call had; None while it is open."""
        while found := _SPECIAL.search(text, self._position):
            character = found[0]
            self._position = found.end()
            if character == "\\":
                self._position += 1  # whatever comes next says nothing, even if it has not come yet
            elif self._quote:
                self._quote = "" if character == self._quote else self._quote
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return found.end()
        self._position = max(self._position, len(text))
        return None


class TextScanner:
    """Finds where another text comes, looking at each character once."""

    def __init__(self, text: str):
        """Args: text: What to look for."""
        self._wanted = text
        self._position = 0

    def end(self, text: str) -> int | None:
        """Where it begins in a text that goes on with what the last call had; None if it has not come."""
        found = text.find(self._wanted, self._position)
        self._position = max(0, len(text) - len(self._wanted) + 1)
        return None if found < 0 else found
