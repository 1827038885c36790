"""Endpoints that rule the engine: those of vLLM, where the server was told to have them."""

import threading
from collections.abc import Iterator

import pytest

from tests.server.conftest import BEARER, Server, wait_until

CALLS = {
    **dict.fromkeys(
        ("sleep", "wake_up", "reset_prefix_cache", "pause", "resume", "start_profile", "stop_profile"), "POST"
    ),
    **dict.fromkeys(("is_sleeping", "is_paused"), "GET"),
}
BODY = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def dev(open_server) -> Iterator[Server]:
    yield open_server
    assert open_server.call("POST", "/wake_up").status_code == 200
    assert open_server.call("POST", "/resume").status_code == 200
    open_server.wait_until_idle()


def tells(server: Server, name: str) -> bool:
    answer = server.get(f"/{name}")
    assert answer.status_code == 200
    return answer.json()[name]


class Asking(threading.Thread):
    """A completion on its way."""

    def __init__(self, server: Server, **fields: object):
        super().__init__(daemon=True)
        self._server, self._body = server, BODY | fields
        self.start()

    def run(self) -> None:
        self.answer = self._server.post("/v1/completions", self._body)

    def choice(self) -> dict:
        self.join(20)
        return self.answer.json()["choices"][0]


def begun(server: Server, max_tokens: int) -> Asking:
    """A completion that has just begun to run: the model is so small that it would end before it could be seen."""
    server.call("POST", "/pause?mode=keep")
    asking = Asking(server, max_tokens=max_tokens)
    wait_until(lambda: server.metrics()["jaxengine:num_requests_waiting"] == 1)
    server.call("POST", "/resume")
    return asking


@pytest.mark.parametrize("name", CALLS)
def test_without_the_flag_there_are_none(server, name):
    assert server.call(CALLS[name], f"/{name}", headers=BEARER).status_code == 404
    assert f"/{name}" not in server.get("/openapi.json", headers=BEARER).json()["paths"]


@pytest.mark.parametrize(("level", "tags"), [(1, ""), (2, "?tags=kv_cache&tags=weights"), (1, None), (0, "")])
def test_a_server_sleeps_and_its_requests_wait(dev, level, tags):
    before = dev.post("/v1/completions", BODY).json()["choices"][0]["text"]
    answer = dev.call("POST", f"/sleep?level={level}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert tells(dev, "is_sleeping")
    assert tells(dev, "is_paused")
    assert dev.get("/health").status_code == 200
    asking = Asking(dev)
    wait_until(lambda: dev.metrics()["jaxengine:num_requests_waiting"] == 1)
    if tags is None:
        assert dev.call("POST", "/wake_up?tags=weights").status_code == 200
        assert tells(dev, "is_sleeping")
        refused = dev.call("POST", "/resume")
        assert refused.status_code == 409
        assert "wake_up" in refused.json()["error"]["message"]
        tags = "?tags=kv_cache"
    assert dev.call("POST", "/wake_up" + tags).status_code == 200
    assert not tells(dev, "is_sleeping")
    assert asking.choice()["text"] == before


@pytest.mark.parametrize(
    ("query", "max_tokens", "reason"),
    [
        ("", 800, "abort"),
        ("?mode=abort&clear_cache=false", 800, "abort"),
        ("?mode=wait", 100, "length"),
        ("?wait_for_inflight_requests=true", 100, "length"),
        ("?mode=keep", 100, None),
    ],
)
def test_a_server_pauses(dev, query, max_tokens, reason):
    asking = begun(dev, max_tokens)
    answer = dev.call("POST", "/pause" + query)
    assert (answer.status_code, answer.json()) == (200, {"status": "paused"})
    assert tells(dev, "is_paused")
    assert not tells(dev, "is_sleeping")
    if reason is not None:
        assert asking.choice()["finish_reason"] == reason
    answer = dev.call("POST", "/resume")
    assert (answer.status_code, answer.json()) == (200, {"status": "resumed"})
    assert not tells(dev, "is_paused")
    assert asking.choice()["finish_reason"] == (reason or "length")


def test_the_prefix_cache_is_reset(dev):
    assert dev.call("POST", "/reset_prefix_cache").status_code == 200
    asking = begun(dev, 300)
    dev.call("POST", "/pause?mode=keep&clear_cache=false")
    refused = dev.call("POST", "/reset_prefix_cache")
    assert refused.status_code == 409
    assert "reset_running_requests=true" in refused.json()["error"]["message"]
    assert dev.call("POST", "/reset_prefix_cache?reset_running_requests=true&reset_external=false").status_code == 200
    dev.call("POST", "/resume")
    assert asking.choice()["finish_reason"] == "length"


def test_profiles_are_written(dev, session_folder):
    assert dev.call("POST", "/stop_profile").status_code == 409
    assert dev.call("POST", "/start_profile").status_code == 200
    assert dev.call("POST", "/start_profile").status_code == 409
    dev.post("/v1/completions", BODY)
    assert dev.call("POST", "/stop_profile").status_code == 200
    assert list((session_folder / "profiles").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("call", "param", "message"),
    [
        ("sleep?level=3", "level", "level=3: expected 0 or 1 or 2"),
        ("sleep?level=x", "level", "level='x': expected a whole number"),
        ("sleep?level=1&level=2", "level", "given 2 times"),
        ("sleep?mode=later", "mode", "mode='later': expected one of abort, wait, keep"),
        ("sleep?depth=1", "depth", "'depth': there is no such parameter; expected level, mode"),
        ("wake_up?tags=weights&tags=all", "tags", "'all': expected a list of 'weights' and 'kv_cache'"),
        ("wake_up?tag=weights", "tag", "expected tags"),
        ("pause?mode=", "mode", "mode='': expected one of"),
        ("pause?clear_cache=maybe", "clear_cache", "clear_cache='maybe': expected true or false"),
        ("pause?wait_for_inflight_requests=2", "wait_for_inflight_requests", "expected true or false"),
        ("resume?now=1", "now", "none is accepted"),
        ("reset_prefix_cache?reset_external=1", "reset_external", "there is no external cache"),
        ("reset_prefix_cache?reset_running_requests=yes", "reset_running_requests", "='yes': expected true or false"),
        ("stop_profile?" + "x" * 5000, "x" * 10, "no such parameter"),
    ],
)
def test_wrong_parameters_are_named(dev, call, param, message):
    answer = dev.call("POST", f"/{call}")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert message in error["message"]
    assert len(answer.content) < 1000
    assert not tells(dev, "is_paused")


def test_parameters_in_the_body_are_not_passed_over(dev):
    answer = dev.call("POST", "/sleep", json={"level": 2})
    assert answer.status_code == 400
    assert "parameters are given in the query" in answer.json()["error"]["message"]
    assert not tells(dev, "is_sleeping")
    assert dev.call("POST", "/resume", json={}).status_code == 200
