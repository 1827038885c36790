"""A call of a tool, told as it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxengine.server.parsing.scan import ObjectScanner

_BEGINNING = re.compile(r'\{\s*["}]')
"""What arguments begin with: after so much of them a call is certain."""
_NO_ARGUMENTS = ("", "null", '""')
"""How models write that a function takes nothing, beside `{}`."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function begins.

    Attributes:
        name: The function.
        id: What the answer to the call refers to.
    """

    name: str
    id: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of the call that has begun last.

    Attributes:
        text: All pieces together are a JSON object, as the model wrote it.
        is_last: Whether it is complete. It never is where the model's text ends too early, or is no JSON.
    """

    text: str
    is_last: bool


class CallReader:
    """Makes a call of a JSON object with a name and arguments (or parameters), in any order, as it comes.

    Attributes:
        is_told: The call has begun. Before that the object may still turn out to be something else.
    """

    def __init__(
        self,
        name: str | None,
        new_id: Callable[[], str],
        *,
        is_marked: bool = False,
        tool_names: Collection[str] | None = None,
    ):
        """Makes a reader of one object.

        Args:
            name: The object is the arguments of a call with this name; None: they are in it.
            new_id: Makes an id for the call.
            is_marked: The model has said that a call follows: arguments may be missing.
            tool_names: Functions that may be called; None: any.
        """
        self.is_told = False
        self._new_id, self._is_marked, self._tool_names = new_id, is_marked, tool_names
        self._fields: set[str] = set()
        self._scanner = ObjectScanner(None if name is None else "arguments")
        self._texts = {"name": "" if name is None else json.dumps(name), "arguments": ""}
        self._complete = set() if name is None else {"name"}

    @property
    def is_done(self) -> bool:
        """Whether the end of the object has been read."""
        return self._scanner.is_done

    @property
    def is_over(self) -> bool:
        """Whether nothing more of the text belongs to the object."""
        return self._scanner.is_done or self._scanner.is_wrong

    def read(self, text: str) -> tuple[list[ToolCall | Arguments], int]:
        """Reads as much of a text as is certain; returns what is new of the call, and how many characters were read."""
        pieces, length = self._scanner.read(text)
        for name, piece, is_last in pieces:
            self._fields.add(name)
            field = "arguments" if name == "parameters" else name
            if field in self._texts and field not in self._complete:
                self._texts[field] += piece
                self._complete |= {field} if is_last else set()
        parts: list[ToolCall | Arguments] = []
        if not self.is_told and (call := self._call()) is not None:
            self.is_told = True
            parts.append(call)
        if self.is_told and self._texts["arguments"]:
            parts.append(Arguments(self._texts["arguments"], "arguments" in self._complete))
            self._texts["arguments"] = ""
        return parts, length

    def cut(self, text: str) -> list[Arguments]:
        """Returns what a text that ends before the object does still has of the arguments.

        That may be half a number.
        """
        in_arguments = self._scanner.field in ("arguments", "parameters") and "arguments" not in self._complete
        return [Arguments(text, False)] if in_arguments and text else []

    def is_cut_off(self) -> bool:
        """Returns whether a text that ends here has ended within a call, of which nothing is certain yet."""
        if self.is_told or self.is_over:
            return False
        if self._is_marked:
            return True
        known = ("name", "arguments", "parameters")
        if self._fields - set(known) or not any(field.startswith(self._scanner.key) for field in known):
            return False
        if not self._texts["name"].startswith('"'):
            return False
        name, is_whole = self._texts["name"].strip('"'), "name" in self._complete
        return may_be_name(name, self._tool_names, is_whole=is_whole)

    def _call(self) -> ToolCall | None:
        """Returns the call, if it is certain."""
        arguments = self._texts["arguments"]
        if self._is_marked and self._scanner.is_done and arguments.strip() in _NO_ARGUMENTS:
            arguments = self._texts["arguments"] = "{}"
            self._complete.add("arguments")
        if "arguments" in self._complete and arguments.startswith('"'):
            arguments = _object_in(arguments)
            self._texts["arguments"] = arguments or self._texts["arguments"]
        if "name" not in self._complete or not _BEGINNING.match(arguments):
            return None
        name = json.loads(self._texts["name"])
        return ToolCall(name, self._new_id()) if isinstance(name, str) and name and _is_unicode(name) else None


def _object_in(text: str) -> str:
    """Returns the object that a JSON string tells of, empty if it is none: some models write arguments so."""
    inner = json.loads(text).strip()
    scanner = ObjectScanner("arguments")
    pieces, length = scanner.read(inner)
    is_object = scanner.is_done and length == len(inner) and _is_unicode(inner)
    return "".join(piece.text for piece in pieces) if is_object else ""


def may_be_name(text: str, tool_names: Collection[str] | None, *, is_whole: bool = False) -> bool:
    """Returns whether a function is called so, or, unless the name is whole, may begin so."""
    if tool_names is None:
        return bool(re.fullmatch(r"[\w.-]*", text))
    return text in tool_names if is_whole else any(name.startswith(text) for name in tool_names)


def _is_unicode(text: str) -> bool:
    """Returns whether a text can be sent: half a surrogate pair, from an escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
