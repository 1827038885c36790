"""Calls of tools in the text that a model writes: one class for each way in which models write them.

All share a state machine. What it decides depends on the text alone, never on the pieces in which it comes; so it holds
back what may become a call until that is certain. A call is told when it is complete: one that turns out malformed is
part of the content, exactly as it was written.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxengine.server.parsing.scan import TextScanner, ValueScanner, split_open


@dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    Attributes:
        name: The function.
        arguments: A JSON object, as a string.
        id: What the answer to the call refers to.
    """

    name: str
    arguments: str
    id: str


class ToolParser:
    """Finds calls in the text of one completion, as it comes. Spaces around calls are left out.

    Attributes:
        markers: Texts after which a call follows.
        leading: The same, but only at the beginning of the answer and after a call. Brackets are part of the call.
        between: Text that may follow a call.
    """

    markers: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    between: str = ""

    def __init__(self) -> None:
        self._text = ""  # what nothing is certain about yet, after `_held`
        self._held = ""  # spaces and the marker of the call that the text may be
        self._marker: str | None = None
        self._scanner: ValueScanner | TextScanner | None = None
        self._fresh = True  # nothing but calls so far, or since the last call
        self._expected: str | None = None  # what may still follow the last call, after which nothing else has come

    def feed(self, text: str, *, final: bool) -> list[str | ToolCall]:
        """Takes the next piece of the text, `final` if it is the last one; returns what is certain now."""
        self._text += text
        parts: list[str | ToolCall] = []
        while self._step(parts, final):
            pass
        return parts

    def value_start(self, text: str) -> int | None:
        """Where in the text after a marker the value begins; -1 if it is none, None if that is not known yet."""
        start = len(text) - len(text.lstrip())
        if start == len(text):
            return None
        return start if text[start] in "{[" else -1

    def scanner(self, start: int) -> ValueScanner | TextScanner:
        """What finds the end of a value that begins there."""
        return ValueScanner(start)

    def parse(self, text: str, start: int) -> list[ToolCall]:
        """Reads the text from a marker on, with a value that begins at `start`; raises ValueError if it is no call."""
        return self.calls(_loads(text[start:]))

    def calls(self, value: Any) -> list[ToolCall]:
        """The calls that a JSON value tells of: an object with name and arguments (or parameters), or a list of them.

        Raises:
            ValueError: It is no such value.
        """
        calls = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise ValueError(f"{item!r} is no call")
            arguments = item.get("arguments", item.get("parameters"))
            calls.append(self.call(item.get("name"), _loads(arguments) if isinstance(arguments, str) else arguments))
        return calls

    def call(self, name: Any, arguments: Any) -> ToolCall:
        """Raises ValueError if these are no name and no arguments that JSON can tell."""
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            raise ValueError(f"{name!r} with {arguments!r} is no call")
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{name}: {error}") from error
        (name + text).encode()  # half a surrogate pair, from an escape, could not be sent
        return ToolCall(name, text, self.new_id())

    def new_id(self) -> str:
        """An id for a call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def _step(self, parts: list[str | ToolCall], final: bool) -> bool:
        """Goes on as far as one thing is certain; returns whether another may be."""
        if self._marker is not None:
            return self._step_inside(parts, final)
        if self._expected is not None:
            return self._skip_between(final)
        return self._step_outside(parts, final)

    def _skip_between(self, final: bool) -> bool:
        assert self._expected is not None
        self._text = self._text.lstrip()
        if self._expected and self._text.startswith(self._expected):
            self._text, self._expected = self._text.removeprefix(self._expected), ""
            return True
        if self._expected.startswith(self._text) and not final:
            return False
        self._expected = None
        return True

    def _step_outside(self, parts: list[str | ToolCall], final: bool) -> bool:
        found = self._find()
        if found is None:
            markers = (*self.markers, *(self.leading if self._fresh else ()))
            certain, self._text = (self._text, "") if final else split_open(self._text, markers)
            self._put(parts, certain)
            return False
        start, marker = found
        before = self._text[:start].rstrip()
        self._put(parts, before)
        length = 0 if marker in "{[" else len(marker)
        self._held = self._text[len(before) : start + length]
        self._marker, self._text = marker, self._text[start + length :]
        return True

    def _find(self) -> tuple[int, str] | None:
        """The first marker and its place."""
        places = [(place, marker) for marker in self.markers if (place := self._text.find(marker)) >= 0]
        if self._fresh:
            start = len(self._text) - len(self._text.lstrip())
            places += [(start, marker) for marker in self.leading if self._text.startswith(marker, start)]
        return min(places, default=None)

    def _step_inside(self, parts: list[str | ToolCall], final: bool) -> bool:
        start = self.value_start(self._text)
        end = None
        if start is not None and start >= 0:
            self._scanner = self._scanner or self.scanner(start)
            end = self._scanner.end(self._text)
        if start is not None and start < 0:
            self._put(parts, self._held)
        elif start is not None and end is not None:
            try:
                parts += self._accept(self.parse(self._text[:end], start))
            except ValueError:
                self._put(parts, self._held + self._text[:end])
            self._text = self._text[end:]
        elif final:  # the end of the call never came
            self._put(parts, self._held + self._text)
            self._text = ""
        else:
            return False
        self._held, self._marker, self._scanner = "", None, None
        return True

    def _accept(self, calls: list[ToolCall]) -> list[ToolCall]:
        if not calls:
            raise ValueError("no call at all")
        self._fresh, self._expected = True, self.between
        return calls

    def _put(self, parts: list[str | ToolCall], text: str) -> None:
        if text:
            parts.append(text)
            self._fresh = self._fresh and text.isspace()


class JSONParser(ToolParser):
    """A list of calls in JSON and nothing else: what calls that are forced look like."""

    leading = ("[",)


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes 2 Pro and 3, Qwen 2.5 and 3."""

    markers = ("<tool_call>",)
    between = "</tool_call>"


