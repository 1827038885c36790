"""Bodies that are too much, and bodies drawn from the server's own models with values that nobody asks in earnest."""

import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from jaxengine.server.responses_protocol import ResponsesBody
from tests.server.test_fuzz import COMMON, shortened

USER = {"role": "user", "content": "x"}
JSON = {"Content-Type": "application/json"}
MANY = 100_000
TOOL = {"type": "function", "function": {"name": "f"}}


def raw(text: str, number: int, name: str = "prompt") -> bytes:
    """A field that is a list of very many of something."""
    return f'{{"{name}": [{", ".join([text] * number)}]}}'.encode()


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", raw("1", 1_000_000, "messages"), "messages.0: Input should be a valid dictionary"),
        ("chat/completions", {"messages": [USER] * 5000}, "messages: List should have at most 4096"),
        ("chat/completions", {"messages": [USER], "tools": [TOOL] * 600}, "tools: List should have at most 512"),
        ("responses", raw("1", 1_000_000, "input"), "input.0"),
        ("responses", {"input": [USER] * 5000}, "input: List should have at most 4096"),
        ("responses", {"input": [{**USER, "content": [{"type": "input_text", "text": "x"}] * 5000}]}, "at most 4096"),
        ("responses", {"input": "x", "metadata": {str(i): 1 for i in range(MANY - 10)}}, "metadata.0"),
        ("completions", {"prompt": "x", "stop": [str(i) for i in range(MANY)]}, "at most 1024"),
        ("completions", {"prompt": "x", "stop": "x" * 1_000_000}, "stop: strings of at most 16384"),
        ("completions", {"prompt": "x", "stop": ["x" * 10_000, "y" * 10_000]}, "stop: strings of at most 16384"),
        ("completions", {"prompt": "x", "bad_words": ["x"] * MANY}, "bad_words: List should have at most 1024"),
        ("completions", {"prompt": "x", "bad_words": ["x" * 1_000_000]}, "too many tokens"),
        ("completions", {"prompt": "x", "stop_token_ids": [1] * MANY}, "stop_token_ids: List should have at most 4096"),
        ("completions", {"prompt": "x", "allowed_token_ids": [1] * 3 * MANY}, "at most 262144"),
        ("completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(50_000)}}, "at most 16384"),
        ("completions", {"prompt": "x", "logit_bias": {str(i): "x" for i in range(50_000)}}, "logit_bias.0"),
        ("completions", {"prompt": "x", "cache_salt": "x" * MANY}, "cache_salt"),
        ("completions", {str(i): 1 for i in range(50_000)}, "50000 fields"),
        ("completions", {"prompt": ["x"] * 20_000}, "at most 16384 prompts"),
        ("completions", {"prompt": "a b " * 3_000_000}, "max_model_len=1000"),
        ("completions", {"prompt": "a b " * 3_000_000, "truncate_prompt_tokens": 5}, "max_model_len=1000"),
        ("completions", {"prompt": "x", "temperature": 10**400}, "temperature"),
        ("completions", b'{"prompt": "x", "temperature": 1e999999999}', "no JSON"),
        ("completions", b'{"prompt": "x", "temperature": NaN}', "no JSON"),
        ("completions", b'{"prompt": "x", "seed": ' + b"9" * MANY + b"}", "no JSON"),
        ("completions", raw("{}", 1_000_000), "lists and objects"),
        ("completions", b'{"prompt": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "128 deep"),
        ("completions", b'{"user": ' + b'{"a":' * 1400 + b"1" + b"}" * 1400 + b"}", "128 deep"),
        ("completions", raw("1", 2_200_000), "values"),
        ("completions", {"prompt": "x", "structured_outputs": {"json": "[" * 50_000}}, "128 deep"),
    ],
)
def test_too_much_is_refused_soon(open_server, path, body, message):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{open_server.url}/v1/{path}"  # waits until it listens
    start = time.monotonic()
    answer = httpx.post(url, content=data, headers=JSON, timeout=60)
    seconds = time.monotonic() - start
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert len(answer.text) < 1500
    assert seconds < 5  # a tenth of it, but others work here too


