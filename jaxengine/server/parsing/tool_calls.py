"""Calls of tools in the text that a model writes: one class for each way in which models write them.

What a parser decides depends on the text alone, never on the pieces in which it comes. It holds back what may become a
call until that is certain: until name and beginning of the arguments have come. From then on the arguments are told as
they are written. What is no call is part of the content, exactly as it was written; so is what follows a call that
stops being JSON. A call of which nothing was certain when the text ended, as `max_tokens` ends it, is left out.
"""

from __future__ import annotations

import re
import secrets
import string
import uuid
from collections.abc import Collection, Generator
from typing import override

from jaxengine.server.parsing.call import Arguments, CallReader, ToolCall, may_be_name
from jaxengine.server.parsing.python_calls import python_calls
from jaxengine.server.parsing.scan import TextScanner, ValueScanner, split_open

type Steps[T] = Generator[None, None, T]
"""Reads the text, and yields where it needs more of it."""


class ToolParser:
    """Finds calls in the text of one completion, as it comes. Spaces around calls are left out.

    Attributes:
        markers: Texts after which a call follows.
        leading: The same, but only at the beginning of the answer and after a call. Brackets are part of the call.
        between: Text that may follow a call.
        only_calls: Nothing but calls is written, so what is in `leading` says that one follows.
    """

    markers: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    between: str = ""
    only_calls: bool = False

    def __init__(self, tool_names: Collection[str] | None = None) -> None:
        """Args: tool_names: Functions that may be called; they tell half a call from other JSON. None: any."""
        self.tool_names = tool_names
        self._is_marked = False  # the model has said that a call follows
        self._text = ""  # what has come and has not been read
        self._final = False  # nothing more will come
        self._parts: list[str | ToolCall | Arguments] = []
        self._fresh = True  # nothing but calls so far, or since the last call
        self._reading = self._read()

    def feed(self, text: str, *, final: bool) -> list[str | ToolCall | Arguments]:
        """Takes the next piece of the text, `final` if it is the last one; returns what is certain now."""
        self._text += text
        self._final = final
        next(self._reading, None)
        parts, self._parts = self._parts, []
        return parts

    def new_id(self) -> str:
        """Returns an id for a call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def read_value(self, held: str) -> Steps[None]:
        """Reads what follows a marker: calls, or else content, with `held` before it, which has been read."""
        held += yield from self._read_spaces()
        if self._text.startswith(("{", "[")):
            yield from self.read_json(held)
        else:
            self._put_unless(self._is_cut_short(), held)

    def read_json(self, held: str) -> Steps[None]:
        """Reads an object or a list of objects, with which the text begins."""
        if self._text.startswith("{"):
            yield from self.read_object(held)
            return
        held += self._take(1)
        told = False
        while True:
            held += yield from self._read_spaces()
            if not self._text.startswith("{"):
                break
            if not (yield from self.read_object(held)):
                return
            told = True
            held = yield from self._read_spaces()
            if self._text.startswith("]"):
                self._take(1)
                return
            if not self._text.startswith(","):
                break
            held += self._take(1)
        self._put_unless(not self._text and (told or self._is_cut_short()), held)

    def read_object(self, held: str, name: str | None = None) -> Steps[bool]:
        """Reads one object: a call or, if its name is known already, its arguments.

        Returns:
            Whether it was a call, to its end.
        """
        is_marked = self._is_marked or name is not None
        reader = CallReader(name, self.new_id, is_marked=is_marked, tool_names=self.tool_names)
        while True:
            parts, length = reader.read(self._text)
            self._parts += parts
            held += self._take(length)
            if reader.is_over or self._final:
                break
            yield
        if not reader.is_told:
            is_cut_off = reader.is_cut_off()
            self._put_unless(is_cut_off, held)
            self._text = "" if is_cut_off else self._text
            return False
        self._fresh = True
        if not reader.is_over:
            self._parts += reader.cut(self._text)
            self._text = ""
        return reader.is_done

    def _read(self) -> Steps[None]:
        while (held := (yield from self._read_marker())) is not None:
            yield from self.read_value(held)
            if self._fresh:
                yield from self._read_between(self.between)

    def _read_marker(self) -> Steps[str | None]:
        """Reads content up to a marker; returns the marker and spaces before it, None if the text has none."""
        while (found := self._find()) is None:
            markers = (*self.markers, *(self.leading if self._fresh else ()))
            certain, self._text = (self._text, "") if self._final else split_open(self._text, markers)
            self._put(certain)
            if self._final:
                return None
            yield
        start, marker = found
        self._is_marked = self.only_calls or marker in self.markers
        before = self._text[:start].rstrip()
        self._put(before)
        self._take(len(before))
        return self._take(start - len(before) + (0 if marker in "{[" else len(marker)))

    def _find(self) -> tuple[int, str] | None:
        """Returns the first marker and its place."""
        places = [(place, marker) for marker in self.markers if (place := self._text.find(marker)) >= 0]
        if self._fresh:
            start = len(self._text) - len(self._text.lstrip())
            places += [(start, marker) for marker in self.leading if self._text.startswith(marker, start)]
        return min(places, default=None)

    def _read_spaces(self) -> Steps[str]:
        """Reads spaces, up to something else or the end."""
        spaces = ""
        while True:
            spaces += self._take(len(self._text) - len(self._text.lstrip()))
            if self._text or self._final:
                return spaces
            yield

    def _read_between(self, expected: str) -> Steps[None]:
        """Leaves out spaces, and once the text that is expected among them."""
        yield from self._read_spaces()
        while expected.startswith(self._text) and len(self._text) < len(expected) and not self._final:
            yield
        if expected and self._text.startswith(expected):
            self._take(len(expected))
            yield from self._read_spaces()

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _is_cut_short(self) -> bool:
        """Returns whether the text has ended where a call was to come."""
        return self._is_marked and self._final and not self._text

    def _put_unless(self, is_cut_off: bool, text: str) -> None:
        """Makes text that is no call part of the content, unless it is the beginning of one that was cut off."""
        if not is_cut_off:
            self._put(text)

    def _put(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._fresh = self._fresh and text.isspace()


class JSONParser(ToolParser):
    """A list of calls in JSON and nothing else: what calls that are forced look like."""

    leading = ("[",)
    only_calls = True


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
    _CUT_HEADER = re.compile(r"\s*[\w.-]*\s*(?:\[(?:CALL_ID|ARGS)?[\]\w\s]*)*")
    _MAX_HEADER = 200

    @override
    def read_value(self, held: str) -> Steps[None]:
        held += yield from self._read_spaces()
        if self._text.startswith(("{", "[")):
            yield from self.read_json(held)
            return
        while (end := self._text.find("{", 0, self._MAX_HEADER)) < 0:
            if self._final or len(self._text) >= self._MAX_HEADER:
                break
            yield
        header = self._HEADER.fullmatch(self._text, 0, end) if end >= 0 else None
        if header is None:
            is_cut_off = self._final and bool(self._CUT_HEADER.fullmatch(self._text))
            self._put_unless(is_cut_off, held)
            self._text = "" if is_cut_off else self._text
        else:
            yield from self.read_object(held + self._take(end), header[1])

    def new_id(self) -> str:
        """Returns nine letters and digits: Mistral's templates refuse all else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class GemmaParser(ToolParser):
    """Calls in Python, `[f(a=1), g(b="x")]` or in a block of tool_code; or JSON objects, in a block or bare.

    Python is told when all of it has come, and as JSON: whether it is nothing but calls shows only then.

    https://ai.google.dev/gemma/docs/capabilities/function-calling: Gemma 3 has no tokens for calls, and writes what the
    prompt asks for.
    """

    _CODE = "```tool_code"
    markers = (_CODE,)
    leading = ("[", "{", "```json", "```python")

    @override
    def read_value(self, held: str) -> Steps[None]:
        self.between = "```" if "```" in held else ""
        in_code = self._CODE in held
        held += yield from self._read_spaces()
        while not self._final and re.fullmatch(r"\[\s*", self._text):
            yield
        if re.match(r"\{|\[\s*\{", self._text):
            yield from self.read_json(held)
        elif in_code or self._text.startswith("["):
            self._is_marked = in_code
            yield from self._read_python(held, TextScanner("```") if in_code else ValueScanner(0))
        else:
            self._put(held)

    def _read_python(self, held: str, scanner: TextScanner | ValueScanner) -> Steps[None]:
        while (end := scanner.end(self._text)) is None and not self._final:
            yield
        code = self._take(len(self._text) if end is None else end)
        if end is None and (self._is_marked or self._may_be_calls(code)):
            return
        try:
            calls = [] if end is None else python_calls(code)
        except ValueError:
            calls = []
        for name, arguments in calls:
            self._fresh = True
            self._parts += [ToolCall(name, self.new_id()), Arguments(arguments, True)]
        if not calls:
            self._put(held + code)

    def _may_be_calls(self, code: str) -> bool:
        """Returns whether a list that was cut off begins with a call."""
        name, paren, _ = code.removeprefix("[").lstrip().partition("(")
        return bool(paren and name) and may_be_name(name.rstrip(), self.tool_names, is_whole=True)


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
