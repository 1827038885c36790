"""Calls of tools and reasoning through the real client, written by a model that follows scripts."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from jaxengine.loading.chat_template import read_template
from jaxengine.server.state import ServerSettings
from tests.server.scripted import SCRIPTS


def tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "description": "x", "parameters": {"default": None}}}


TOOLS = [tool("weather"), tool("clock")]
CALLS = [("weather", {"city": "Paris", "days": 2}), ("clock", {})]
USER: Any = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def client(scripted_server) -> Iterator[OpenAI]:
    with scripted_server.client() as client:
        yield client


def ask(client: OpenAI, script: str, **fields: Any) -> Any:
    """Has a script written."""
    extra = {"chat_template_kwargs": {"script": script}} | fields.pop("extra_body", {})
    options: dict[str, Any] = {"tools": TOOLS, "messages": USER, "temperature": 0, "max_tokens": 100} | fields
    return client.chat.completions.create(model="scripted", extra_body=extra, **options)


def calls(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_calls_and_reasoning(client):
    (choice,) = ask(client, "call").choices
    message = choice.message
    assert choice.finish_reason == "tool_calls"
    assert message.content == "Let me see."
    assert message.reasoning == message.reasoning_content == "I must look."
    assert calls(message) == CALLS
    assert len({call.id for call in message.tool_calls}) == 2


def test_streams_add_up(client):
    message = ask(client, "call").choices[0].message
    added: dict[str, str] = {"content": "", "reasoning": "", "reasoning_content": ""}
    functions: dict[int, list[str]] = {}
    reasons, pieces = [], []
    for chunk in ask(client, "call", stream=True):
        (choice,) = chunk.choices
        for name in added:
            added[name] += getattr(choice.delta, name, None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id is not None:  # a call begins
                assert (call.index, call.type, call.function.arguments) == (len(functions), "function", "")
                functions[call.index] = [call.function.name, ""]
            else:
                assert (call.index, call.type, call.function.name) == (len(functions) - 1, None, None)
                pieces.append(call.function.arguments)
                functions[call.index][1] += pieces[-1]
        reasons.append(choice.finish_reason)
    assert added == {"content": message.content} | dict.fromkeys(("reasoning", "reasoning_content"), message.reasoning)
    assert functions == {i: [call.function.name, call.function.arguments] for i, call in enumerate(message.tool_calls)}
    assert pieces == ['{"city": "Par', 'is", "days": 2}', "{}"]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


def test_the_clients_own_stream_accumulates_calls(client):
    strict = [tool("weather"), tool("clock")]
    for item in strict:
        item["function"] |= {"strict": True}
    extra = {"chat_template_kwargs": {"script": "call"}}
    with client.chat.completions.stream(
        model="scripted", messages=USER, tools=strict, temperature=0, extra_body=extra
    ) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len([delta for delta in deltas if delta]) == 3
    assert calls(message) == CALLS
    assert [call.function.parsed_arguments for call in message.tool_calls] == [arguments for _, arguments in CALLS]


def test_what_must_have_a_form_is_no_reasoning(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes"]}}}
    thinking = {"chat_template": "{{ messages[0].content }}<think>"}
    (choice,) = ask(client, "text", tools=None, response_format=form, extra_body=thinking).choices
    assert json.loads(choice.message.content) == "yes"


def test_a_malformed_call_is_content(client):
    (choice,) = ask(client, "broken").choices
    assert choice.message.content == "".join(SCRIPTS["broken"])
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(client, "broken", stream=True)]
    assert "".join(streamed) == choice.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_are_cut_short(client, stream):
    """Before their arguments they are left out; later they have the beginning of those."""

    def told(max_tokens: int) -> tuple[str | None, str | None, str]:
        answer = ask(client, "call", max_tokens=max_tokens, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        messages = [choice.delta if stream else choice.message for choice in choices]
        functions = [call.function for message in messages for call in message.tool_calls or []]
        content = "".join(message.content or "" for message in messages)
        return choices[-1].finish_reason, content, "".join(function.arguments for function in functions)

    assert told(9) == ("length", "Let me see.", "")
    assert told(10) == ("length", "Let me see.", '{"city": "Par')
    assert told(13) == ("length", "Let me see.", '{"city": "Paris", "days": 2}{}')


def test_reasoning_that_is_cut_short(client):
    (choice,) = ask(client, "call", max_tokens=2).choices
    assert (choice.message.content, choice.message.reasoning) == (None, "I must")


def test_one_call_at_a_time(client):
    assert calls(ask(client, "call", parallel_tool_calls=False).choices[0].message) == CALLS[:1]


def test_without_tools_calls_are_text(client):
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        (choice,) = ask(client, "broken", **fields).choices
        assert choice.message.content == "".join(SCRIPTS["broken"])
        (choice,) = ask(client, "call", **fields).choices
        assert choice.message.content.startswith("Let me see.\n<tool_call>")
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_can_be_forced(client, stream):
    """Whatever the model would have written, with parameters as the schema has them."""
    referring = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"]}
    referring |= {"$defs": {"place": {"enum": ["here", "there"]}}, "additionalProperties": False}
    schemas = {"go": referring, "halt": {"type": "object", "properties": {}, "additionalProperties": False}}
    tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in schemas.items()]
    named = {"type": "function", "function": {"name": "go"}}
    fields = {"tools": tools, "temperature": 1.0, "max_tokens": 400}
    for choice, names in ((named, {"go"}), ("required", set(schemas))):
        options = fields | {"tool_choice": choice, "parallel_tool_calls": False, "stream": stream}
        answer = ask(client, "text", seed=1, **options)
        if stream:
            deltas = [chunk.choices[0] for chunk in answer if chunk.choices]
            found = [call for choice in deltas for call in choice.delta.tool_calls or []]
            reasons, content = [choice.finish_reason for choice in deltas], [choice.delta.content for choice in deltas]
            assert (reasons[-1], "".join(filter(None, content))) == ("tool_calls", "")
        else:
            assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
            found = answer.choices[0].message.tool_calls
        call, *more = found
        assert call.function.name in names
        assert bool(more) == stream
        arguments = "".join(piece.function.arguments for piece in found)
        if call.function.name == "go":
            assert json.loads(arguments)["at"] in ("here", "there")


def test_forced_calls_refer_to_what_their_own_tool_defines(client):
    """Tools may call different things by one name, refer to themselves, and take nothing at all."""
    values = {"a": "one", "b": "two"}
    for called in values:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {"x": {"$ref": "#/$defs/x"}, "again": {"$ref": "#/properties/x"}},
                        "required": ["x", "again"],
                        "additionalProperties": False,
                        "$defs": {"x": {"const": value}},
                    },
                },
            }
            for name, value in values.items()
        ]
        named = {"type": "function", "function": {"name": called}}
        message = ask(client, "text", tools=tools, tool_choice=named).choices[0].message
        assert calls(message) == [(called, {"x": values[called], "again": values[called]})]
    for more in ({}, {"parameters": {}}, {"parameters": None}):
        tools = [{"type": "function", "function": {"name": "clock", **more}}]
        assert calls(ask(client, "text", tools=tools, tool_choice="required").choices[0].message)[0] == ("clock", {})


def test_forced_calls_that_do_not_fit(client):
    with pytest.raises(BadRequestError, match="a form of its own"):
        ask(client, "text", tool_choice="required", response_format={"type": "json_object"})


def test_answers_of_tools_go_back(client, scripted_server):
    """What the client was told it can send back, with the answers."""
    asked = ask(client, "call").choices[0].message
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in asked.tool_calls]
    messages = [*USER, asked, *answers]
    assert ask(client, "text", messages=messages).choices[0].message.content == "The weather is fine."
    body = {"messages": [*USER, asked.model_dump(), *answers], "tools": TOOLS[:1]}
    ids = scripted_server.post("/tokenize", body).json()["tokens"]
    prompt = scripted_server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    shown = json.dumps(TOOLS[0])
    said = "<assistant>I must look.Let me see.weather(Paris)clock()"
    assert prompt == f"{shown}<user>How is the weather?{said}<tool>sunny<tool>sunny<|text|>"


def test_a_request_may_bring_a_template(client, scripted_server):
    body = {"messages": USER, "chat_template": "{{ messages[0].content }}!"}
    ids = scripted_server.post("/tokenize", body).json()["tokens"]
    assert scripted_server.post("/detokenize", {"tokens": ids}).json()["prompt"] == USER[0]["content"] + "!"
    with pytest.raises(BadRequestError, match="chat template"):
        ask(client, "text", extra_body={"chat_template": "{% for"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_call_parser": "hermit"}, "tool_call_parser='hermit': must be one of hermes, "),
        ({"reasoning_parser": "none"}, "reasoning_parser='none': must be one of deepseek_r1, "),
        ({"enable_auto_tool_choice": True}, "needs tool_call_parser"),
        ({"response_store_size": -1}, "at least 0"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings(served_model_names=("x",), **fields)


def test_wrong_template_files(tmp_path):
    (tmp_path / "half.jinja").write_text("{% for m in messages %}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff")
    for name, message in (("none", "No such file"), ("half", "Unexpected end of template"), ("binary", "utf-8")):
        path = str(tmp_path / f"{name}.jinja")
        with pytest.raises(ValueError, match=f"chat_template='{path}'.*{message}"):
            read_template(path)
