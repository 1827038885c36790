"""SamplingParams: vLLM's defaults and meanings, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from typing import Any

import numpy as np
import pytest

from jaxengine.sampling_params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ([], [], [])
    assert (params.logprobs, params.prompt_logprobs, params.truncate_prompt_tokens) == (None, None, None)
    assert (params.logit_bias, params.allowed_token_ids, params.extra_args) == (None, None, None)
    assert params.detokenize
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert not params.include_stop_str_in_output
    assert not params.ignore_eos
    assert params.logits_processors is None
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert not params.is_greedy


INVALID: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("n", 20_000),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("temperature", None),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", 1.5),
    ("seed", 2**63),
    ("stop", [""]),
    ("stop", ""),
    ("stop", 3),
    ("stop", ["a", 3]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [-1]),
    ("bad_words", [""]),
    ("bad_words", [" "]),
    ("bad_words", "word"),
    ("max_tokens", 0),
    ("max_tokens", 1.0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -2),
    ("prompt_logprobs", 1.5),
    ("detokenize", None),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("logits_processors", [3]),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("output_kind", "delta"),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [1.5]),
    ("extra_args", [1]),
    ("structured_outputs", "json"),
]


@pytest.mark.parametrize(("field", "value"), INVALID, ids=[f"{name}={value!r}" for name, value in INVALID])
def test_error_names_field_and_value(field, value):
    shown = value
    if isinstance(value, list) and value:
        shown = value[-1]
    elif isinstance(value, dict):
        (key, bias), *_ = value.items()
        shown = bias if math.isnan(bias) else key
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"(?s){field}.*{re.escape(repr(shown))}"):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json_object": False}, "got none"),
        ({"regex": "a", "choice": ["a"]}, r"got \['regex', 'choice'\]"),
        ({"regex": ""}, "regex must be a string"),
        ({"grammar": 3}, "grammar must be a string"),
        ({"choice": []}, "at least one"),
        ({"choice": "ab"}, "choice must be a list of strings"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": "[" * 100_000}, "json is no JSON"),
        ({"json": "3"}, "must be a JSON schema, an object, got '3'"),
        ({"json": [1]}, "must be a JSON schema"),
        ({"json_object": "yes"}, "json_object must be True"),
        ({"json": {}, "disable_any_whitespace": 1}, "True or False"),
        ({"regex": "a", "disable_additional_properties": True}, "for json and json_object only"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "exclude each other"),
    ],
)
def test_structured_outputs_are_one_form(fields, message):
    with pytest.raises(ValueError, match=f"structured_outputs.*{message}"):
        StructuredOutputsParams(**fields)


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # pyright: ignore[reportCallIssue]


def test_greedy_neutralises_the_rest():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    with pytest.raises(ValueError, match=r"n must be 1 .* n=2"):
        SamplingParams(temperature=0, n=2)
    with pytest.raises(ValueError, match=r"top_p .* 0"):
        SamplingParams(temperature=0, top_p=0)


def test_small_temperatures_are_raised_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=1e-3).temperature == 0.01
    assert "0.001" in caplog.text
    caplog.clear()
    SamplingParams(temperature=0)
    SamplingParams(temperature=0.01)
    assert not caplog.text


def test_fields_are_normalised():
    assert SamplingParams(top_k=-1).top_k == SamplingParams(top_k=0).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2
    assert SamplingParams(stop="a").stop == ["a"]
    assert SamplingParams(stop=["a", "b", "a"]).stop == ["a", "b"]
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == [3, 1]
    assert SamplingParams(bad_words=["a", "a"]).bad_words == ["a"]
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(logprobs=0).logprobs == 0
    assert SamplingParams(logprobs=False, prompt_logprobs=-1).logprobs is None
    assert SamplingParams(max_tokens=None, min_tokens=100).max_tokens is None
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), seed=np.int32(7))  # pyright: ignore
    assert [type(value) for value in (params.n, params.temperature, params.seed)] == [int, float, int]


def test_logit_bias_is_clamped():
    params = SamplingParams(logit_bias={1: 1000, "2": -math.inf, 3: 0.5})  # pyright: ignore[reportArgumentType]
    assert params.logit_bias == {1: 100.0, 2: -100.0, 3: 0.5}


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="a", detokenize=False)


def test_prompt_logprobs_do_not_read_the_prefix_cache():
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache
    assert not SamplingParams().skip_reading_prefix_cache
    assert SamplingParams(skip_reading_prefix_cache=True).skip_reading_prefix_cache


def test_clone_shares_nothing_that_changes():
    def processor(logits, state):
        return logits

    params = SamplingParams(
        stop=["a"], logit_bias={1: 1.0}, extra_args={"k": [1]}, logits_processors=[processor], bad_words=["b"]
    )
    params.bad_words_token_ids = [[1, 2]]
    copy = params.clone()
    assert copy == params
    assert copy.bad_words_token_ids == [[1, 2]]
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if isinstance(value, (list, dict)):
            assert getattr(copy, field.name) is not value
    assert copy.extra_args is not None
    copy.extra_args["k"].append(2)
    assert params.extra_args == {"k": [1]}
    assert copy.logits_processors == [processor]


def test_from_optional():
    assert SamplingParams.from_optional(temperature=None, n=None, top_p=0.5) == SamplingParams(top_p=0.5)
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    assert SamplingParams.from_optional().max_tokens == 16


def test_beam_search_params():
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    assert (params.ignore_eos, params.temperature, params.length_penalty) == (False, 0.0, 1.0)
    assert not params.include_stop_str_in_output
    for name, value in (("beam_width", 0), ("max_tokens", 0), ("temperature", -1.0), ("length_penalty", math.nan)):
        fields: dict[str, Any] = {"beam_width": 2, "max_tokens": 2} | {name: value}
        with pytest.raises(ValueError, match=name):
            BeamSearchParams(**fields)
