"""The grammars of running requests: how far each output has come, and which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxengine.request import Request
from jaxengine.scheduler.batch import ScheduledBatch
from jaxengine.structured.grammar import GrammarCompiler

if TYPE_CHECKING:
    from llguidance import LLMatcher


STEP_SECONDS = 0.3
"""CPU time that the grammars of one step may take: all others wait for it."""
EASY_SECONDS = 0.002
"""A mask that takes so long is not to blame for a step that takes longer."""


class TokenMasks(NamedTuple):
    """What the grammars allow next, for the sequences of a batch.

    Attributes:
        bitmask: i32[S, ceil(V / 32)], bit `i % 32` of word `i / 32` is set where token `i` may come; all bits for
            sequences without a grammar.
        is_complete: bool[S], where nothing may come but the end of the output.
    """

    bitmask: np.ndarray
    is_complete: np.ndarray


class Matchers:
    """One matcher a request, kept on the host: it follows the tokens that are kept, however often they are computed."""

    def __init__(self, compiler: GrammarCompiler):
        self._compiler = compiler
        self._matchers: dict[Request, LLMatcher] = {}

    def begin(self, request: Request) -> None:
        """Makes the matcher of a request that has been queued, if it has a grammar."""
        if request.grammar is not None:
            self._matchers[request] = self._compiler.matcher(request.grammar)

    def advance(self, request: Request, token_ids: Sequence[int]) -> bool:
        """Takes tokens that a request has gained; False if its grammar does not allow them."""
        matcher = self._matchers[request]
        return all(
            (token_id in request.stop_token_ids and matcher.is_accepting()) or matcher.consume_token(token_id)
            for token_id in token_ids
        )

    def has_ended(self, request: Request, token_ids: Sequence[int]) -> bool:
        """Returns whether tokens that were taken end the output: nothing may follow, whatever else asks for more."""
        ends = {*request.stop_token_ids, *self._compiler.tokenizer.eos_tokens}
        matcher = self._matchers[request]
        return bool(token_ids) and token_ids[-1] in ends and (matcher.is_stopped() or matcher.is_accepting())

    def forget(self, request: Request) -> None:
        """Drops the matcher of a request that has ended; it may have none."""
        self._matchers.pop(request, None)

    def masks(self, batch: ScheduledBatch) -> tuple[TokenMasks, dict[Request, str]]:
        """Computes the masks of a batch whose earlier tokens are all known.

        Returns:
            The masks, in the order of `batch.sequences`; and the requests whose grammar has become too complex, which
            must end, with the reasons.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bitmask = allocate_token_bitmask(len(batch.sequences), self._compiler.tokenizer.vocab_size)
        is_complete = np.zeros(len(bitmask), bool)
        rows = [
            (row, sequence.request)
            for row, sequence in enumerate(batch.sequences)
            if sequence.samples and sequence.request.grammar is not None and not sequence.request.status.is_finished
        ]
        failed: dict[Request, str] = {}
        left = STEP_SECONDS
        for row, request in rows:
            matcher = self._matchers[request]
            # One by one: handing some 10 us of work to llguidance's threads takes longer than to do it.
            started = time.thread_time()
            fill_next_token_bitmask(matcher, bitmask, row)
            taken = time.thread_time() - started
            left -= taken
            if left < 0 and taken > EASY_SECONDS:
                failed[request] = "the grammar takes too long to say which tokens may come next"
            elif matcher.is_error():
                failed[request] = matcher.get_error()
            elif matcher.is_accepting():
                is_complete[row] = not _allow_stops(bitmask[row], request, self._compiler.tokenizer.eos_tokens)
        return TokenMasks(bitmask, is_complete), failed


def _allow_stops(words: np.ndarray, request: Request, eos_token_ids: Sequence[int]) -> bool:
    """Sets the bits of a request's own stop tokens, which no grammar knows; returns whether others are left."""
    bits = words.view(np.uint32)
    for token_id in request.stop_token_ids:
        bits[token_id // 32] |= np.uint32(1 << token_id % 32)
    others = bits.copy()
    for token_id in (*request.stop_token_ids, *eos_token_ids):
        others[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return bool(others.any())
