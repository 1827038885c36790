"""What one key has made belongs to it; and what logs tell of requests."""

import secrets

import pytest

from tests.server.conftest import BEARER, wait_until

OTHER = {"Authorization": "Bearer another"}


@pytest.fixture
def stored(server) -> str:
    answer = server.post("/v1/responses", {"input": "Remember me.", "max_output_tokens": 2})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_answers_belong_to_their_key(server, stored):
    unknown = "resp_0123"
    for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        answers = [
            server.call(method, f"/v1/responses/{name}{suffix}", headers=OTHER).json() for name in (stored, unknown)
        ]
        assert answers[0]["error"]["code"] == "response_not_found"
        assert str(answers[0]).replace(stored, unknown) == str(answers[1])
    body = {"input": "What did I say?", "max_output_tokens": 2, "previous_response_id": stored}
    refused = server.post("/v1/responses", body, headers=OTHER)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    assert server.post("/v1/responses", body).status_code == 200
    assert server.call("GET", f"/v1/responses/{stored}", headers=BEARER).json()["id"] == stored
    assert server.call("DELETE", f"/v1/responses/{stored}", headers=BEARER).json()["deleted"]


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "a"}])
def test_no_key_learns_what_another_has_asked(server, salt):
    prompt = f"{secrets.token_hex(16)}, which nobody has asked before, over some pages of the cache"

    def cached(headers: dict[str, str]) -> int:
        body = {"prompt": prompt, "max_tokens": 1} | salt
        answer = server.post("/v1/completions", body, headers=headers).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(BEARER) == 0
    assert cached(BEARER) > 0
    assert cached(OTHER) == 0
    assert cached(OTHER) > 0


def test_what_users_send_is_neither_logged_whole_nor_raw(server):
    long = "secret\n\x1b[31m" * 500
    body = {"prompt": "x", "max_tokens": 1, "stop": [long]}
    assert server.post("/v1/completions", body).status_code == 200
    for wrong in ({"bad_words": [long]}, {"model": long}, {long: 1}, {"temperature": long}, {"response_format": long}):
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1} | wrong)
        assert answer.status_code in (400, 404), answer.text
        assert len(answer.text) < 2000
    wait_until(lambda: any("stop=" in line for line in server.lines))
    assert not [line for line in server.lines if len(line) > 1000 or "\x1b" in line]
