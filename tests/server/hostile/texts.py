"""Bodies that are no JSON, or JSON of unusual depth, and text that is no Unicode."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.server.hostile.table import USER, Attack, Post, body, chat, completion, responses, table, tokenize

LONE = "a\ud800b"
SCHEMA = '{"type": "object", "properties": {"a": %s}}'
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")


def _call(**fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"} | {key: fields[key] for key in fields if key in ("name", "arguments")}
    call = {"id": "x", "type": "function", "function": function} | {key: fields[key] for key in fields if key == "id"}
    return {"role": "assistant", "content": "x", "tool_calls": [call]}


def _tool(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}} | fields}]


def _format(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}} | fields}


def _text_format(**fields: Any) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}} | fields}


SURROGATES: dict[str, Callable[[], Post]] = {
    **{
        f"completion_{field}": (lambda field=field, value=value: completion(**{field: value}))
        for field, value in {
            "prompt": LONE,
            "model": LONE,
            "stop": [LONE],
            "bad_words": [LONE],
            "cache_salt": LONE,
            "suffix": LONE,
            "user": LONE,
            LONE: 1,
            "logit_bias": {LONE: 1},
        }.items()
    },
    "completion_prompts": lambda: completion(prompt=["Hi", LONE]),
    "completion_stop_text": lambda: completion(stop="\udfff"),
    "completion_bad_word_start": lambda: completion(bad_words=["\udfff"], n=3, temperature=1),
    **{
        f"structured_{field}": (lambda field=field, value=value: completion(structured_outputs={field: value}))
        for field, value in {
            "regex": LONE,
            "choice": ["a", LONE],
            "grammar": f'start: "{LONE}"',
            "json": f'{{"const": "{LONE}"}}',
            LONE: 1,
        }.items()
    },
    "structured_whitespace": lambda: completion(structured_outputs={"json": {}, "whitespace_pattern": LONE}),
    **{
        f"schema_{name}": (lambda schema=schema: chat(response_format=_format(schema=schema)))
        for name, schema in {
            "const": {"const": LONE},
            "enum": {"enum": [LONE]},
            "pattern": {"type": "string", "pattern": LONE},
            "key": {LONE: 1},
            "property": {"properties": {LONE: {}}},
            "ref": {"$ref": f"#/{LONE}"},
            "format": {"type": "string", "format": LONE},
            "title": {"title": LONE},
            "type": {"type": LONE},
        }.items()
    },
    "format_name": lambda: chat(response_format=_format(name=LONE)),
    "format_description": lambda: chat(response_format=_format(description=LONE)),
    "format_type": lambda: chat(response_format={"type": LONE}),
    "chat_content": lambda: chat(messages=[{"role": "user", "content": LONE}]),
    "chat_part": lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": LONE}]}]),
    "chat_part_type": lambda: chat(messages=[{"role": "user", "content": [{"type": LONE}]}]),
    "chat_role": lambda: chat(messages=[{"role": LONE, "content": "x"}]),
    "chat_key": lambda: chat(messages=[USER[0] | {LONE: "x"}]),
    "chat_name": lambda: chat(messages=[USER[0] | {"name": LONE}]),
    "chat_stop": lambda: chat(stop=[LONE], stream=True),
    "call_id": lambda: chat(messages=[*USER, _call(id=LONE)]),
    "call_name": lambda: chat(messages=[*USER, _call(name=LONE)]),
    "call_arguments": lambda: chat(messages=[*USER, _call(arguments=json.dumps({"city": LONE}))]),
    "call_arguments_raw": lambda: chat(messages=[*USER, _call(arguments=LONE)]),
    "tool_name": lambda: chat(tools=_tool(name=LONE), tool_choice="required"),
    "tool_description": lambda: chat(tools=_tool(description=LONE)),
    "tool_schema": lambda: chat(tools=_tool(parameters={"properties": {LONE: {}}}), tool_choice="required"),
    "tool_defs": lambda: chat(tools=_tool(parameters={"$defs": {LONE: {}}}), tool_choice="required"),
    "tool_choice": lambda: chat(tools=_tool(), tool_choice={"type": "function", "function": {"name": LONE}}),
    "tool_choice_text": lambda: chat(tools=_tool(), tool_choice=LONE),
    "response_input": lambda: responses(input=LONE),
    "response_instructions": lambda: responses(instructions=LONE),
    "response_previous": lambda: responses(previous_response_id=LONE),
    "response_metadata": lambda: responses(metadata={LONE: LONE}),
    "response_item_id": lambda: responses(input=[{"id": LONE, "role": "user", "content": "x"}]),
    "response_item_type": lambda: responses(input=[{"type": LONE}]),
    "response_call": lambda: responses(
        input=[{"type": "function_call", "call_id": LONE, "name": LONE, "arguments": "{}"}]
    ),
    "response_output": lambda: responses(input=[{"type": "function_call_output", "call_id": LONE, "output": LONE}]),
    "response_annotations": lambda: responses(
        input=[{"role": "user", "content": [{"type": "input_text", "text": "x", "annotations": [LONE]}]}]
    ),
    "response_tool": lambda: responses(tools=[{"type": "function", "name": LONE, "description": LONE}]),
    "response_format_name": lambda: responses(text=_text_format(name=LONE)),
    "response_format_schema": lambda: responses(text=_text_format(schema={LONE: LONE})),
    "response_user": lambda: responses(user=LONE, safety_identifier=LONE),
    "tokenize_prompt": lambda: tokenize(prompt=LONE),
    "tokenize_messages": lambda: tokenize(messages=[{"role": "user", "content": LONE}], return_token_strs=True),
}


def _nested(depth: int, start: str = "[", end: str = "]", inner: str = "1") -> str:
    return start * depth + inner + end * depth


def at(field: str, text: str, path: str = "/v1/completions", **more: Any) -> Post:
    """A body with a field whose JSON is given as text."""
    rest = body({"prompt": "Hi", "max_tokens": 2} | more if "completions" in path else more).decode()
    return Post(path, f'{{"{field}": {text}, {rest[1:]}'.encode())


CHAT_PATH, RESPONSES_PATH = PATHS[1:3]
DEEP: dict[str, Callable[[], Post]] = {
    **{f"whole_{n}": (lambda n=n: Post(PATHS[0], _nested(n).encode())) for n in (1_000, 100_000, 8_000_000)},
    "whole_objects": lambda: Post(PATHS[0], _nested(2_000_000, '{"a":', "}").encode()),
    "open": lambda: Post(PATHS[0], b"[" * 16_000_000),
    "open_objects": lambda: Post(PATHS[1], b'{"a":' * 3_000_000),
    **{f"prompt_{n}": (lambda n=n: at("prompt", _nested(n))) for n in (900, 3_000, 1_000_000)},
    "unknown_field": lambda: at("x", _nested(3_000)),
    "ignored_field": lambda: at("user", _nested(3_000)),
    "unsupported_field": lambda: at("suffix", _nested(3_000)),
    "logit_bias": lambda: at("logit_bias", _nested(900, '{"5":', "}")),
    **{
        f"schema_{n}": (lambda n=n: at("structured_outputs", '{"json": ' + _nested(n, '{"items":', "}", "{}") + "}"))
        for n in (700, 1_400, 3_000, 100_000)
    },
    **{
        f"format_{n}": (
            lambda n=n: Post(
                CHAT_PATH,
                b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "response_format": {"type": '
                b'"json_schema", "json_schema": {"name": "x", "schema": '
                + _nested(n, '{"properties": {"a":', "}}", "{}").encode()
                + b"}}}",
            )
        )
        for n in (450, 700, 1_400, 50_000)
    },
    **{
        f"text_{n}": (lambda n=n: completion(structured_outputs={"json": _nested(n, '{"not":', "}", "{}")}))
        for n in (700, 1_400, 1_000_000)
    },
    "tool": lambda: Post(
        CHAT_PATH,
        b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required", "max_tokens": 2, "tools": [{'
        b'"type": "function", "function": {"name": "f", "parameters": '
        + _nested(1_400, '{"items":', "}", "{}").encode()
        + b"}}]}",
    ),
    "content": lambda: Post(
        CHAT_PATH, b'{"messages": [{"role": "user", "content": ' + _nested(1_400).encode() + b"}]}"
    ),
    "arguments": lambda: chat(messages=[*USER, _call(arguments=_nested(100_000))]),
    "arguments_objects": lambda: chat(messages=[*USER, _call(arguments=_nested(1_400, '{"city":', "}"))]),
    "template_kwargs": lambda: Post(
        CHAT_PATH,
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "chat_template_kwargs": {"a": '
        + _nested(1_400).encode()
        + b"}}",
    ),
    "annotations": lambda: Post(
        RESPONSES_PATH,
        b'{"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "annotations": [2, '
        + _nested(1_400).encode()
        + b"]}]}]}",
    ),
    "summary": lambda: Post(
        RESPONSES_PATH, b'{"input": [{"type": "reasoning", "summary": ' + _nested(1_400).encode() + b"}]}"
    ),
}
JSON = {"Content-Type": "application/json"}
NOT_JSON: dict[str, Callable[[], Post]] = {
    name: (lambda data=data: Post(PATHS[0], data))
    for name, data in {
        "empty": b"",
        "null": b"null",
        "number": b"1" * 1_000_000,
        "text": b'"x"',
        "half": b'{"prompt": "Hi',
        "rest": b'{"prompt": "Hi"} x',
        "twice": b'{"prompt": "a", "prompt": "Hi", "max_tokens": 1}',
        "no_utf8": b'{"prompt": "\xff\xfe"}',
        "surrogate_bytes": b'{"prompt": "\xed\xa0\x80"}',
        "null_byte": b'{"prompt": "\0"}',
        "bom": b'\xef\xbb\xbf{"prompt": "Hi", "max_tokens": 1}',
        "utf16": '{"prompt": "Hi"}'.encode("utf-16"),
        "utf32": '{"prompt": "Hi"}'.encode("utf-32"),
        "digits": b'{"prompt": "Hi", "seed": ' + b"9" * 5_000_000 + b"}",
        "digits_of_float": b'{"prompt": "Hi", "temperature": 0.' + b"9" * 5_000_000 + b"}",
        "exponent": b'{"prompt": "Hi", "temperature": 1e999999999999}',
        "minus": b'{"prompt": "Hi", "n": -}',
        "members": b"{" + b",".join(b'"a%d":0' % i for i in range(1_000_000)) + b"}",
        "same_members": b"{" + b'"prompt":"Hi",' * 1_000_000 + b'"max_tokens":1}',
        "escapes": b'{"prompt": "' + b"\\u0041" * 2_500_000 + b'"}',
        "spaces": b" " * 16_000_000 + b"{}",
        "commas": b"[" + b"," * 16_000_000,
        "values": b"[" + b"0," * 8_000_000 + b"0]",
        "empty_lists": b'{"prompt": [' + b"[]," * 5_000_000 + b"[]]}",
        "empty_objects": b'{"prompt": [' + b"{}," * 5_000_000 + b"{}]}",
    }.items()
}
CONTENT_TYPES: dict[str, Callable[[], Post]] = {
    name: (lambda value=value: Post(PATHS[0], body({"prompt": "Hi", "max_tokens": 1}), {"Content-Type": value}))
    for name, value in {
        "form": "application/x-www-form-urlencoded",
        "multipart": "multipart/form-data; boundary=x",
        "charset": "application/json; charset=utf-7",
        "long": "application/json;" + "a=b;" * 10_000,
        "no": "",
        "plus": "application/problem+json",
        "wrong": "///;;;",
    }.items()
}
WRONG_TYPES: dict[str, Callable[[], Post]] = {
    f"{path.strip('/').replace('/', '_')}_{name}": (lambda path=path, value=value: Post(path, body(value)))
    for path in PATHS
    for name, value in {"list": [[]], "number": 5, "no_fields": {}, "nulls": {"prompt": None, "messages": None}}.items()
}

ATTACKS: list[Attack] = [
    *table("surrogates", SURROGATES),
    *table("deep_json", DEEP),
    *table("not_json", NOT_JSON),
    *table("content_types", CONTENT_TYPES),
    *table("wrong_types", WRONG_TYPES),
]
