"""What the front and the core send each other comes as it was sent, and what cannot be read names its request."""

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine import wire
from jaxengine.engine.output_processor import SampledUpdate, TokenLogprobs
from jaxengine.request import Grammar, Request, RequestSpec, RequestStatus
from jaxengine.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams


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


SPEC: dict[str, Any] = {
    "request_id": "r é",
    "prompt_token_ids": [1, 2**31 - 1],
    "max_tokens": 9,
    "stop_token_ids": frozenset({3, 4}),
    "priority": -2,
    "arrival_time": 1e9 + 0.25,
    "cache_salt": "salt",
    "extra_keys": (7, "adapter", b"\x00\xff", ("nested", (1,))),
    "grammar": Grammar("start: 'x'", 99),
}
PARAMS: dict[str, Any] = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.5,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": -(2**62),
    "stop": ["stop"],
    "stop_token_ids": [3],
    "bad_words": ["bad"],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "max_tokens": 77,
    "min_tokens": 2,
    "logprobs": 3,
    "prompt_logprobs": 1,
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "logits_processors": [abs],
    "truncate_prompt_tokens": 5,
    "output_kind": RequestOutputKind.DELTA,
    "logit_bias": {5: 1.5},
    "allowed_token_ids": [5, 6],
    "extra_args": {"anything": object()},
    "skip_reading_prefix_cache": True,
    "structured_outputs": StructuredOutputsParams(regex="x"),
    "bad_words_token_ids": [[8, 9]],
}


def make_spec() -> RequestSpec:
    """A spec whose every field, and its parameters', has another value than its default."""
    params = SamplingParams()
    vars(params).update(PARAMS)
    return RequestSpec(sampling_params=params, **SPEC)


def test_every_field_of_a_spec_survives_the_wire():
    """Of what is new, too: a field that this test gives no value fails it."""
    spec = make_spec()
    message = wire.decode_to_core(wire.encode(wire.Add.of([1, 2], make_spec())))
    assert isinstance(message, wire.Add)
    for field in msgspec.structs.fields(RequestSpec):
        value = getattr(message.spec, field.name)
        assert getattr(spec, field.name) != field.default, f"{field.name}: give it a value in SPEC"
        if field.name != "sampling_params":
            assert value == getattr(spec, field.name), field.name
            assert type(value) is type(getattr(spec, field.name)), field.name
    sent, defaults = message.spec.sampling_params, SamplingParams()
    assert set(PARAMS) == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, value in PARAMS.items():
        assert PARAMS[name] != getattr(defaults, name), f"{name}: give it another value in PARAMS"
        assert getattr(sent, name) == wire.FRONT_ONLY.get(name, value), name


def test_both_sides_make_the_same_completions():
    spec = make_spec()
    message = wire.decode_to_core(wire.encode(wire.Add.of([1, 2], spec)))
    assert isinstance(message, wire.Add)
    ours, theirs = [Request.of(own) for own in spec.completions()], message.requests()
    assert [request.request_id for request in theirs] == ["0_r é", "1_r é"]
    for one, other in zip(ours, theirs, strict=True):
        for name in SPEC:
            assert getattr(one, name) == getattr(other, name), name
        for name in ("n", "seed", "prompt_logprobs"):
            assert getattr(one.sampling_params, name) == getattr(other.sampling_params, name), name
    assert len({request.sampling_params.seed for request in theirs}) == 2
    assert [request.sampling_params.prompt_logprobs for request in theirs] == [1, None]


@pytest.mark.parametrize("key", [1.5, None, True, (1.5,), ["a", [None]]])
def test_extra_keys_are_plain(key):
    with pytest.raises(ValueError, match="extra_keys"):
        RequestSpec("r", [1], SamplingParams(), 5, extra_keys=("a", key))
