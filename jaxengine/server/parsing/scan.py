"""Looking for markers and values in a text of which only the beginning has come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

_SPECIAL = re.compile(r"""["'\\()\[\]{}]""")
_SPACES = re.compile(r"[ \t\n\r]+")
_WORD = re.compile(r"[-+.\w]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_IN_STRING = re.compile(r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+')
_OPEN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_CONTROL = re.compile(r"[\x00-\x1f]")
_VALUE = '{["0'
"""What a value may begin with; 0 stands for all that have neither brackets nor quotes."""


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


class Piece(NamedTuple):
    """A piece of a value, as it was written; but control characters in strings, as models write them, are escaped.

    Attributes:
        field: Whose value it is.
        text: Not empty.
        is_last: Whether it ends the value.
    """

    field: str
    text: str
    is_last: bool


class ObjectScanner:
    """Reads a JSON object (RFC 8259) of which only the beginning has come, looking at each character once.

    Attributes:
        field: The field whose value is being read.
        is_done: The end of the object has been read.
        is_wrong: The text does not go on as JSON does.
    """

    def __init__(self, whole: str | None = None):
        """Args: whole: The object is the value of this field; None: it has fields, and the pieces are their values."""
        self.field = whole
        self.is_done = self.is_wrong = False
        self._level = 1 if whole is None else 0  # how many brackets there are around a value that is told
        self._open: list[str] = []
        self._wanted = "{"
        self._in_string = self._in_key = False
        self._key = ""

    @property
    def key(self) -> str:
        """The key that was read last, as far as it has come."""
        return self._key

    def read(self, text: str) -> tuple[list[Piece], int]:
        """Reads as much of a text as is certain, which goes on where the last call has stopped.

        Returns:
            Pieces of values, and how many characters have been read.
        """
        pieces: list[Piece] = []
        position = 0
        while position < len(text) and not (self.is_done or self.is_wrong):
            field, in_string = self.field, self._in_string
            end = self._step(text, position)
            if end == position:
                break
            piece, position = text[position:end], end
            if in_string:
                piece = _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], piece)
            if field is not None and (in_string or len(self._open) > self._level or not piece.isspace()):
                pieces.append(Piece(field, piece, self.field is None))
        return pieces, position

    def _step(self, text: str, start: int) -> int:
        """Reads a token or a piece of a string; returns where it ends: `start` if it is wrong, or may not have come."""
        character = text[start]
        if self._in_string and character != '"':
            found = _IN_STRING.match(text, start)
            if found is None:
                self.is_wrong = not _OPEN_ESCAPE.fullmatch(text, start)
                return start
            self._key += found[0] if self._in_key else ""
            return found.end()
        if found := _SPACES.match(text, start):
            return found.end()
        kind = character if character in '{}[]:,"' else "0"
        self.is_wrong = kind not in self._wanted
        if self.is_wrong:
            return start
        if kind == "0":
            return self._read_scalar(text, start)
        self._read_mark(kind)
        return start + 1

    def _read_scalar(self, text: str, start: int) -> int:
        found = _WORD.match(text, start)
        if found is not None and found.end() == len(text):
            return start
        self.is_wrong = found is None or not _SCALAR.fullmatch(found[0])
        if found is None or self.is_wrong:
            return start
        self._end_value()
        return found.end()

    def _read_mark(self, mark: str) -> None:
        match mark:
            case "{":
                self._open.append(mark)
                self._wanted = '"}'
            case "[":
                self._open.append(mark)
                self._wanted = _VALUE + "]"
            case "}" | "]":
                self._open.pop()
                self._end_value()
            case ",":
                self._wanted = '"' if self._open[-1] == "{" else _VALUE
            case ":":
                self._wanted = _VALUE
                if len(self._open) == self._level:
                    self.field = json.loads(f'"{self._key}"', strict=False)
            case _ if not self._in_string:
                self._in_string, self._in_key, self._key = True, "{" not in self._wanted, ""
                self._wanted = '"'
            case _:
                self._in_string = False
                if self._in_key:
                    self._wanted, self._in_key = ":", False
                else:
                    self._end_value()

    def _end_value(self) -> None:
        if len(self._open) == self._level:
            self.field = None
        self.is_done = not self._open
        self._wanted = ",]" if self._open and self._open[-1] == "[" else ",}"


class ValueScanner:
    """Finds where a Python value in brackets ends, looking at each character once."""

    def __init__(self, start: int):
        """Args: start: Where its first bracket is."""
        self._position = start
        self._depth = 0
        self._quote = ""

    def end(self, text: str) -> int | None:
        """Returns where the value ends in a text that goes on with what the last call had; None while it is open."""
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
        """Returns where it begins in a text that goes on with what the last call had; None if it has not come."""
        found = text.find(self._wanted, self._position)
        self._position = max(0, len(text) - len(self._wanted) + 1)
        return None if found < 0 else found
