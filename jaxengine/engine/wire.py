"""What the front and the core process tell each other: msgpack, one message a ZeroMQ frame, and one frame an array."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 and the like by name once this is imported
import msgspec
import numpy as np

from jaxengine.config import ModelLimits
from jaxengine.engine.calls import EngineStateError
from jaxengine.engine.output_processor import SampledUpdate, TokenLogprobs
from jaxengine.metrics import Metric
from jaxengine.request import Request, RequestSpec, RequestStatus

FRONT_ONLY: dict[str, Any] = {
    "stop": [],
    "bad_words": [],
    "max_tokens": None,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "logits_processors": None,
    "extra_args": None,
}
"""Fields of `SamplingParams` that the front alone reads, or that cannot be sent, and what is sent in their place."""


class Add(msgspec.Struct, tag=True, array_like=True):
    """Front to core: queue the completions of a request.

    Attributes:
        keys: Name each of them in all later messages; never used again, unlike a caller's id.
        spec: What is asked.
    """

    keys: list[int]
    spec: RequestSpec

    @classmethod
    def of(cls, keys: list[int], spec: RequestSpec) -> Add:
        """Makes the message, without what the core has no use for."""
        sent = copy.copy(spec)
        sent.sampling_params = copy.copy(spec.sampling_params)
        vars(sent.sampling_params).update(FRONT_ONLY)
        return cls(keys, sent)

    def requests(self) -> list[Request]:
        """Makes the core's own requests. Their parameters share lists and dicts."""
        return [Request.of(spec) for spec in self.spec.completions()]


class Finish(msgspec.Struct, tag=True, array_like=True):
    """Front to core: end a request, which may have ended already. `status` names a `RequestStatus`."""

    key: int
    status: str


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    """Front to core: end the process."""


class Ping(msgspec.Struct, tag=True, array_like=True):
    """Front to core, and back between two steps: a core that steps and takes messages is alive."""


class Call(msgspec.Struct, tag=True, array_like=True):
    """Front to core: do something beside requests. A `Result` answers it.

    Attributes:
        id: Names the call in its result.
        method: A name of the core's table; see `jaxengine.engine.controls`.
        args: Its arguments. Arrays among them travel as frames of their own; see `encode_frames`.
        kwargs: Its arguments by name, likewise.
    """

    id: int
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Result(msgspec.Struct, tag=True, array_like=True):
    """Core to front: what a call has returned, or raised.

    Attributes:
        id: The call's.
        value: What it has returned.
        error: What it has raised: a name of `ERRORS`, and the message.
    """

    id: int
    value: Any = None
    error: tuple[str, str] | None = None

    @classmethod
    def of_error(cls, call_id: int, method: str, error: Exception) -> Result:
        """Makes the result of a call that has failed."""
        for name, kind in ERRORS.items():
            if isinstance(error, kind):
                return cls(call_id, error=(name, str(error)))
        return cls(call_id, error=("failed", f"{method} has failed: {type(error).__name__}: {error}"))

    def get(self) -> Any:
        """Returns the value, or raises the error; one that is of no kind of `ERRORS` as RuntimeError."""
        if self.error is None:
            return self.value
        name, message = self.error
        raise ERRORS.get(name, RuntimeError)(message)


ERRORS: dict[str, type[Exception]] = {"value": ValueError, "state": EngineStateError}
"""Errors that keep their kind on the way to the front."""


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


ToCore = Add | Finish | Call | Shutdown | Ping
ToFront = Ready | Step | Refused | Result | Failed | Ping

encode = msgspec.msgpack.Encoder().encode
_decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
decode_update = msgspec.msgpack.Decoder(Update).decode


ARRAY = 1
"""msgpack's code for an array that travels in a frame of its own."""


def encode_frames(message: Call) -> list[Any]:
    """Encodes a call whose arguments may hold NumPy arrays, which are not copied.

    Returns:
        The message, and the bytes of each array.
    """
    frames: list[Any] = []

    def extract(value: Any) -> msgspec.msgpack.Ext:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"{type(value).__name__} cannot be sent to another process")
        frames.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return msgspec.msgpack.Ext(ARRAY, encode((len(frames) - 1, value.dtype.name, value.shape)))

    try:
        return [msgspec.msgpack.Encoder(enc_hook=extract).encode(message), *frames]
    except (NotImplementedError, OverflowError, TypeError) as error:
        raise ValueError(f"{message.method}: {error}") from error


def decode_to_core(data: bytes, frames: Sequence[Any] = ()) -> ToCore:
    """Decodes a message, with the frames that have come with it; arrays share their memory."""
    if not frames:
        return _decode_to_core(data)

    def insert(code: int, description: memoryview) -> np.ndarray:
        index, dtype, shape = msgspec.msgpack.decode(description, type=tuple[int, str, list[int]])
        return np.frombuffer(frames[index], np.dtype(dtype)).reshape(shape)

    return msgspec.msgpack.Decoder(ToCore, ext_hook=insert).decode(data)


def call_id_of(data: bytes) -> int | None:
    """Returns the id of a call that cannot be read; None if it is none."""
    try:
        tag, call_id = msgspec.msgpack.decode(data)[:2]
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        return None
    return call_id if tag == Call.__name__ and isinstance(call_id, int) else None


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
