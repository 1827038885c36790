"""Connections: what is refused before any key or endpoint, and what a bound leaves alone."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from jaxengine.server import http
from jaxengine.server.errors import APIError
from jaxengine.server.http import MAX_HEADER_BYTES, MAX_HEADERS, bounded_protocol, max_connections
from jaxengine.server.middleware import LimitBody, RequireKey

MAX_BODY_SIZE, NUM_ALLOWED, SECONDS = 200_000, 20, 0.3
START = b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


async def echo(scope, receive, send) -> None:
    """Answers with the number of bytes it was sent, in pieces if asked for."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for _ in range(10 if scope["path"] == "/slow" else 1):
        await send({"type": "http.response.body", "body": b"%d\n" % size, "more_body": True})
        await asyncio.sleep(0.15 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.body", "body": b""})


async def app(scope, receive, send) -> None:
    try:
        await RequireKey(LimitBody(echo, MAX_BODY_SIZE), ("k",))(scope, receive, send)
    except APIError as error:
        await error.response()(scope, receive, send)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """That of a server with short times."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as sock:
        patch.setattr(http, "HEADER_SECONDS", SECONDS)
        patch.setattr(http, "BODY_SECONDS", SECONDS)
        config = uvicorn.Config(
            app,
            http=bounded_protocol(MAX_BODY_SIZE, NUM_ALLOWED),
            lifespan="off",
            ws="none",
            log_config=None,
            timeout_keep_alive=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        yield sock.getsockname()[:2]
        server.should_exit = True
        thread.join()


def send(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> bytes:
    """What is answered to some pieces until the connection is closed; b"" if it is closed without a word."""
    with socket.create_connection(address, timeout=10) as sock:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(2**16):
                answer += data
        return answer


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


LONG = b"a" * 1000


@pytest.mark.parametrize(
    ("pieces", "pause", "statuses"),
    [
        # A connection that is closed with bytes unread may lose its answer.
        ([START + b"X-Long: ", *[LONG] * 2000], 0, {431, 0}),
        ([START, *[b"X-%d: y\r\n" % i for i in range(10_000)]], 0, {431, 0}),
        ([START + b"".join(b"X-%d: y\r\n" % i for i in range(MAX_HEADERS)) + b"\r\n"], 0, {431}),
        ([b"GET /" + LONG * (MAX_HEADER_BYTES // 1000 + 1) + b" HTTP/1.1\r\n\r\n"], 0, {431}),
        ([START + CHUNKED + b"1;", *[LONG] * 2000], 0, {431, 0}),
        ([START + CHUNKED + b"1\r\nx\r\n0\r\n", *[b"X-%d: y\r\n" % i for i in range(10_000)]], 0, {431, 0}),
        ([START], 0, {408}),
        ([START[:5]], 0, {408}),
        ([b""], 0, {0}),
        ([b"\r\n"], 0, {0}),
        ([START + b"X-Slow: ", *[b"a"] * 20], 0.05, {408}),
        ([START + b"Content-Length: 9\r\n\r\n123"], 0, {408}),
        ([START + CHUNKED + b"1\r\nx\r\n"], 0, {408}),
        ([START + b"Content-Length: 100\r\n\r\n", *[b"a"] * 20], 0.05, {408}),
        ([START + b"Content-Length: 1000000\r\n\r\n"], 0, {413}),
        ([START + CHUNKED, *[b"3e8\r\n" + LONG + b"\r\n"] * 1000], 0, {413, 0}),
        ([b"POST /echo HTTP/1.1\r\nHost: x\r\n" + CHUNKED, *[b"3e8\r\n" + LONG + b"\r\n"] * 1000], 0, {401, 0}),
        ([b"nonsense\r\n\r\n"], 0, {400}),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"], 0, {400}),
        ([b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n"], 0, {400}),
    ],
)
def test_what_is_beyond_a_bound_ends_the_connection(address, pieces, pause, statuses):
    start = time.monotonic()
    answer = send(address, *pieces, pause=pause)
    assert status(answer) in statuses, answer[:200]
    assert time.monotonic() - start < 4
    if status(answer) not in (0, 401):
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert httpx.post(f"http://{address[0]}:{address[1]}/echo", headers={"Authorization": "Bearer k"}).text == "0\n"


def test_what_is_within_the_bounds_is_answered(address):
    url = f"http://{address[0]}:{address[1]}"
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}) as client:
        for size in (0, 1, 65_536, MAX_BODY_SIZE):
            assert client.post("/echo", content=b"x" * size).text == f"{size}\n"
            assert client.post("/echo", content=iter([b"x" * size])).text == f"{size}\n"
        assert client.post("/echo", headers={f"x-{i}": "y" * 300 for i in range(100)}).status_code == 200
        # An answer takes as long as it takes, though the time for headers and bodies is over.
        assert client.post("/slow", content=b"xyz").text == "3\n" * 10

        def slowly() -> Iterator[bytes]:
            for _ in range(12):
                yield b"x" * http.MIN_BODY_BYTES
                time.sleep(0.1)

        assert client.post("/echo", content=slowly()).text == f"{12 * http.MIN_BODY_BYTES}\n"
        # Whoever has no key, and sends a body that nobody reads, is told so and can go on.
        for _ in range(2):
            assert client.post("/echo", content=b"x" * 100_000, headers={"Authorization": ""}).status_code == 401
    answers = send(address, (START + b"Content-Length: 1\r\n\r\nx") * 3)
    assert answers.count(b"200 OK") == 3  # in one piece


def test_connections_that_ask_nothing_make_room_for_those_that_do(address):
    url = f"http://{address[0]}:{address[1]}/echo"
    with contextlib.ExitStack() as stack:
        for i in range(5 * NUM_ALLOWED):
            sock = stack.enter_context(socket.create_connection(address))
            sock.sendall(START if i % 2 else b"")
        assert httpx.post(url, headers={"Authorization": "Bearer k"}).text == "0\n"
        for _ in range(5 * NUM_ALLOWED):
            sock = stack.enter_context(socket.create_connection(address))
            sock.sendall(START + b"Content-Length: 100000\r\n\r\n")
        assert httpx.post(url, headers={"Authorization": "Bearer k"}).text == "0\n"
    time.sleep(2 * SECONDS)
    with contextlib.ExitStack() as stack:  # all have whole requests, and are being answered
        for _ in range(NUM_ALLOWED):
            sock = stack.enter_context(socket.create_connection(address))
            sock.sendall(START.replace(b"/echo", b"/slow") + b"Content-Length: 0\r\n\r\n")
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
        assert httpx.post(url, headers={"Authorization": "Bearer k"}).status_code == 503
        assert httpx.get(url.replace("/echo", "/health")).text == "0\n"
    time.sleep(2 * SECONDS)
    assert httpx.post(url, headers={"Authorization": "Bearer k"}).text == "0\n"


def test_a_body_in_tiny_chunks_ends(address):
    """However little of it is body: the chunks count too."""
    answer = send(address, START + CHUNKED, *[b"1\r\nx\r\n" * 10_000] * 12)
    assert b"413" in answer or not answer  # the answer may be lost with what was not read


def test_connections_leave_descriptors_for_others():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        room = max_connections()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard == before[1]
        assert 0 < room < hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
