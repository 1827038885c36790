"""What is refused, and what becomes of clients that leave and of servers that end."""

import json
import re
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, RateLimitError

from jaxengine.cli.main import main
from jaxengine.server.state import ServerSettings
from tests.server.conftest import BEARER, KEY, MAX_BODY_SIZE, ORIGIN, ROOM

JSON = {"Content-Type": "application/json"}
ROOT = Path(__file__).resolve().parents[2]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}
LONG = {"prompt": "x", "max_tokens": 900, "temperature": 20.0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": "x", "temperature": -1}, "temperature", "at least 0"),
        ("completions", {"prompt": "x", "temperature": "1"}, "temperature", "valid number"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p", "(0, 1]"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "at least 1"),
        ("completions", {"prompt": "x", "max_tokens": 10**30}, "max_tokens", "less than or equal"),
        ("completions", {"prompt": "x", "n": 0}, "n", "[1,"),
        ("completions", {"prompt": "x", "n": 1000, "temperature": 1}, "n", "at most"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs", "max_logprobs=20"),
        ("completions", {"prompt": "x", "logit_bias": {"no": 1}}, "logit_bias", "token id"),
        ("completions", {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ("completions", {"prompt": "x", "stop": [""]}, "stop", "not empty"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ("completions", {"prompt": "x", "stream_options": {}}, "stream_options", "stream=true"),
        ("completions", {"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream=false"),
        ("completions", {"prompt": "x", "no_such": 1}, "no_such", "no such field"),
        ("completions", {"prompt": []}, "prompt", "not empty"),
        ("completions", {"prompt": ["x", ""]}, "prompt", "prompts[1]"),
        ("completions", {"prompt": [1, "x"]}, "prompt", "must be"),
        ("completions", {"prompt": [99999]}, "prompt_token_ids", "99999"),
        ("completions", {"prompt": "x" * 1000}, None, "max_model_len=1000"),
        ("completions", {}, "prompt", "required"),
        ("completions", [], None, "JSON object"),
        ("chat/completions", {"prompt": "x"}, "prompt", "takes messages"),
        ("chat/completions", {"messages": []}, "messages", "at least one"),
        ("chat/completions", {"messages": [{"role": "pope", "content": "x"}]}, "messages", "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ("chat/completions", {"messages": USER, "tools": [{"type": "function"}]}, "tools", "tools.0.function"),
        ("chat/completions", {"messages": USER, "tools": [TOOL]}, "tools", "--enable-auto-tool-choice"),
        ("chat/completions", {"messages": USER, "tools": [TOOL], "tool_choice": "required"}, "tools", "no place"),
        ("chat/completions", {"messages": USER, "tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            "chat/completions",
            {"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g'",
        ),
        ("chat/completions", {"messages": USER, "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "'auto'"),
        ("chat/completions", {"messages": USER, "chat_template": "x"}, "chat_template", "--trust-request-chat-templ"),
        ("chat/completions", {"messages": [*USER, {"role": "assistant", "tool_calls": 5}]}, "messages", "a list"),
        ("tokenize", {"messages": USER, "tools": [TOOL]}, "tools", "no place"),
        ("chat/completions", {"messages": USER, "response_format": {"type": "xml"}}, "response_format", "json_object"),
        (
            "chat/completions",
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "response_format",
            "needs",
        ),
        ("completions", {"prompt": "x", "response_format": SCHEMA}, "response_format", "Invalid type"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ("completions", {"prompt": "x", "structured_outputs": {"grammar": "no"}}, "structured_outputs", "GBNF"),
        ("completions", {"prompt": "x", "structured_outputs": {}}, "structured_outputs", "exactly one"),
        ("completions", {"prompt": "x", "structured_outputs": {"choice": [1]}}, "structured_outputs", "string"),
        ("completions", {"prompt": "x", "structured_outputs": {"xml": "a"}}, "structured_outputs", "no such field"),
        ("completions", {"prompt": "x", "structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON"),
        (
            "completions",
            {"prompt": "x", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
            "exclude",
        ),
        ("chat/completions", {"messages": USER, "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ("chat/completions", {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, None, "tokenize"),
        (
            "chat/completions",
            {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            None,
            "F",
        ),
    ],
)
def test_wrong_bodies(server, path, body, param, message):
    answer = server.post(f"/v1/{path}" if path != "tokenize" else "/tokenize", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_what_asks_for_nothing_is_accepted(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_completion_tokens=2,
        user="me",
        response_format={"type": "text"},
        extra_body={"tools": None, "best_of": None, "tool_choice": "none", "max_tokens": None},
    )
    assert answer.usage.completion_tokens <= 2


def test_broken_json_and_wrong_places(server):
    broken = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt":', headers=BEARER | JSON)
    assert broken.status_code == 400
    assert "JSON" in broken.json()["error"]["message"]
    half = {"prompt": "x \ud800", "model": "\ud800", "messages": [{"role": "user", "content": "\ud800"}]}
    for path, names in (
        ("completions", ["prompt"]),
        ("completions", ["prompt", "model"]),
        ("chat/completions", ["messages"]),
    ):
        body = json.dumps({name: half[name] for name in names})
        surrogate = httpx.post(f"{server.url}/v1/{path}", content=body, headers=BEARER | JSON)
        assert surrogate.status_code == 400, surrogate.text
        assert "not valid Unicode" in surrogate.json()["error"]["message"]
    assert server.get("/v1/completions", headers=BEARER).status_code == 405
    missing = server.get("/v1/nothing", headers=BEARER)
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"
    unknown = server.post("/v1/completions", {"prompt": "x", "model": "other"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(server, chunked):
    body = json.dumps({"prompt": "x" * MAX_BODY_SIZE}).encode()
    answer = httpx.post(
        f"{server.url}/v1/completions", content=iter([body]) if chunked else body, headers=BEARER | JSON
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_the_queue_has_an_end(server, client):
    whole = {"n": ROOM, "stream": True, "extra_body": {"ignore_eos": True}}
    with client.completions.create(model="tiny", prompt="x", max_tokens=900, temperature=20, **whole) as stream:
        next(iter(stream))
        assert server.metrics()["jaxengine:num_requests_waiting"] > 0
        with pytest.raises(RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(BadRequestError):
            client.completions.create(model="tiny", prompt="x", n=ROOM + 1)
    server.wait_until_idle()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_frees_the_pages(server, stream):
    before = server.metrics()["jaxengine:generation_tokens_total"]
    body = LONG | {"n": 20, "stream": stream}
    with httpx.Client(base_url=server.url, headers=BEARER, timeout=None if stream else 0.4) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                assert server.metrics()["jaxengine:kv_cache_usage_perc"] > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    server.wait_until_idle()
    after = server.metrics()
    assert after["jaxengine:generation_tokens_total"] - before < 20 * 900
    assert after['jaxengine:request_success_total{finished_reason="abort",model_name="tiny"}'] >= 20


def test_the_readme_snippet_runs(server, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = [s for s in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "import OpenAI" in s]
    here = {"http://127.0.0.1:8000": server.url, '"none"': f'"{KEY}"', '"smollm2-135m-instruct"': '"tiny"'}
    for name, value in here.items():
        assert name in snippet
        snippet = snippet.replace(name, value)
    namespace: dict = {}
    exec(snippet, namespace)
    namespace["client"].close()
    assert "chatcmpl" not in capsys.readouterr().out


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_take_so_long(open_server, stream):
    body = LONG | {"n": 100, "stream": stream}
    answer = open_server.post("/v1/completions", body)
    if stream:
        assert answer.status_code == 200
        *_, error, end = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert json.loads(error)["error"]["code"] == "timeout"
        assert end == "[DONE]"
    else:
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
    open_server.wait_until_idle()


def test_scripts_of_other_pages_may_call_only_where_they_are_asked_for(server, open_server):
    path, asked = "/v1/chat/completions", {"Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    allowed = httpx.options(server.url + path, headers=asked | {"Origin": ORIGIN})
    assert allowed.status_code == 200  # a browser asks without the key
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    for key, status in ((BEARER, 200), ({}, 401)):
        answer = server.get("/v1/models", headers={"Origin": ORIGIN, **key})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    for url, origin in ((server.url, "https://other.example"), (open_server.url, ORIGIN)):
        answer = httpx.get(f"{url}/v1/models", headers=BEARER | {"Origin": origin})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "", "https://a b"])
def test_wrong_origins(origin):
    with pytest.raises(ValueError, match=r"allowed_origins: .* expected '\*', or scheme and host"):
        ServerSettings(("m",), allowed_origins=(origin,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "port=65536: must be from 0 (a free one) to 65535"),
        (["--port", "-1"], "port=-1"),
        (["--host", "nowhere.invalid"], "host='nowhere.invalid': "),
    ],
)
def test_wrong_addresses(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err
