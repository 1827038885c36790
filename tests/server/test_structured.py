"""Structured output, through the real OpenAI client."""

import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel

USER: Any = [{"role": "user", "content": "Hello"}]
BRIEF = {"disable_any_whitespace": True}


class Pet(BaseModel):
    """What the model is to describe."""

    kind: Literal["cat", "dög"]
    good: bool


def test_parsed_chat_answers(client):
    # Hot: the tiny model would repeat itself for ever, if only with spaces.
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=USER, response_format=Pet, temperature=20.0, seed=seed, max_tokens=400
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Pet)


HOT: dict[str, Any] = {"model": "tiny", "input": "Hello", "temperature": 20.0, "max_output_tokens": 400}


def test_parsed_responses(client):
    schema = client.responses.parse(text_format=Pet, extra_body={"seed": 0}, **HOT)
    assert isinstance(schema.output_parsed, Pet)
    told = schema.text.format
    assert (told.type, told.name, told.strict) == ("json_schema", "Pet", True)
    assert told.schema_["required"] == ["kind", "good"]
    with client.responses.stream(text_format=Pet, extra_body={"seed": 0}, **HOT) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == schema.output_text
    assert final.output_parsed == schema.output_parsed
    assert final.text == schema.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "json_schema", "name": "x", "schema": {"enum": [1, "two"]}, "description": "d"}, r'\s*(1|"two")'),
        ({"type": "json_object"}, r"\s*\{.*"),
        ({"type": "text"}, ".*"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_formats_of_responses(client, form, pattern, stream):
    answer = client.responses.create(text={"format": form}, stream=stream, **HOT | {"temperature": 0.0})
    if stream:
        events = list(answer)
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        answer = events[-1].response
        assert deltas == answer.output_text
    assert re.fullmatch(pattern, answer.output_text, re.DOTALL)
    assert answer.text.format.model_dump(by_alias=True, exclude_none=True) == form


def test_a_json_object(client):
    params: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 0.0, "max_tokens": 200}
    answer = client.chat.completions.create(model="tiny", messages=USER, **params)
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"choice": ["yes", "nö"]}, "yes|nö"),
        ({"regex": r"[a-c]{2,4}-x"}, r"[a-c]{2,4}-x"),
        ({"grammar": 'root ::= "<" ("a" | "b") ("," "c")? ">"'}, "<[ab](,c)?>"),
        ({"json": {"enum": [1, "two", None]}} | BRIEF, '1|"two"|null'),
    ],
    ids=str,
)
def test_completions(client, options, pattern):
    params: dict[str, Any] = {
        "temperature": 1.0,
        "max_tokens": 100,
        "n": 3,
        "extra_body": {"structured_outputs": options},
    }
    answer = client.completions.create(model="tiny", prompt="Hello", **params)
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    chunks = list(client.completions.create(model="tiny", prompt="Hello", stream=True, **params))
    for index in range(3):
        assert re.fullmatch(pattern, "".join(c.choices[0].text for c in chunks if c.choices[0].index == index))


def test_others_do_not_notice(client):
    params: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    alone = client.completions.create(model="tiny", prompt="Hello", **params).choices[0].text
    stream = client.completions.create(
        model="tiny",
        prompt="Hello",
        max_tokens=400,
        stream=True,
        temperature=1.0,
        extra_body={"structured_outputs": {"regex": "[a-z]{300}"}},
    )
    chunks = [next(stream)]
    assert client.completions.create(model="tiny", prompt="Hello", **params).choices[0].text == alone
    chunks += stream
    assert re.fullmatch("[a-z]{300}", "".join(chunk.choices[0].text for chunk in chunks))
