"""One request as the engine sees it: what was asked, and how far it has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxengine.sampling_params import SamplingParams
    from jaxengine.structured.grammar import Grammar


class RequestStatus(enum.Enum):
    """Where a request stands: (label, finish reason of its output). A finished state is final.

    Attributes:
        finish_reason: "stop", "length", "abort" or "error"; None while unfinished.
        is_finished: Whether the state is final.
    """

    WAITING = "waiting", None
    RUNNING = "running", None
    PREEMPTED = "preempted", None  # waits again: its pages were taken, its tokens will be computed anew
    FINISHED_STOPPED = "finished_stopped", "stop"
    FINISHED_LENGTH = "finished_length", "length"
    FINISHED_ABORTED = "finished_aborted", "abort"
    FINISHED_ERROR = "finished_error", "error"

    def __init__(self, label: str, finish_reason: str | None) -> None:
        self.label = label
        self.finish_reason = finish_reason
        self.is_finished = finish_reason is not None  # plain attributes: read for every row of every step


@dataclass(eq=False)  # compared and hashed by identity
class Request:
    """A prompt to continue, and its state.

    Attributes:
        max_tokens: Output tokens at most (resolved: never None).
        stop_token_ids: Tokens that end the output: EOS, unless ignored, and `sampling_params.stop_token_ids`.
        priority: Lower runs first; read by the "priority" policy only.
        arrival_time: Seconds on any clock; breaks ties between equal priorities.
        cache_salt: Requests share cached pages only with requests of the same salt.
        extra_keys: Whatever else changes the keys and values of the same tokens (LoRA id, image hashes). Mixed into the
            block hashes through `repr`, so it must be made of ints, strings and bytes.
        grammar: What the output must match, see `jaxengine.structured.grammar`; None for anything.

    The fields below them are written by the scheduler only, and the last five by the KV cache:
        num_computed_tokens: Tokens whose keys and values are computed by the steps scheduled so far.
        num_pending_tokens: Tokens sampled on the device that the host does not know yet: those of the steps that have
            been scheduled and not updated. Before a request ends there can be more of them than it may have.
        slot: Row of the device state while running, else -1.
        num_cached_tokens: Prompt tokens found in the prefix cache when the request first ran.
        scheduled_time: When it first ran: `time.time()`; 0.0 before.
        stop_reason: The stop token of `sampling_params.stop_token_ids`, or the stop string, that ended the output; None
            for EOS.
        all_token_ids: Prompt and known output tokens: read only.
        max_total_tokens: Prompt and output tokens at most, all limits taken together.
        sort_key: The request's place in the scheduler's queues; smaller goes first.
        block_hashes: Chained hashes of the full blocks of `all_token_ids`, as far as they were needed.
        page_ids: Of each cache group, the request's pages in the order of its tokens. The lists only grow; a request
            that has given its pages back gets new ones.
        num_dropped_pages: Of each group, how many of them, from the first on, it has given back already.
        num_page_tokens: Tokens that all groups have had pages for.
        num_named_blocks: Blocks of tokens, from the first on, whose pages can be found by their hash.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str | None = None
    extra_keys: tuple = ()
    grammar: Grammar | None = None

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    slot: int = -1
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    stop_reason: int | str | None = None
    scheduled_time: float = 0.0

    all_token_ids: list[int] = field(init=False, repr=False)
    max_total_tokens: int = field(init=False, repr=False)
    sort_key: tuple = field(init=False, repr=False, default=())
    block_hashes: list[bytes] = field(init=False, repr=False, default_factory=list)
    page_ids: list[list[int]] = field(init=False, repr=False, default_factory=list)
    num_dropped_pages: list[int] = field(init=False, repr=False, default_factory=list)
    num_page_tokens: int = field(init=False, repr=False, default=0)
    num_named_blocks: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        self.all_token_ids = self.prompt_token_ids + self.output_token_ids
        self.max_total_tokens = len(self.prompt_token_ids) + self.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known to the host."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known to the host."""
        return len(self.all_token_ids)
