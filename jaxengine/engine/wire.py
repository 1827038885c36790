"""What the front and the core process tell each other: msgpack, one message a ZeroMQ frame."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from jaxengine.config import ModelLimits
from jaxengine.engine.output_processor import SampledUpdate, TokenLogprobs
from jaxengine.metrics import Metric
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.grammar import Grammar

NOT_SENT = {
    *("n", "seed", "stop", "bad_words", "bad_words_token_ids", "max_tokens", "truncate_prompt_tokens"),
    *("output_kind", "logits_processors", "extra_args", "structured_outputs"),
}
"""Fields of `SamplingParams` that the front alone reads, that cannot be sent, or that are sent in another form."""


class Add(msgspec.Struct, tag=True, array_like=True):
    """Front to core: queue the completions of a request, which differ in their ids and seeds only.

    Log probabilities of the prompt are computed with the first of them.

    Attributes:
        keys: Name each of them in all later messages; never used again, unlike a caller's id.
        sampling_params: Fields that differ from their defaults, but for the seed.
        bad_words_token_ids: See `SamplingParams`.
    """

    keys: list[int]
    request_ids: list[str]
    seeds: list[int | None]
    prompt_token_ids: list[int]
    sampling_params: dict[str, Any]
    bad_words_token_ids: list[list[int]]
    max_tokens: int
    stop_token_ids: list[int]
    priority: int
    arrival_time: float
    cache_salt: str | None
    grammar: Grammar | None

    @classmethod
    def of(cls, keys: list[int], requests: Sequence[Request]) -> Add:
        """Makes the message of the completions of a request."""
        request = requests[0]
        params = request.sampling_params
        return cls(
            keys,
            [request.request_id for request in requests],
            [request.sampling_params.seed for request in requests],
            request.prompt_token_ids,
            {name: value for name in _SENT if (value := getattr(params, name)) != _DEFAULTS[name]},
            params.bad_words_token_ids or [],
            request.max_tokens,
            list(request.stop_token_ids),
            request.priority,
            request.arrival_time,
            request.cache_salt,
            request.grammar,
        )

    def requests(self) -> list[Request]:
        """Makes the requests anew, on the other side. Their parameters share lists and dicts."""
        shared = SamplingParams(**self.sampling_params, max_tokens=None)
        shared.bad_words_token_ids = self.bad_words_token_ids
        stop_token_ids = frozenset(self.stop_token_ids)
        requests = []
        for index, (request_id, seed) in enumerate(zip(self.request_ids, self.seeds, strict=True)):
            params = copy.copy(shared)
            params.seed = seed
            params.prompt_logprobs = shared.prompt_logprobs if index == 0 else None
            requests.append(
                Request(
                    request_id=request_id,
                    prompt_token_ids=self.prompt_token_ids,
                    sampling_params=params,
                    max_tokens=self.max_tokens,
                    stop_token_ids=stop_token_ids,
                    priority=self.priority,
                    arrival_time=self.arrival_time,
                    cache_salt=self.cache_salt,
                    grammar=self.grammar,
                )
            )
        return requests


_SENT = [field.name for field in dataclasses.fields(SamplingParams) if field.name not in NOT_SENT]
_DEFAULTS = vars(SamplingParams())


class Finish(msgspec.Struct, tag=True, array_like=True):
    """Front to core: end a request, which may have ended already. `status` names a `RequestStatus`."""

    key: int
    status: str


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    """Front to core: end the process."""


class Ping(msgspec.Struct, tag=True, array_like=True):
    """Front to core, and back between two steps: a core that steps and takes messages is alive."""


class Rows(msgspec.Struct, array_like=True):
    """A `TokenLogprobs` as bytes. Its shape goes with it: a prompt of one token has no rows."""

    shape: tuple[int, int]
    token_ids: bytes
    logprobs: bytes
    ranks: bytes

    @classmethod
    def of(cls, values: TokenLogprobs) -> Rows:
        """Makes the message of some log probabilities."""
        return cls(
            (len(values.ranks), values.token_ids.shape[1]),
            values.token_ids.astype(np.int32).tobytes(),
            values.logprobs.astype(np.float32).tobytes(),
            values.ranks.astype(np.int32).tobytes(),
        )

    def values(self) -> TokenLogprobs:
        """Returns the log probabilities; views of the message."""
        return TokenLogprobs(
            np.frombuffer(self.token_ids, np.int32).reshape(self.shape),
            np.frombuffer(self.logprobs, np.float32).reshape(self.shape),
            np.frombuffer(self.ranks, np.int32),
        )


class Update(msgspec.Struct, array_like=True):
    """What one step gave one request: a `SampledUpdate`, and the fields of its `Request` that outputs tell of."""

    key: int
    new_token_ids: list[int]
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    status: str | None = None  # names a finished `RequestStatus`
    stop_reason: int | None = None
    logprobs: Rows | None = None
    prompt_logprobs: Rows | None = None
    scheduled_time: float = 0.0

    @classmethod
    def of(cls, key: int, update: SampledUpdate) -> Update:
        """Makes the message of what a request has gained."""
        request = update.request
        # A stop string is the front's business: the core's reasons are tokens.
        reason = request.stop_reason if isinstance(request.stop_reason, int) else None
        return cls(
            key,
            list(update.new_token_ids),
            request.num_cached_tokens,
            request.num_preemptions,
            request.status.name if update.finished else None,
            reason,
            None if update.logprobs is None else Rows.of(update.logprobs),
            None if update.prompt_logprobs is None else Rows.of(update.prompt_logprobs),
            request.scheduled_time,
        )

    def apply(self, request: Request) -> SampledUpdate:
        """Brings the front's copy of the request up to date."""
        request.num_cached_tokens = self.num_cached_tokens
        request.num_preemptions = self.num_preemptions
        request.scheduled_time = self.scheduled_time
        if self.status is not None:
            request.status = RequestStatus[self.status]
            request.stop_reason = self.stop_reason
        return SampledUpdate(
            request,
            self.new_token_ids,
            self.status is not None,
            None if self.logprobs is None else self.logprobs.values(),
            None if self.prompt_logprobs is None else self.prompt_logprobs.values(),
        )


