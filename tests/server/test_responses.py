"""/v1/responses through the real client, written by a model that follows scripts."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from jaxengine.server.response_store import ResponseStore
from jaxengine.server.responses_protocol import ITEMS, chat_messages
from tests.server.scripted import SCRIPTS

TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True}
    for name in ("weather", "clock")
]
RANDOM: dict[str, Any] = {"temperature": 1.5, "extra_body": {"seed": 5, "ignore_eos": True}, "max_output_tokens": 16}


@pytest.fixture(scope="module")
def client(scripted_server) -> Iterator[OpenAI]:
    with scripted_server.client() as client:
        yield client


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A text format."""
    return {"type": "json_schema", "name": "x", "schema": schema}


def ask(client: OpenAI, script: str, **fields: Any) -> Any:
    """Has a script written."""
    extra = {"chat_template_kwargs": {"script": script}}
    return client.responses.create(model="scripted", extra_body=extra, **{"input": "Hi", "temperature": 0} | fields)


def test_text(client):
    answer = ask(client, "text", instructions="Be brief.", metadata={"a": "b"})
    assert (answer.object, answer.status, answer.output_text) == ("response", "completed", "The weather is fine.")
    assert [item.type for item in answer.output] == ["message"]
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"a": "b"}, 0)
    prompt = "<system>Be brief.<user>Hi"
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(prompt) + 1, len(SCRIPTS["text"]) + 1)
    assert (usage.total_tokens, usage.output_tokens_details.reasoning_tokens) == (usage.input_tokens + 5, 0)


