"""What the scheduler says of a step, and of the tokens that it gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxengine.request import Request


@dataclass(slots=True, eq=False)  # not frozen, which would make it four times slower to build: hundreds a step
class ScheduledSequence:
    """One request's share of a step. Not changed after it is made.

    Attributes:
        start: Tokens computed before this step: the position of the first new token.
        num_new_tokens: Tokens to compute: `start .. start + num_new_tokens - 1`.
        samples: Whether the step reaches the request's last token, so that a token is sampled from its last row.
        slot: Row of the device state that belongs to the request.
        new_in_slot: First step since the request took the slot: the row must be initialised.
        token_on_device: The one input token is the pending one: it is read from the device state, not from the host.
        page_ids: Of each cache group, pages covering all tokens that the batch's steps compute. The request's live
            lists: they may grow when the next batch is scheduled, but entries never change. Those of pages that none of
            the new tokens sees mean nothing.
        num_output_tokens: Output tokens, known and pending, before this step samples.
    """

    request: Request
    start: int
    num_new_tokens: int
    samples: bool
    slot: int
    new_in_slot: bool
    token_on_device: bool
    page_ids: Sequence[Sequence[int]]
    num_output_tokens: int


@dataclass(frozen=True)
class ScheduledBatch:
    """One step: `sequences`, those with exactly one new token first.

    Attributes:
        num_tokens: New tokens of all sequences.
        num_decodes: Sequences with exactly one new token.
        num_steps: How often the step is run; more than once only if all sequences decode. Each time they have one token
            more, the one sampled the time before.
    """

    sequences: list[ScheduledSequence]
    num_tokens: int
    num_decodes: int
    num_steps: int = 1

    @property
    def decode_only(self) -> bool:
        """Whether every sequence has exactly one new token."""
        return self.num_decodes == len(self.sequences)


@dataclass(slots=True)
class TokenUpdate:
    """Tokens that a request has gained.

    Attributes:
        finished: Whether they ended it; `request.status` says why.
        index: The request's row in `batch.sequences`.
    """

    request: Request
    new_token_ids: list[int]
    finished: bool
    index: int