class Ready(msgspec.Struct, tag=True, array_like=True):
    """Core to front: the model is loaded and requests can run."""

    limits: ModelLimits


class Step(msgspec.Struct, tag=True, array_like=True):
    """Core to front: what a step gave.

    Attributes:
        updates: An `Update` for each request that gained something, each encoded by itself: one that cannot be read
            costs its own request.
        metrics: The core's metrics after it.
    """

    updates: list[msgspec.Raw]
    metrics: list[Metric]


class Refused(msgspec.Struct, tag=True, array_like=True):
    """Core to front: a request cannot run, and why."""

    key: int
    message: str


class Failed(msgspec.Struct, tag=True, array_like=True):
    """Core to front: the last message of a core that could not start, or that broke down.

    Attributes:
        message: What happened.
        is_users: Whether an argument or a file is wrong, so that a user can mend it.
    """

    message: str
    is_users: bool = False


ToCore = Add | Finish | Shutdown | Ping
ToFront = Ready | Step | Refused | Failed | Ping

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
decode_update = msgspec.msgpack.Decoder(Update).decode


def key_of(data: bytes | msgspec.Raw, place: int) -> int | None:
    """Finds the key of the request that a message is about, even if nothing else in it can be read.

    Args:
        data: An encoded array.
        place: Where the key, or the list of those of a request's completions, stands in it.

    Returns:
        The key, or the first; None if there is none.
    """
    try:
        found = msgspec.msgpack.decode(data)[place]
        key = found[0] if isinstance(found, list) else found
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        return None
    return key if isinstance(key, int) else None
