"""What the commands share: flags, the engine they start, messages on stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxengine.llm import LLM
    from jaxengine.outputs import RequestOutput, TokenLogprobDict

MAX_LAZY_SEQS = 8
"""Completions at once up to which only the shapes most needed are compiled ahead: more are worth the others."""
MAX_SMALL_SEQS = 64
"""Completions at once up to which the engine is made just as large."""


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every command has."""
    parser.add_argument("--quiet", "-q", action="store_true", help="only results: no progress, statistics, warnings")
    parser.add_argument("--debug", action="store_true", help="log everything, and show where an error comes from")


def fast_start(engine_args: dict[str, Any], num_sequences: int) -> dict[str, Any]:
    """Returns engine arguments for a program that answers a few prompts and ends: what was given, and quick defaults.

    Args:
        engine_args: Fields of `EngineArgs` that the user gave; they stay as they are.
        num_sequences: Completions that may run at once.
    """
    chosen = dict(engine_args)
    if num_sequences <= MAX_SMALL_SEQS:
        chosen.setdefault("max_num_seqs", num_sequences)
    if num_sequences <= MAX_LAZY_SEQS:
        chosen.setdefault("warmup", "lazy")
    return chosen


class Status:
    """A message on stderr that vanishes when it is over; nothing where stderr is no terminal."""

    def __init__(self, *, quiet: bool = False):
        self._is_on = not quiet and sys.stderr.isatty()
        self._is_shown = False

    def show(self, text: str) -> None:
        """Shows a text in place of the one before."""
        if self._is_on:
            self.clear()
            print(text, end="", file=sys.stderr, flush=True)
            self._is_shown = True

    def clear(self) -> None:
        """Takes the text away."""
        if self._is_shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._is_shown = False


@contextmanager
def make_llm(engine_args: dict[str, Any], status: Status) -> Iterator[LLM]:
    """Gives an `LLM`, shut down at the end; a message says that it is being loaded, and is cleared by the caller.

    Raises:
        ValueError: A wrong argument, or a model that cannot be loaded.
    """
    name = engine_args.get("model") or "the default model"
    status.show(f"loading {name} and compiling (a first start takes longer) ...")
    try:
        from jaxengine.llm import LLM

        llm = LLM(**engine_args)
    except BaseException:
        status.clear()
        raise
    with llm:
        yield llm


@dataclass
class Statistics:
    """Counts and times of a command's requests, on `time.perf_counter`'s clock.

    Attributes:
        started: When the first prompt was added.
        first_token: When the first token arrived; None before.
        num_prompt_tokens: Tokens of all prompts.
        num_output_tokens: Tokens generated.
    """

    started: float
    first_token: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        """Counts the tokens of one DELTA output."""
        self.num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        if self.first_token is None and self.num_output_tokens:
            self.first_token = time.perf_counter()

    def line(self) -> str:
        """Returns one line for people. The rate is that of decoding: what came after the first token."""
        now = time.perf_counter()
        text = f"{self.num_prompt_tokens} tokens in, {self.num_output_tokens} out in {now - self.started:.2f} s"
        if self.first_token is None:
            return text
        text += f"; first token after {self.first_token - self.started:.2f} s"
        if self.num_output_tokens > 1:
            text += f", then {(self.num_output_tokens - 1) / max(now - self.first_token, 1e-9):.1f} tokens/s"
        return text


def completions_json(output: RequestOutput) -> list[dict[str, Any]]:
    """Returns a request's completions as JSON objects; log probabilities only where they were asked for."""
    found = []
    for completion in output.outputs:
        entry: dict[str, Any] = {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            entry["cumulative_logprob"] = completion.cumulative_logprob
            entry["logprobs"] = logprobs_json(completion.logprobs)
        found.append(entry)
    return found


def logprobs_json(positions: Sequence[TokenLogprobDict | None]) -> list[dict[str, Any] | None]:
    """Returns the log probabilities as JSON: one object a position, by token id; null where there is none."""
    return [
        position if position is None else {str(token): value._asdict() for token, value in position.items()}
        for position in positions
    ]
