"""Fields of bodies with too many values, too long ones, wrong ones, and numbers that are none."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from typing import Any

from tests.server.hostile.table import (
    USER,
    Attack,
    Post,
    chat,
    completion,
    detokenize,
    responses,
    table,
    tokenize,
)

VOCAB = 261
MANY = 1_000_000
FULL_BIAS = {str(i): 1.0 for i in range(VOCAB)}
STOPS_100000 = [f"{i:05x}" for i in range(100_000)]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
Make = Callable[[], Post]


def with_value(endpoint: Callable[..., Post], field: str, make: Callable[[], Any]) -> Make:
    return lambda: endpoint(**{field: make()})


ONE_TOKEN: dict[str, Make] = {
    **{f"prompt_logprobs_{k}": (lambda k=k: completion(prompt="H", prompt_logprobs=k)) for k in (0, 1, 20)},
    **{f"echo_{k}": (lambda k=k: completion(prompt="H", echo=True, logprobs=k)) for k in (0, 1, 20)},
    "of_ids": lambda: completion(prompt=[70], prompt_logprobs=1),
    "of_the_end": lambda: completion(prompt=[1], prompt_logprobs=1, echo=True),
    "several": lambda: completion(prompt=["H", "i", "Hello"], prompt_logprobs=2),
    "children": lambda: completion(prompt="H", n=5, temperature=1, prompt_logprobs=1),
    "prompt_only": lambda: completion(prompt="H", echo=True, logprobs=1, max_tokens=0),
    "streamed": lambda: completion(prompt="H", echo=True, logprobs=1, stream=True),
    "truncated": lambda: completion(prompt="Hello", truncate_prompt_tokens=1, prompt_logprobs=1),
    "structured": lambda: completion(prompt="H", prompt_logprobs=1, structured_outputs={"regex": "a+"}),
    "chat": lambda: chat(chat_template="x", prompt_logprobs=1, logprobs=True, top_logprobs=1),
}
WRONG_ENTRIES: dict[str, Any] = {
    "numbers": 1,
    "objects": {},
    "lists": [],
    "texts": "",
    "nulls": None,
    "types": {"type": "x"},
    "roles": {"role": 5},
}
LISTS: dict[str, tuple[Callable[..., Post], str]] = {
    "messages": (chat, "messages"),
    "input": (responses, "input"),
    "tools": (chat, "tools"),
    "prompt": (completion, "prompt"),
    "tokens": (detokenize, "tokens"),
    "response_tools": (responses, "tools"),
    "stop": (completion, "stop"),
    "stop_token_ids": (completion, "stop_token_ids"),
    "bad_words": (completion, "bad_words"),
    "allowed_token_ids": (completion, "allowed_token_ids"),
}
VALIDATION: dict[str, Make] = {
    **{
        f"{place}_of_{name}": with_value(endpoint, field, lambda value=value: [value] * MANY)
        for place, (endpoint, field) in LISTS.items()
        for name, value in WRONG_ENTRIES.items()
        if place in ("messages", "input", "tools", "prompt") or name in ("numbers", "nulls")
        if not (place in ("stop_token_ids", "allowed_token_ids", "tokens") and name == "numbers")
    },
    "content_parts": lambda: chat(messages=[{"role": "user", "content": [{"type": "image"}] * 800_000}]),
    "tool_calls": lambda: chat(messages=[{"role": "assistant", "tool_calls": [5] * MANY}]),
    "input_parts": lambda: responses(input=[{"role": "user", "content": [{"type": "x"}] * MANY}]),
    "reasoning_parts": lambda: responses(input=[{"type": "reasoning", "content": [{"type": "x"}] * MANY}]),
    "metadata": lambda: responses(metadata={f"m{i}": i for i in range(700_000)}),
    "logit_bias": lambda: completion(logit_bias={f"m{i}": "x" for i in range(700_000)}),
    "unknown_fields": lambda: completion(**{f"f{i}": i for i in range(700_000)}),
    "unknown_in_tool": lambda: chat(tools=[TOOL | {f"f{i}": i for i in range(700_000)}]),
    "choices": lambda: completion(structured_outputs={"choice": [None] * MANY}),
    "lists_of_prompts": lambda: completion(prompt=[[""]] * MANY),
    "ids_of_texts": lambda: completion(prompt=[["x", 1]] * MANY),
    "one_wrong_id": lambda: completion(prompt=[5] * MANY + ["x"]),
}
STOPS: dict[str, Make] = {
    "100000": lambda: completion(stop=STOPS_100000, max_tokens=20),
    "1000000": lambda: completion(stop=[f"{i:x}" for i in range(MANY)], max_tokens=20),
    "the_same": lambda: completion(stop=["zz"] * MANY, max_tokens=20),
    "prefixes": lambda: completion(stop=["a" * i + "b" for i in range(5_000)], max_tokens=20),
    "of_one_megabyte": lambda: completion(stop=[c * MANY for c in string.ascii_letters[:14]], max_tokens=20),
    "of_ten_megabytes": lambda: completion(stop="a" * 10_000_000 + "b", prompt="a" * 400, max_tokens=20),
    "streamed": lambda: completion(stop=STOPS_100000, stream=True, max_tokens=20),
    "chat": lambda: chat(stop=STOPS_100000, stream=True, max_tokens=20),
    "responses": lambda: responses(stop=STOPS_100000),
    "children": lambda: completion(stop=STOPS_100000, n=1000, temperature=1),
    "prompts": lambda: completion(stop=STOPS_100000[:20_000], prompt=["Hi"] * 1000),
    "empty_ones": lambda: completion(stop=[""] * MANY),
    "ids": lambda: completion(stop_token_ids=list(range(VOCAB)) * 10_000),
    "ids_wrong": lambda: completion(stop_token_ids=[2**31 - 1] * MANY),
    "bad_words": lambda: completion(bad_words=[f"{i:x}" for i in range(MANY)]),
    "bad_words_long": lambda: completion(bad_words=["a" * 5_000_000] * 3),
    "bad_words_children": lambda: completion(bad_words=[f"{i:x}" for i in range(900)], n=1000, temperature=1),
}
LONG: dict[str, Callable[[], str]] = {
    "letters": lambda: "a" * 15_000_000,
    "spaces": lambda: " " * 15_000_000,
    "words": lambda: "word " * 3_000_000,
    "nulls": lambda: "\0" * 2_500_000,
    "chinese": lambda: "\u4e2d" * 2_500_000,
    "emoji": lambda: "\U0001f600" * 1_250_000,
    "specials": lambda: "<|end|>" * 2_000_000,
    "combining": lambda: "e" + "\u0301" * 2_500_000,
}
PLACES: dict[str, Callable[[str], Post]] = {
    "prompt": lambda text: completion(prompt=text),
    "prompts": lambda text: completion(prompt=["Hi", text]),
    "truncated": lambda text: completion(prompt=text, truncate_prompt_tokens=5),
    "message": lambda text: chat(messages=[{"role": "user", "content": text}]),
    "tokenize": lambda text: tokenize(prompt=text),
    "input": lambda text: responses(input=text),
    "instructions": lambda text: responses(instructions=text),
    "cache_salt": lambda text: completion(cache_salt=text),
    "model": lambda text: completion(model=text),
    "user": lambda text: completion(user=text),
    "role": lambda text: chat(messages=[{"role": text, "content": "x"}]),
    "tool": lambda text: chat(tools=[{"type": "function", "function": {"name": "f", "description": text}}]),
}
PROMPTS: dict[str, Make] = {
    **{f"{place}_of_letters": (lambda put=put: put("a" * 15_000_000)) for place, put in PLACES.items()},
    **{f"prompt_of_{name}": (lambda make=make: PLACES["prompt"](make())) for name, make in LONG.items()},
    **{f"tokenize_{name}": (lambda make=make: PLACES["tokenize"](make())) for name, make in LONG.items()},
    "ids": lambda: completion(prompt=[70] * 4_000_000),
    "messages": lambda: chat(messages=USER * 400_000),
    "parts": lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 450_000}]),
    "small_parts": lambda: chat(messages=[{"role": "user", "content": ["a"] * 3_000_000}]),
    "items": lambda: responses(input=[{"role": "user", "content": "x"}] * 400_000),
    "calls": lambda: responses(
        input=[{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}] * 180_000
    ),
    "outputs": lambda: responses(input=[{"type": "function_call_output", "call_id": "x", "output": "x"}] * 200_000),
    "tools": lambda: chat(tools=[TOOL] * 100_000),
    "tools_forced": lambda: chat(tools=[TOOL] * 100_000, tool_choice="required"),
    "arguments": lambda: chat(messages=[*USER, _called('{"a": ' + "[" * 5_000_000)]),
    "arguments_long": lambda: chat(messages=[*USER, _called(json.dumps({"a": "x" * 7_000_000}))]),
    "strings_of_tokens": lambda: tokenize(prompt="a" * 15_000_000, return_token_strs=True),
    "detokenize": lambda: detokenize(tokens=[70] * 4_000_000),
    "detokenize_negative": lambda: detokenize(tokens=[-1] * 3_000_000),
    "detokenize_huge": lambda: detokenize(tokens=[10**400]),
}


def _called(arguments: str) -> dict[str, Any]:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


HOT: dict[str, Any] = {"n": 1000, "temperature": 1.0}
BATCHES: dict[str, Make] = {
    "prompts_1000": lambda: completion(prompt=["Hi"] * 1000),
    "prompts_100000": lambda: completion(prompt=["Hi"] * 100_000),
    "prompts_3000000": lambda: completion(prompt=["a"] * 3_000_000),
    "prompts_of_ids": lambda: completion(prompt=[[70]] * 2_000_000),
    "prompts_too_long": lambda: completion(prompt=["a" * 14_000] * 1000),
    "prompts_one_too_long": lambda: completion(prompt=["a" * 900] * 900 + ["a" * 5_000]),
    "prompts_children": lambda: completion(prompt=["Hi"] * 1000, **HOT),
    "n_1000": lambda: completion(**HOT),
    "n_2_31": lambda: completion(n=2**31 - 1, temperature=1),
    "n_streamed": lambda: completion(**HOT, stream=True, logprobs=20),
    "n_long_prompt": lambda: completion(**HOT, prompt="a" * 950),
    "n_bias": lambda: completion(**HOT, logit_bias=FULL_BIAS),
    "n_allowed": lambda: completion(**HOT, allowed_token_ids=list(range(VOCAB))),
    "n_prompt_logprobs": lambda: completion(**HOT, prompt="a" * 900, prompt_logprobs=20),
    "n_grammar": lambda: completion(**HOT, structured_outputs={"regex": "(a|b)*a(a|b){12}"}),
    "n_schema_large": lambda: completion(
        **HOT, structured_outputs={"json": {"enum": [f"{i:06d}" for i in range(9999)]}}
    ),
    "prompts_grammar": lambda: completion(prompt=["Hi"] * 1000, structured_outputs={"regex": ".*a.{9}"}),
    "prompts_bias": lambda: completion(prompt=["Hi"] * 1000, logit_bias=FULL_BIAS, bad_words=["x", "yy", "zzz"] * 100),
    "prompts_echo": lambda: completion(prompt=["a" * 500] * 1000, echo=True, logprobs=20, max_tokens=1),
    "prompts_streamed": lambda: completion(prompt=["Hi"] * 1000, stream=True, logprobs=5),
}
BIASES: dict[str, Make] = {
    "full": lambda: completion(logit_bias=FULL_BIAS),
    "full_many_ways": lambda: completion(logit_bias={f"{' ' * j}{i}": 1 for i in range(VOCAB) for j in range(300)}),
    "huge_key": lambda: completion(logit_bias={"1" * 5_000_000: 1}),
    **{
        f"key_{name}": (lambda key=key: completion(logit_bias={key: 1}))
        for name, key in {"signed": "+5", "float": "1e2", "negative": "-1", "arabic": "\u0661", "under": "1_0"}.items()
    },
    **{
        f"value_{name}": (lambda value=value: completion(logit_bias={"5": value}))
        for name, value in {"nan": math.nan, "infinity": math.inf, "huge": 1e308, "integer": 10**400}.items()
    },
    "all_forbidden": lambda: completion(logit_bias=dict.fromkeys(FULL_BIAS, -100)),
    "allowed_many": lambda: completion(allowed_token_ids=list(range(VOCAB)) * 10_000),
    "allowed_none": lambda: completion(allowed_token_ids=[]),
    "allowed_forbidden": lambda: completion(allowed_token_ids=[5], bad_words=["!"], logit_bias={"5": -100}),
    "allowed_against_grammar": lambda: completion(allowed_token_ids=[5], structured_outputs={"regex": "[a-z]+"}),
}
NUMERIC = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "priority"),
)
NUMBERS: dict[str, Make] = {
    f"{field}_{name}": (lambda field=field, value=value: completion(**{field: value}))
    for number, field in enumerate(NUMERIC)
    for name, value in {
        "nan": math.nan,
        "infinity": -math.inf,
        "huge": 10**400,
        "negative_huge": -(2**63),
        "float": 1e308,
        "tiny": 5e-324,
        "minus": -1,
    }.items()
    if (number + len(name)) % 2 or field in ("temperature", "seed")
}
UNKNOWN_ID = "resp_" + "0" * 32
RESPONSES: dict[str, Make] = {
    "unknown": lambda: responses(previous_response_id=UNKNOWN_ID),
    "unknown_long": lambda: responses(previous_response_id="a" * 15_000_000),
    "unknown_surrogate": lambda: responses(previous_response_id="\ud800"),
    "get_long": lambda: Post("/v1/responses/" + "a" * 50_000, b"", method="GET"),
    "get_odd": lambda: Post("/v1/responses/%00%ff%ED%A0%80", b"", method="GET"),
    "delete_unknown": lambda: Post(f"/v1/responses/{UNKNOWN_ID}", b"", method="DELETE"),
    "cancel_unknown": lambda: Post(f"/v1/responses/{UNKNOWN_ID}/cancel", b"{}"),
    "stored_large": lambda: responses(input="x", metadata={f"m{i}": "x" * 100 for i in range(100_000)}),
    "metadata_long": lambda: responses(metadata={"a": "x" * 15_000_000}),
    "encrypted": lambda: responses(input=[{"type": "reasoning", "encrypted_content": "x" * 10_000_000}]),
    "annotations": lambda: responses(
        input=[{"role": "user", "content": [{"type": "input_text", "text": "x", "annotations": [[]] * 3_000_000}]}]
    ),
    "summary": lambda: responses(input=[{"type": "reasoning", "summary": [{}] * 3_000_000, "content": []}]),
    "calls_without_end": lambda: responses(
        input=[{"type": "function_call", "call_id": "x", "name": "f", "arguments": "["}] * 1_000
    ),
}

ATTACKS: list[Attack] = [
    *table("one_token", ONE_TOKEN),
    *table("validation", VALIDATION),
    *table("stops", STOPS),
    *table("prompts", PROMPTS),
    *table("batches", BATCHES),
    *table("biases", BIASES),
    *table("values", NUMBERS),
    *table("stored", RESPONSES),
]
