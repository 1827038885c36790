"""How servers end: each test has one of its own."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, InternalServerError

from jaxengine.engine.socket_folder import SocketFolder
from tests.server.conftest import SHUTDOWN_SECONDS, Server, wait_until

LONG = {"prompt": "x", "max_tokens": 900, "temperature": 20.0, "extra_body": {"ignore_eos": True}}
STREAMS = 40
CORE, WORKERS = "jaxengine.engine.core_process", "jaxengine.workers.process"


@pytest.fixture
def server(tiny) -> Iterator[Server]:
    server = Server(
        tiny, "--served-model-name", "tiny", "--shutdown-timeout", str(SHUTDOWN_SECONDS), "--health-timeout", "2"
    )
    assert server.url  # it listens
    yield server
    server.close()


def children(pid: int, module: str) -> list[int]:
    """Processes that a server has started to run a module."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", module], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_when_the_core_dies_everything_says_so(server):
    (core,) = children(server.process.pid, CORE)
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
    (core,) = children(server.process.pid, CORE)
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
    wait_until(lambda: has_ended(core))


def accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True


def test_what_does_not_answer_does_not_keep_the_server_from_ending(server):
    """A core that is stopped: /health says so after a while, and a signal ends the server with all its processes."""
    (core,) = children(server.process.pid, CORE)
    wait_until(lambda: len(children(server.process.pid, WORKERS)) == 2)
    workers = children(server.process.pid, WORKERS)
    os.kill(core, signal.SIGSTOP)
    assert server.get("/health").status_code == 200
    wait_until(lambda: server.get("/health", timeout=1).status_code == 503)
    assert "has not answered" in server.get("/health").json()["error"]["message"]
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    while server.process.poll() is None:
        assert time.monotonic() - started < SHUTDOWN_SECONDS + 6
        server.process.send_signal(signal.SIGTERM)  # again and again: it is ending
        time.sleep(0.05)
    assert server.process.returncode == 0
    server._reader.join()
    assert not [line for line in server.lines if "Traceback" in line or "Event loop" in line]
    for pid in (core, *workers):
        wait_until(lambda pid=pid: has_ended(pid))


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_folders_of_killed_servers_are_removed(tiny, short_path, monkeypatch):
    tmp_path = short_path
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    killed = Server(tiny)
    assert killed.url
    (folder,) = tmp_path.glob("jaxengine-*")
    killed.process.kill()
    killed.close()
    assert folder.exists()
    os.utime(folder, (0, 0))
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    new = SocketFolder()
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    other = SocketFolder()
    assert other.path.parent == Path("/tmp")
    for made in (new, other):
        made.remove()
        assert not made.path.exists()