def test_events(client):
    events = list(ask(client, "call", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    text = ["output_item.added", "content_part.added", "delta", "done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]

    def once(name: str) -> list[str]:
        return [kind if kind not in ("delta", "done") else f"{name}.{kind}" for kind in text]

    told = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    expected = ["created", "in_progress", *once("reasoning_text"), *once("output_text"), *call, *call, "completed"]
    assert told == expected
    assert kinds.count("reasoning_text.delta") > 1
    assert kinds.count("function_call_arguments.delta") == 3
    last = events[-1].response
    for i, item in enumerate(last.output):
        own = [event for event in events if getattr(event, "output_index", None) == i]
        assert own[-1].item == item
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
        done = [event.arguments for event in own if event.type == "response.function_call_arguments.done"]
        assert done == ([item.arguments] if item.type == "function_call" else [])
        assert {getattr(event, "item_id", item.id) for event in own} == {item.id}
    assert [item.type for item in last.output] == ["reasoning", "message", "function_call", "function_call"]
    assert last.output[0].content[0].text == "I must look."
    assert last.output_text == "Let me see."
    assert json.loads(last.output[2].arguments) == {"city": "Paris", "days": 2}
    assert last.usage.output_tokens_details.reasoning_tokens == 3


def test_the_clients_own_stream_accumulates_them(client):
    extra = {"chat_template_kwargs": {"script": "call"}}
    with client.responses.stream(model="scripted", input="Hi", temperature=0, tools=TOOLS, extra_body=extra) as stream:
        seen = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.output_text.delta" in seen
    whole = ask(client, "call", tools=TOOLS)
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output_text == whole.output_text == "Let me see."


def test_an_answer_can_be_gone_on_from(client, scripted_server):
    first = ask(client, "call", input="Hi", instructions="Only now.", tools=TOOLS)
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"} for item in first.output[2:]
    ]
    second = ask(client, "text", input=outputs, previous_response_id=first.id)
    said = "<user>Hi<assistant>I must look.Let me see.weather(Paris)clock()<tool>sunny<tool>sunny"
    # A prompt's tokens are bytes, and the texts that scripts share with it.
    body = {"prompt": said + "<|text|>"}
    num_tokens = scripted_server.post("/tokenize", body).json()["count"]
    assert second.usage.input_tokens == num_tokens
    assert second.previous_response_id == first.id
    # The same without the store: the client sends everything again.
    everything: Any = [{"role": "user", "content": "Hi"}, *first.output, *outputs]
    assert ask(client, "text", input=everything).usage.input_tokens == num_tokens
    third = ask(client, "text", input="And?", previous_response_id=second.id)
    assert third.usage.input_tokens > num_tokens + len("<assistant><user>And?")


def test_stored_answers(client):
    answer = ask(client, "text")
    assert client.responses.retrieve(answer.id) == answer
    with pytest.raises(BadRequestError, match="has ended"):
        client.responses.cancel(answer.id)
    with pytest.raises(BadRequestError, match="stream"):
        list(client.responses.retrieve(answer.id, stream=True))
    client.responses.delete(answer.id)
    unstored = ask(client, "text", store=False)
    for response_id in (answer.id, unstored.id):
        with pytest.raises(NotFoundError):
            client.responses.retrieve(response_id)
    with pytest.raises(BadRequestError) as caught:
        ask(client, "text", previous_response_id=answer.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_the_store_has_an_end():
    store = ResponseStore(100)
    for i in range(5):
        store.put(str(i), {"text": "x" * 30})
    assert [i for i in range(5) if store.get(str(i))] == [3, 4]
    store.put("large", {"text": "x" * 200})
    assert store.get("large") is None
    assert store.get("4") == {"text": "x" * 30}
    assert [store.delete("4"), store.delete("4")] == [True, False]


def test_an_answer_that_is_cut_short(client):
    answer = ask(client, "text", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output_text, answer.output[0].status) == ("The weather", "incomplete")
    *_, last = ask(client, "text", max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete"
    for num_tokens, statuses in ((10, ["incomplete"]), (11, ["completed"]), (13, ["completed", "completed"])):
        whole = ask(client, "call", max_output_tokens=num_tokens, tools=TOOLS)
        *_, last = ask(client, "call", max_output_tokens=num_tokens, tools=TOOLS, stream=True)
        found = [[item for item in r.output if item.type == "function_call"] for r in (whole, last.response)]
        assert [[item.status for item in items] for items in found] == [statuses, statuses]
        assert [item.arguments for item in found[0]] == [item.arguments for item in found[1]]
    assert "".join(item.arguments for item in found[0]) == '{"city": "Paris", "days": 2}{}'


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": 5}, "input", "list"),
        ({"input": [{"role": "pope", "content": "x"}]}, "input", "'user'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"type": ["x"]}]}, "input", "message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_text"),
        ({"input": []}, "messages", "at least one"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": "x", "tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text", "'json_schema'"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "schema: Field required"),
        ({"input": "x", "text": {"format": {"type": "text", "name": "x"}}}, "text", "no such field"),
        ({"input": "x", "text": {"verbosity": "high"}}, "text", "'medium'"),
        ({"input": "x", "text": {"format": schema_format({"type": "x"})}}, "text.format.schema", "Invalid type"),
        ({"input": "x", "text": {"format": schema_format({"not": {}})}}, "text.format.schema", "not"),
        (
            {"input": "x", "text": {"format": {"type": "json_object"}}, "tools": TOOLS, "tool_choice": "required"},
            "tool_choice",
            "a form of its own",
        ),
        (
            {"input": "x", "tools": [TOOLS[0] | {"parameters": {"type": "x"}}], "tool_choice": "required"},
            "tools",
            "tools: Invalid type",
        ),
        ({"input": "x", "background": True}, "background", "not supported"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"input": "x", "top_p": 3}, "top_p", "(0, 1]"),
        ({"input": "x", "n": 2}, "n", "no such field"),
        ({"input": "x", "metadata": {"a": "\ud800"}}, None, "the body is not valid Unicode"),
        ({"input": "x", "chat_template": "\ud800"}, None, "the body is not valid Unicode"),
    ],
)
def test_wrong_bodies(scripted_server, body, param, message):
    data = json.dumps(body)  # httpx would refuse half a surrogate pair itself
    answer = scripted_server.post("/v1/responses", None, content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_items_become_messages():
    items = ITEMS.validate_python(
        [
            {"role": "developer", "content": "d"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"role": "assistant", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    )
    system, developer, first, second, third = chat_messages("s", items)
    assert system == {"role": "system", "content": "s"}
    assert developer["content"] == [{"type": "text", "text": "d"}]
    assert [call["function"]["name"] for call in first["tool_calls"]] == ["f", "g"]
    assert (second["reasoning_content"], second["content"][0]["text"]) == ("r", "b")
    assert third["content"][0]["text"] == "c"
