"""One request as the engine sees it: what was asked, and how far it has come."""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from jaxengine.messages import quote
from jaxengine.sampling_params import SamplingParams


class Grammar(NamedTuple):
    """A grammar that is known to be right.

    Attributes:
        text: In llguidance's own form, see `jaxengine.structured.grammar`.
        num_bytes: Memory that it takes when it is compiled.
    """

    text: str
    num_bytes: int


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


def _plain_keys(keys: Iterable[Any]) -> tuple:
    """Returns keys as they are before they are sent, which makes lists of tuples.

    Raises:
        ValueError: `repr` would not tell them apart.
    """
    for key in keys:
        if not isinstance(key, (tuple, list)) and type(key) not in (int, str, bytes):
            raise ValueError(f"extra_keys: {quote(key)}: must be made of ints, strings, bytes and tuples of them")
    return tuple(_plain_keys(key) if isinstance(key, (tuple, list)) else key for key in keys)


class RequestSpec(msgspec.Struct, eq=False, array_like=True):
    """What a caller asks for one prompt, with everything resolved. It is sent to the core's process as it is.

    Compared and hashed by identity.

    Attributes:
        request_id: The id the caller knows.
        prompt_token_ids: The prompt, truncated if that was asked for.
        sampling_params: `n` says how many completions are wanted; see `completions`.
        max_tokens: Output tokens of each at most (resolved: never None).
        stop_token_ids: Tokens that end the output: EOS, unless ignored, and `sampling_params.stop_token_ids`.
        priority: Lower runs first; read by the "priority" policy only.
        arrival_time: Seconds on any clock; breaks ties between equal priorities.
        cache_salt: Requests share cached pages only with requests of the same salt.
        extra_keys: Whatever else changes the keys and values of the same tokens (LoRA id, image hashes): ints, strings,
            bytes, and tuples of them. Mixed into the block hashes through `repr`.
        grammar: What the output must match; None for anything.

    Raises:
        ValueError: `extra_keys` holds something else.
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

    def __post_init__(self) -> None:
        self.extra_keys = _plain_keys(self.extra_keys)

    def completions(self) -> list[RequestSpec]:
        """Returns what is asked of each of the `n` completions; they share all lists and dicts.

        The completions of `n > 1` are called "0_<request_id>", "1_<request_id>", ..., and completion `i` has seed
        `seed + i`. Log probabilities of the prompt, which all have in common, are asked of the first.
        """
        params = self.sampling_params
        if params.n == 1:
            return [self]
        specs = []
        for index in range(params.n):
            own = copy.copy(params)
            own.n = 1
            own.seed = None if params.seed is None else params.seed + index
            own.prompt_logprobs = params.prompt_logprobs if index == 0 else None
            spec = copy.copy(self)
            spec.request_id, spec.sampling_params = f"{index}_{self.request_id}", own
            specs.append(spec)
        return specs


class Request(RequestSpec, eq=False):
    """One completion that is asked for, and its state. Never sent: each side makes its own of the same spec.

    The fields beside those of its spec are written by the scheduler only, and the last five by the KV cache:
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

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = []
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    slot: int = -1
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    stop_reason: int | str | None = None
    scheduled_time: float = 0.0

    all_token_ids: list[int] = []
    max_total_tokens: int = 0
    sort_key: tuple = ()
    block_hashes: list[bytes] = []
    page_ids: list[list[int]] = []
    num_dropped_pages: list[int] = []
    num_page_tokens: int = 0
    num_named_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.all_token_ids = self.prompt_token_ids + self.output_token_ids
        self.max_total_tokens = len(self.prompt_token_ids) + self.max_tokens

    @classmethod
    def of(cls, spec: RequestSpec) -> Request:
        """Returns a new request of a completion's spec."""
        return cls(*(getattr(spec, name) for name in RequestSpec.__struct_fields__))

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
