"""What a model thinks before it answers, apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass

from jaxengine.server.parsing.scan import split_open


@dataclass(frozen=True)
class ReasoningStyle:
    """How a model writes what it thinks.

    Attributes:
        start: Begins it.
        end: Ends it.
        always: It begins even without `start`.
    """

    start: str
    end: str
    always: bool = False


REASONING_STYLES = {
    "deepseek_r1": ReasoningStyle("<think>", "</think>", always=True),
    "qwen3": ReasoningStyle("<think>", "</think>"),
    "mistral": ReasoningStyle("[THINK]", "[/THINK]"),
}
"""By the names that `--reasoning-parser` takes, which are vLLM's."""


class ReasoningParser:
    """Splits the text of one completion, as it comes; spaces around the reasoning are left out.

    The pieces in which the text comes change nothing. A prompt whose template begins the reasoning, or ends it at once
    because thinking is off, is believed before `always`.
    """

    def __init__(self, style: ReasoningStyle, prompt: str):
        """Args: prompt: The text that the completion follows."""
        self._style = style
        prompt = prompt[-1000:].rstrip()
        self._always = prompt.endswith(style.start) or (style.always and not prompt.endswith(style.end))
        self._text = ""
        self._state = self._begin

    def feed(self, text: str, *, final: bool) -> tuple[str, str]:
        """Takes the next piece of the text, `final` if it is the last; returns reasoning and content certain now."""
        self._text += text
        reasoning = content = ""
        state = None
        while state != self._state:  # each goes on until it knows no more, or another one can
            state = self._state
            new_reasoning, new_content = state(final)
            reasoning, content = reasoning + new_reasoning, content + new_content
        return reasoning, content

    def _begin(self, final: bool) -> tuple[str, str]:
        text = self._text.lstrip()
        if text.startswith(self._style.start):
            self._text = text.removeprefix(self._style.start)
            self._state = self._open
        elif final or not self._style.start.startswith(text):
            self._state = self._open if self._always else self._rest
        return "", ""

    def _open(self, final: bool) -> tuple[str, str]:
        self._text = self._text.lstrip()
        if self._text or final:
            self._state = self._think
        return "", ""

    def _think(self, final: bool) -> tuple[str, str]:
        reasoning, end, rest = self._text.partition(self._style.end)
        if end:
            self._text, self._state = rest, self._close
            return reasoning.rstrip(), ""
        if final:
            self._text = ""
            return reasoning.rstrip(), ""
        certain, self._text = split_open(self._text, (self._style.end,))
        return certain, ""

    def _close(self, final: bool) -> tuple[str, str]:
        self._text = self._text.lstrip()
        if self._text:
            self._state = self._rest
        return "", ""

    def _rest(self, final: bool) -> tuple[str, str]:
        text, self._text = self._text, ""
        return "", text