def test_what_is_much_but_meant_is_accepted(server):
    """Within `--max-body-size`."""
    for extra in (
        {"stop": [f"stop {i}" for i in range(1000)]},
        {"logit_bias": {str(i % 250): 1 for i in range(250)}, "n": 40, "temperature": 1},
        {"allowed_token_ids": list(range(250)), "stop_token_ids": list(range(100, 200))},
        {"bad_words": [chr(97 + i) for i in range(26)]},
    ):
        answer = server.post(
            "/v1/completions", {"prompt": ["x", "y"] if "n" not in extra else "x", "max_tokens": 2} | extra
        )
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("definitions", [None, [], "x", 5, [1], {"a": None}, True])
def test_definitions_of_tools_may_be_anything(scripted_server, definitions):
    parameters = {"type": "object", "$defs": definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": [USER], "tools": [tool], "tool_choice": "required", "max_tokens": 2}
    answer = scripted_server.post("/v1/chat/completions", body)
    assert answer.status_code in (200, 400), answer.text


def nested(depth: int, make: Any) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


HOSTILE = [
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 1e308, -1e308, 5e-324, 0.5),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "\0", "\ud800", "a\udfff", "\U0010ffff", "NaN", "x" * 3000),
    *(
        "{{ 1 // 0 }}",
        "{% for",
        "(",
        "[" * 500,
        "\\u{d800}",
        "root ::= root",
        "start: start",
        "start: /(/",
        "../..",
        "%s%n",
    ),
    *([], [[]], [None], [1] * 2000, ["x"] * 2000, [{}] * 200, {}, {"": 1}, {"\ud800": 1}, {"a": "\ud800"}),
    *({"type": "object", "$defs": None}, {"$ref": "#"}, {"$ref": 5}, {"$defs": "x"}, {"$ref": "#/$defs/\ud800"}),
    *({"properties": None}, {"properties": [1]}, {"type": ["x"]}, {"required": 5}, {"items": 1}, {"enum": []}),
    *({"allOf": {}}, {"pattern": "("}, {"minimum": "x"}, {"minItems": 10**30}, {"maxLength": -1}, {"const": "\ud800"}),
    *(nested(depth, lambda value: [value]) for depth in (60, 120, 130, 900)),
    *(nested(depth, lambda value: {"a": value}) for depth in (60, 120, 130, 900)),
    *(nested(depth, lambda value: {"properties": {"a": value}}) for depth in (25, 60)),
]


def values(schema: dict[str, Any], definitions: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values as a schema of pydantic's has them, in which any may be a hostile one instead."""
    hostile = st.sampled_from(HOSTILE)
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        right = st.one_of([values(choice, definitions, depth) for choice in choices])
    elif "const" in schema or "enum" in schema:
        right = st.sampled_from(schema.get("enum") or [schema["const"]])
    elif schema.get("type") == "object" and "properties" in schema:
        fields = {name: values(field, definitions, depth + 1) for name, field in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        some = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True) if fields else st.just([])
        right = some.flatmap(lambda names: st.fixed_dictionaries(needed | {name: fields[name] for name in names}))
    elif schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        inner = values(inner, definitions, depth + 1) if isinstance(inner, dict) else hostile
        right = st.dictionaries(
            st.sampled_from(["a", "1", "role", "content", "type", "\ud800", "$defs"]), inner, max_size=3
        )
    elif schema.get("type") == "array":
        right = st.lists(values(schema.get("items", {}), definitions, depth + 1), max_size=3)
    else:
        kinds = {"string": st.text(max_size=5), "integer": st.integers(-2, 40), "number": st.floats(-3, 3)}
        right = kinds.get(schema.get("type", ""), st.booleans() if schema.get("type") == "boolean" else hostile)
    weights = [right] * (4 if depth else 30) + [hostile]
    return st.integers(0, len(weights) - 1).flatmap(lambda place: weights[place])


ENDPOINTS: list[tuple[str, Any]] = [
    ("/v1/completions", CompletionBody),
    ("/v1/chat/completions", ChatBody),
    ("/v1/responses", ResponsesBody),
    ("/tokenize", TokenizeBody),
    ("/detokenize", DetokenizeBody),
]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/responses": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def attack(server: Any, path: str, model: Any, max_examples: int) -> None:
    schema = model.model_json_schema()
    drawn = values(schema, schema.get("$defs", {}))
    url = server.url + path
    with httpx.Client(timeout=60) as client:

        @settings(max_examples=max_examples, **COMMON)
        @given(drawn, st.booleans())
        def check(body: Any, is_complete: bool) -> None:
            # Most that are drawn are refused early: half of them get what makes them complete.
            body = body | GOOD[path] | {"model": None} if isinstance(body, dict) and is_complete else body
            data = json.dumps(shortened(body, path))
            start = time.monotonic()
            answer = client.post(url, content=data, headers=JSON)
            assert answer.status_code < 500, (answer.status_code, answer.text, data[:2000])
            assert time.monotonic() - start < 20, data[:2000]
            if answer.status_code >= 400:
                assert len(answer.json()["error"]["message"]) <= 1000

        check()
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
def test_no_body_is_the_servers_fault(scripted_server, path, model):
    attack(scripted_server, path, model, 60)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
def test_no_body_of_many_is_the_servers_fault(scripted_server, path, model):
    attack(scripted_server, path, model, 3000)


def test_an_answer_has_so_many_log_probabilities_of_prompts(server):
    """Each choice repeats those of its prompt."""
    body = {"prompt": [[5] * 200] * 5, "max_tokens": 1, "prompt_logprobs": 20, "temperature": 1.0}
    assert server.post("/v1/completions", body).status_code == 200
    answer = server.post("/v1/completions", body | {"n": 9, "prompt": [[5] * 300] * 5})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "prompt_logprobs"
