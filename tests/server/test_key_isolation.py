"""With several keys, what one of them has made is not there for another: answers, conversations, cached prompts."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import BEARER, Server

OTHER = {"Authorization": "Bearer another"}
KEYS = {"the_first": (OTHER, BEARER), "the_second": (BEARER, OTHER)}
Ask = Callable[[str], tuple[str, dict[str, Any]]]
ENDPOINTS: dict[str, Ask] = {
    "completions": lambda text: ("/v1/completions", {"prompt": text, "max_tokens": 1}),
    "ids": lambda text: ("/v1/completions", {"prompt": [ord(char) % 200 + 6 for char in text], "max_tokens": 1}),
    "chat": lambda text: ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
    "responses": lambda text: ("/v1/responses", {"input": text, "max_output_tokens": 1, "store": False}),
}


def cached_tokens(server: Server, path: str, body: dict[str, Any], key: dict[str, str]) -> int:
    answer = server.post(path, body, headers=key)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    return details["cached_tokens"]


def new_prompt() -> str:
    """One that fills several pages and that nobody has asked before."""
    return secrets.token_hex(48)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("salt", [None, "shared"])
def test_cached_prompts(server, endpoint, salt):
    path, body = ENDPOINTS[endpoint](new_prompt())
    body |= {} if not salt else {"cache_salt": salt}
    assert cached_tokens(server, path, body, BEARER) == 0
    assert cached_tokens(server, path, body, BEARER) > 0
    assert cached_tokens(server, path, body, OTHER) == 0
    assert cached_tokens(server, path, body, OTHER) > 0
    assert cached_tokens(server, path, body | {"cache_salt": new_prompt()}, BEARER) == 0


def test_one_key_shares_between_endpoints(server):
    """A salt of the key, not of the call."""
    path, body = ENDPOINTS["completions"](new_prompt())
    cached_tokens(server, path, body, BEARER)
    spelled = {"Authorization": BEARER["Authorization"].replace("Bearer", "bearer")}
    assert cached_tokens(server, path, body, spelled) > 0
    assert cached_tokens(server, path, body | {"n": 3, "temperature": 1}, BEARER) > 0


def test_no_salt_reaches_another_keys_prompts(server):
    """Not even with what a salt of that key may be made of."""
    path, body = ENDPOINTS["completions"](new_prompt())
    cached_tokens(server, path, body, BEARER)
    key = BEARER["Authorization"].split()[1]
    for salt in (key, BEARER["Authorization"], f"{key}:", f":{key}", f"{key}\0", "0", "1", "None", "\0"):
        assert cached_tokens(server, path, body | {"cache_salt": salt}, OTHER) == 0, salt


@pytest.fixture(params=KEYS)
def keys(request) -> tuple[dict[str, str], dict[str, str]]:
    """Whose answer it is, and another key."""
    return KEYS[request.param]


@pytest.fixture
def stored(server, keys) -> str:
    answer = server.post("/v1/responses", {"input": "my secret", "max_output_tokens": 2}, headers=keys[0])
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def call(server: Server, method: str, path: str, key: dict[str, str]) -> httpx.Response:
    return httpx.request(method, server.url + path, headers=key, timeout=60)


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel")])
def test_stored_answers(server, keys, stored, method, suffix):
    owner, other = keys
    refused = call(server, method, f"/v1/responses/{stored}{suffix}", other)
    unknown = call(server, method, f"/v1/responses/resp_{'0' * 32}{suffix}", owner)
    # Nothing tells that there is one.
    assert refused.status_code == unknown.status_code == 404
    assert refused.json()["error"].keys() == unknown.json()["error"].keys()
    assert refused.json()["error"]["code"] == unknown.json()["error"]["code"]
    found = call(server, "GET", f"/v1/responses/{stored}", owner)
    assert found.status_code == 200
    assert found.json()["id"] == stored
    assert call(server, "DELETE", f"/v1/responses/{stored}", owner).status_code == 200
    assert call(server, "GET", f"/v1/responses/{stored}", owner).status_code == 404


def test_conversations(server, keys, stored):
    owner, other = keys
    body = {"input": "what did I say?", "max_output_tokens": 2}

    def go_on(previous: str, key: dict[str, str]) -> httpx.Response:
        return server.post("/v1/responses", body | {"previous_response_id": previous}, headers=key)

    refused, unknown = go_on(stored, other), go_on(f"resp_{'0' * 32}", other)
    assert refused.status_code == unknown.status_code
    assert 400 <= refused.status_code < 500
    assert refused.json()["error"]["code"] == unknown.json()["error"]["code"]
    following = go_on(stored, owner)
    assert following.status_code == 200
    assert go_on(following.json()["id"], other).status_code == refused.status_code
    assert go_on(following.json()["id"], owner).status_code == 200
    assert "my secret" not in refused.text


def test_whoever_has_no_key_learns_nothing(server, stored):
    for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        for key in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            assert call(server, method, f"/v1/responses/{stored}{suffix}", key).status_code == 401
