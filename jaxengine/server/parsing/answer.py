"""One completion's text as the parts of an answer."""

from __future__ import annotations

from dataclasses import dataclass

from jaxengine.server.parsing.call import Arguments, ToolCall
from jaxengine.server.parsing.reasoning import ReasoningParser
from jaxengine.server.parsing.tool_calls import ToolParser


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


Part = Reasoning | str | ToolCall | Arguments
"""A piece of reasoning, a piece of the content, the beginning of a call, or a piece of its arguments."""


class AnswerParser:
    """Takes the text as it comes: first the reasoning, then content and calls."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, max_calls: int | None = None):
        """Args: max_calls: Calls beyond so many are dropped; None: there is no limit."""
        self._reasoning, self._tools, self._max_calls = reasoning, tools, max_calls
        self.num_calls = 0
        self._drops_call = False

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """Takes the next piece of the text, `final` if it is the last one; returns what is certain now."""
        parts: list[Part] = []
        if self._reasoning is not None:
            reasoning, text = self._reasoning.feed(text, final=final)
            parts += [Reasoning(reasoning)] if reasoning else []
        for part in [text] if self._tools is None else self._tools.feed(text, final=final):
            if isinstance(part, ToolCall):
                self._drops_call = self.num_calls == self._max_calls
                self.num_calls += not self._drops_call
            if part and not (self._drops_call and isinstance(part, ToolCall | Arguments)):
                parts.append(part)
        return parts
