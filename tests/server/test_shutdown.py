"""How servers end: each test has one of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, InternalServerError

from tests.server.conftest import SHUTDOWN_SECONDS, Server, wait_until

LONG = {"prompt": "x", "max_tokens": 900, "temperature": 20.0, "extra_body": {"ignore_eos": True}}
STREAMS = 40


@pytest.fixture
def server(tiny) -> Iterator[Server]:
    server = Server(tiny, "--served-model-name", "tiny", "--shutdown-timeout", str(SHUTDOWN_SECONDS))
    assert server.url  # it listens
    yield server
    server.close()


def children(pid: int) -> list[int]:
    return [
        int(line) for line in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    ]


def test_when_the_core_dies_everything_says_so(server):
    (core,) = children(server.process.pid)
    with (
        server.client() as client,
        client.completions.create(model="tiny", **LONG, stream=True) as stream,
    ):
        next(iter(stream))
        os.kill(core, signal.SIGKILL)
        with pytest.raises(Exception, match="engine core process has ended"):
            list(stream)
        assert server.get("/health").status_code == 503
        with pytest.raises(InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503
    assert server.process.wait(20) == 1
    assert "engine core process has ended" in "".join(server.lines)


def test_sigterm_lets_requests_finish_and_cuts_what_takes_too_long(server):
    (core,) = children(server.process.pid)
    short = LONG | {"max_tokens": 60}
    with (
        server.client() as client,
        client.completions.create(model="tiny", **short, stream=True) as finishing,
        client.completions.create(model="tiny", **LONG, n=STREAMS, stream=True) as cut,
    ):
        next(iter(finishing))
        next(iter(cut))
        server.process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in finishing][-1] == "length"
        wait_until(lambda: not accepts(server.url))
        with pytest.raises(APIConnectionError):
            client.with_options(timeout=5).models.list()
        reasons = [chunk.choices[0].finish_reason for chunk in cut if chunk.choices[0].finish_reason]
    assert len(reasons) == STREAMS
    assert "abort" in reasons
    assert server.process.wait(SHUTDOWN_SECONDS + 10) == 0
    wait_until(lambda: not Path(f"/proc/{core}").exists())


def accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True
