"""What workers do: one method for each kind of job."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.grammar import GrammarCompiler, grammar_text

MAX_GRAMMAR_BYTES = 48 * 2**20
"""Memory that a compiled grammar may take: the engine keeps it as long as a request needs it."""


class Jobs:
    """Does jobs with one model's tokens."""

    def __init__(self, setup: dict[str, Any]):
        """Args: setup: `tokens`, a `TokenizerSetup`, or `no_tokens`, why there is none."""
        self._no_tokens = setup.get("no_tokens")
        self._compiler = GrammarCompiler(lambda: setup["tokens"])
        if self._no_tokens is None:
            self._compiler.tokenizer  # noqa: B018 (made before the first job, which waits for it otherwise)
        self._kinds: dict[str, Callable[..., Any]] = {"grammar": self._grammar, "template": self._template}

    def run(self, job: dict[str, Any]) -> Any:
        """Does a job: its `kind` names the method, the other fields are arguments.

        Raises:
            ValueError: What is wrong with it.
        """
        return self._kinds[job.pop("kind")](**job)

    def _grammar(self, params: dict[str, Any]) -> dict[str, Any]:
        """Compiles a grammar and computes its first mask; gives its text and the memory that it takes."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        if self._no_tokens is not None:
            raise ValueError(self._no_tokens)
        before = memory_bytes()
        text = grammar_text(StructuredOutputsParams(**params))
        matcher = self._compiler.compile_anew(text).deep_copy()
        fill_next_token_bitmask(matcher, allocate_token_bitmask(1, self._compiler.tokenizer.vocab_size), 0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        num_bytes = max(memory_bytes() - before, len(text))
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise ValueError(f"it takes {num_bytes >> 20} MiB of memory, at most {MAX_GRAMMAR_BYTES >> 20} are allowed")
        return {"text": text, "num_bytes": num_bytes}

    def _template(
        self, template: str, messages: list[dict[str, Any]], options: dict[str, Any], max_characters: int
    ) -> str:
        """Renders a chat template; a text of more characters cannot be used, and is not sent."""
        from jaxengine.loading.chat_template import render_template

        try:
            text = render_template(template, messages, **options)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, which can fail in any way
            raise ValueError(f"the chat template refused the messages: {error}") from error
        if len(text) > max_characters:
            raise ValueError(f"the chat template has written {len(text)} characters; {max_characters} at most may fit")
        return text


def memory_bytes() -> int:
    """Returns memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