class Llama3JSONParser(ToolParser):
    """`{"name": ..., "parameters": {...}}` at the beginning or after `<|python_tag|>`; several with `;` between.

    https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
    """

    markers = ("<|python_tag|>",)
    leading = ("{",)
    between = ";"


class MistralParser(ToolParser):
    """`[TOOL_CALLS]` and a list of objects, or, since the eleventh tokenizer, `[TOOL_CALLS]name{...}` for each call.

    Between name and arguments there may be `[CALL_ID]id` and `[ARGS]`.
    """

    markers = ("[TOOL_CALLS]",)
    _HEADER = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*")
    _MAX_HEADER = 200

    def value_start(self, text: str) -> int | None:
        start = super().value_start(text)
        if start is None or start >= 0:
            return start
        start = text.find("{", 0, self._MAX_HEADER)
        if start < 0:
            return None if len(text) < self._MAX_HEADER else -1
        return start if self._HEADER.fullmatch(text, 0, start) else -1

    def parse(self, text: str, start: int) -> list[ToolCall]:
        header = self._HEADER.fullmatch(text, 0, start)
        return super().parse(text, start) if header is None else [self.call(header[1], _loads(text[start:]))]

    def new_id(self) -> str:
        """Nine letters and digits: Mistral's templates refuse all else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class GemmaParser(ToolParser):
    """Calls in Python, `[f(a=1), g(b="x")]` or in a block of tool_code; or JSON objects, in a block or bare.

    https://ai.google.dev/gemma/docs/capabilities/function-calling: Gemma 3 has no tokens for calls, and writes what the
    prompt asks for.
    """

    _CODE = "```tool_code"
    markers = (_CODE,)
    leading = ("[", "{", "```json", "```python")

    def value_start(self, text: str) -> int | None:
        return 0 if self._marker == self._CODE else super().value_start(text)

    def scanner(self, start: int) -> ValueScanner | TextScanner:
        return TextScanner("```") if self._marker == self._CODE else super().scanner(start)

    def parse(self, text: str, start: int) -> list[ToolCall]:
        self.between = "```" if (self._marker or "").startswith("```") else ""
        try:
            return super().parse(text, start)
        except ValueError:
            return self._python_calls(text)

    def _python_calls(self, code: str) -> list[ToolCall]:
        try:
            with warnings.catch_warnings(action="ignore"):  # what is odd about a model's Python interests nobody
                statements: Sequence[ast.stmt] = ast.parse(code.strip()).body
            calls = []
            for statement in statements:
                value = statement.value if isinstance(statement, ast.Expr) else None
                for node in value.elts if isinstance(value, ast.List) else [value]:
                    if (
                        not isinstance(node, ast.Call)
                        or not isinstance(node.func, ast.Name | ast.Attribute)
                        or node.args
                    ):
                        raise ValueError("something else than calls with named arguments")
                    arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                    if None in arguments:
                        raise ValueError("**: no name")
                    calls.append(self.call(ast.unparse(node.func), arguments))
            return calls
        except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"no calls in Python: {error}") from error


def _loads(text: str) -> Any:
    """Reads JSON, with line ends in strings, as models write them; raises ValueError."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, strict=False, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("too deep") from error


TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "qwen2_5": HermesParser,
    "qwen3": HermesParser,
    "llama3_json": Llama3JSONParser,
    "llama4_json": Llama3JSONParser,
    "mistral": MistralParser,
    "gemma": GemmaParser,
    "pythonic": GemmaParser,
}
"""By the names that `--tool-call-parser` takes: vLLM's where it has one."""
