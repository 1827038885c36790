"""What the front and the core send each other comes as it was sent, and what cannot be read names its request."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine import wire
from jaxengine.engine.output_processor import SampledUpdate, TokenLogprobs
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import SamplingParams


def make_request() -> Request:
    return Request("r", [1, 2], SamplingParams(), max_tokens=4)


def draw_logprobs(shape: tuple[int, int]) -> TokenLogprobs:
    rng = np.random.default_rng(sum(shape))
    ids, ranks = rng.integers(0, 2**31 - 1, shape), rng.integers(0, 2**31 - 1, shape[0])
    return TokenLogprobs(ids.astype(np.int32), rng.normal(size=shape).astype(np.float32), ranks.astype(np.int32))


def sent(update: SampledUpdate) -> SampledUpdate:
    step = wire.Step([msgspec.Raw(wire.encode(wire.Update.of(7, update)))], [])
    received = wire.decode_to_front(wire.encode(step))
    assert isinstance(received, wire.Step)
    (data,) = received.updates
    assert wire.key_of(data, place=0) == 7
    return wire.decode_update(data).apply(make_request())


@given(
    rows=st.integers(0, 3),
    columns=st.integers(1, 4),
    prompt_rows=st.none() | st.integers(0, 3),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=3),
    status=st.sampled_from([None, *(status for status in RequestStatus if status.is_finished)]),
)
def test_updates_come_as_they_were_sent(rows, columns, prompt_rows, tokens, status):
    """Whatever the shapes: a prompt of one token has log probabilities of none."""
    request = make_request()
    if status is not None:
        request.status, request.stop_reason = status, 5
    prompt = None if prompt_rows is None else draw_logprobs((prompt_rows, columns))
    update = SampledUpdate(request, tokens, status is not None, draw_logprobs((rows, columns)), prompt)
    got = sent(update)
    assert list(got.new_token_ids) == tokens
    assert got.finished == update.finished
    if status is not None:
        assert (got.request.status, got.request.stop_reason) == (status, 5)
    for one, other in ((got.logprobs, update.logprobs), (got.prompt_logprobs, update.prompt_logprobs)):
        assert (one is None) == (other is None)
        for a, b in zip(one or (), other or (), strict=True):
            assert a.shape == b.shape
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x05", wire.encode(["x", "y"]), wire.encode({"a": 1})])
def test_what_names_no_request_has_no_key(data):
    assert wire.key_of(data, place=0) is None
    assert wire.key_of(data, place=1) is None


def test_a_message_that_cannot_be_read_names_its_request():
    data = wire.encode(["Add", 12, "r", "these should be ids"])
    with pytest.raises(msgspec.DecodeError):
        wire.decode_to_core(data)
    assert wire.key_of(data, place=1) == 12
    assert wire.key_of(wire.encode(["Add", [12, 13], 5]), place=1) == 12
