"""Attacks on what comes before a request: its connection, its head, and how its body is sent."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.server.hostile.table import MODEL_LEN, Attack, Target, body

PIECE = 2**16
HELD_SECONDS = 3.0
"""How long an attack that waits holds what it has."""
POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SMALL = body({"prompt": "Hi", "max_tokens": 1})


def _connect(target: Target) -> socket.socket:
    return socket.create_connection((target.host, target.port), timeout=target.timeout)


def _key(target: Target) -> str:
    return f"Authorization: Bearer {target.key}\r\n"


def _answer(sock: socket.socket) -> int | str:
    """The status of the first answer, or what became of the connection."""
    data = b""
    try:
        while b"\r\n" not in data:
            piece = sock.recv(PIECE)
            if not piece:
                return "closed"
            data += piece
    except TimeoutError:
        return "no answer"
    except OSError:
        return "closed"
    first = data.split(b" ", 2)
    return int(first[1]) if data.startswith(b"HTTP/") and first[1].isdigit() else "no HTTP"


def _send(sock: socket.socket, pieces: Iterator[bytes]) -> None:
    """Sends until the other side has had enough."""
    with contextlib.suppress(OSError):
        for piece in pieces:
            sock.sendall(piece)


def raw(*parts: str | bytes, with_key: bool = True) -> Callable[[Target], int | str]:
    """Sends bytes and reads one answer. `KEY` stands for the header with the key."""

    def act(target: Target) -> int | str:
        data = b"".join(part if isinstance(part, bytes) else part.encode("latin-1") for part in parts)
        data = data.replace(b"KEY", _key(target).encode() if with_key else b"")
        with _connect(target) as sock:
            sock.settimeout(min(target.timeout, HELD_SECONDS * 5))
            _send(sock, iter([data]))
            status = _answer(sock)
        # What is not whole is waited for; that is held for HELD_SECONDS only.
        return status

    return act


def endless(head: str, piece: bytes, size: int) -> Callable[[Target], int | str]:
    """Sends a beginning, and then the same until so many bytes are sent."""

    def act(target: Target) -> int | str:
        with _connect(target) as sock:
            _send(sock, iter([head.replace("KEY", _key(target)).encode()]))
            many = piece * max(1, PIECE // len(piece))
            deadline = time.monotonic() + target.timeout
            with contextlib.suppress(OSError):
                for _ in range(size // len(many)):
                    if time.monotonic() > deadline:
                        return "no answer"
                    sock.sendall(many)
            return _answer(sock)

    return act


def held(number: int, *parts: str, drip: bytes = b"", seconds: float = HELD_SECONDS) -> Callable[[Target], int | str]:
    """Opens so many connections, sends each a beginning, and waits; the server must take others meanwhile."""

    def act(target: Target) -> int | str:
        start = "".join(parts).replace("KEY", _key(target)).encode()
        with contextlib.ExitStack() as stack:
            sockets = []
            for _ in range(number):
                try:
                    sock = stack.enter_context(socket.create_connection((target.host, target.port), timeout=1))
                    sock.sendall(start)
                except OSError:  # refused, or dropped: as may be
                    continue
                sockets.append(sock)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.1)
                for sock in sockets if drip else []:
                    with contextlib.suppress(OSError):
                        sock.sendall(drip)
            return f"held {len(sockets)}"

    return act


def silent(*parts: str, drip: bytes = b"") -> Callable[[Target], int | str]:
    """Sends a beginning, then nothing or a byte now and then; the server must not wait for ever."""

    def act(target: Target) -> int | str:
        with _connect(target) as sock:
            sock.settimeout(0.5)
            _send(sock, iter(["".join(parts).replace("KEY", _key(target)).encode()]))
            end = time.monotonic() + target.timeout
            while time.monotonic() < end:
                status = _answer(sock)
                if status != "no answer":
                    return status
                _send(sock, iter([drip]))
            return "no answer"

    return act


def slow_reader(fields: dict[str, Any], number: int) -> Callable[[Target], int | str]:
    """Asks for long answers and reads nothing of them."""
    data = body(fields)
    return held(number, POST, "KEY", f"Content-Length: {len(data)}\r\n\r\n", data.decode())


def half_body(data: bytes, seconds: float = HELD_SECONDS) -> Callable[[Target], int | str]:
    """A body that stops in the middle."""

    def act(target: Target) -> int | str:
        with _connect(target) as sock:
            head = f"{POST}{_key(target)}Content-Length: {2 * len(data)}\r\n\r\n".encode()
            _send(sock, iter([head + data]))
            time.sleep(seconds)
        return "left"

    return act


def _length(value: str) -> Callable[[Target], int | str]:
    return raw(POST, "KEY", f"Content-Length: {value}\r\n\r\n", SMALL)


CHUNKED = f"{POST}KEYTransfer-Encoding: chunked\r\n\r\n"
WHOLE = f"{POST}KEYContent-Length: {len(SMALL)}\r\n\r\n{SMALL.decode()}"
HEALTH = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = {"prompt": "x", "max_tokens": MODEL_LEN - 10, "stream": True, "ignore_eos": True, "logprobs": 20}

HEADS = {
    "header_200_mb": endless("GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: ", b"a", 200_000_000),
    "header_200_mb_post": endless(POST + "X-A: ", b"a", 200_000_000),
    "header_name_200_mb": endless("GET /health HTTP/1.1\r\nHost: x\r\n", b"a", 200_000_000),
    "key_200_mb": endless("GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ", b"a", 200_000_000),
    "headers_300000": endless("GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n", 8 * 300_000),
    "headers_300000_health": endless("GET /health HTTP/1.1\r\nHost: x\r\n", b"A:\r\n", 4 * 300_000),
    "headers_whole": raw("GET /v1/models HTTP/1.1\r\nHost: x\r\n", "X-A: b\r\n" * 300_000, "\r\n"),
    "folded": endless("GET /health HTTP/1.1\r\nHost: x\r\nX-A: b\r\n", b" folded\r\n", 50_000_000),
    "empty_lines": endless("", b"\r\n", 50_000_000),
    "method_200_mb": endless("", b"A", 200_000_000),
    **{f"url_{n}": endless("GET /", b"a", n) for n in (60_000, 1_000_000, 200_000_000)},
    "query_100_mb": endless("GET /health?", b"a=b&", 100_000_000),
    "query_whole": raw("GET /v1/models?", "a=b&" * 15_000, " HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "query_1_mb": raw("GET /v1/models?", "a=b&" * 250_000, " HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "slashes": raw("GET /v1/models", "/" * 60_000, " HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "dots": raw("GET /v1/models/", "../" * 20_000, "etc/passwd HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "percent": raw("GET /v1/models/%ff%00%ed%a0%80%zz HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "version": raw("GET /health HTTP/3.7\r\nHost: x\r\n\r\n"),
    "version_0_9": raw("GET /health\r\n"),
    "no_host": raw("GET /health HTTP/1.1\r\n\r\n"),
    "hosts": raw("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "absolute": raw("GET http://other.example/health HTTP/1.1\r\nHost: x\r\n\r\n"),
    "connect": raw("CONNECT other.example:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "asterisk": raw("OPTIONS * HTTP/1.1\r\nHost: x\r\nKEY\r\n"),
    "null_bytes": raw(b"GET /health\0 HTTP/1.1\r\nHost: x\r\nX-A: \0\r\n\r\n"),
    "bare_returns": raw("GET /health HTTP/1.1\rHost: x\r\r"),
    "bare_newlines": raw("GET /health HTTP/1.1\nHost: x\n\n"),
    "space_before_colon": raw("GET /v1/models HTTP/1.1\r\nHost : x\r\nAuthorization : Bearer x\r\n\r\n"),
    "tls": raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2),
    "noise": raw(bytes(range(256)) * 40),
    "http2": raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    "websocket": raw(
        "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\nKEY\r\n"
    ),
    "h2c": raw("GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"),
    "keys": raw("GET /v1/models HTTP/1.1\r\nHost: x\r\n", "Authorization: Bearer x\r\n" * 50, "\r\n"),
    "key_not_ascii": raw(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"),
    "request_id": raw("GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: ", "a" * 30_000, "\r\nKEY\r\n"),
}
BODIES = {
    "stops": half_body(SMALL),
    "stops_unauthenticated": raw(POST, "Content-Length: 1000\r\n\r\n{", with_key=False),
    "stops_large": half_body(body({"prompt": "x" * 7_000_000})),
    "no_length": raw(POST, "KEY\r\n", SMALL),
    **{
        f"length_{name}": _length(value)
        for name, value in {
            "negative": "-5",
            "letters": "abc",
            "plus": "+37",
            "huge": "9" * 400,
            "empty": "",
            "hex": "0x25",
            "too_small": "3",
            "twice": f"{len(SMALL)}\r\nContent-Length: 3",
            "list": f"{len(SMALL)}, 3",
            "beyond_limit": "17000000",
            "2_63": str(2**63),
            "spaces": "3 7",
            "digits": "\u00b2\u00b3",
        }.items()
    },
    "length_and_chunked": raw(POST, "KEY", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", HEALTH),
    "chunked_twice": raw(POST, "KEY", "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "chunked_wrong": raw(POST, "KEY", "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", HEALTH),
    "chunked_identity": raw(POST, "KEY", "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    "chunked_hidden": raw(POST, "KEY", "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunk_endless": endless(CHUNKED, b"1\r\na\r\n", 100_000_000),
    "chunk_endless_large": endless(CHUNKED, b"10000\r\n" + b"a" * 0x10000 + b"\r\n", 200_000_000),
    "chunk_without_end": endless(CHUNKED + "FFFFFFFFFFFFFF\r\n", b"a", 200_000_000),
    "chunk_size_huge": raw(CHUNKED, "F" * 1000, "\r\na"),
    "chunk_size_negative": raw(CHUNKED, "-1\r\na\r\n0\r\n\r\n"),
    "chunk_size_underscore": raw(CHUNKED, "1_0\r\na\r\n0\r\n\r\n"),
    "chunk_extension": endless(CHUNKED + "1;", b"a", 100_000_000),
    "trailers": endless(CHUNKED + "0\r\n", b"X-A: b\r\n", 50_000_000),
    "chunks_of_one_byte": raw(CHUNKED, "1\r\n[\r\n" * 200_000, "0\r\n\r\n"),
    "expects": raw(POST, "KEY", "Expect: 100-continue\r\nContent-Length: 100\r\n\r\n"),
    "expects_else": raw(POST, "KEY", f"Expect: more\r\nContent-Length: {len(SMALL)}\r\n\r\n", SMALL),
    "packed": raw(POST, "KEY", "Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n", b"\x1f\x8b" + bytes(18)),
    "on_get": raw("GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 15000000\r\n\r\n", "a" * 15_000_000),
    "pipelined_health": raw(HEALTH * 10_000),
    "pipelined_posts": raw(WHOLE * 300),
    "pipelined_unauthorized": raw("GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000),
    "smuggled": raw(POST, "KEY", f"Content-Length: {len(SMALL)}\r\n\r\n", SMALL, "GET /v1/mod"),
}
HELD = {
    "nothing_sent_300": held(300),
    "half_line_300": held(300, "GET /hea"),
    "half_head_300": held(300, "GET /health HTTP/1.1\r\nHost: x\r\nX-A: "),
    "half_head_dripping_300": held(300, "GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", drip=b"a"),
    "half_body_300": held(300, POST, "KEY", "Content-Length: 1000\r\n\r\n{"),
    "half_body_dripping_300": held(300, POST, "KEY", "Content-Length: 1000\r\n\r\n{", drip=b" "),
    "half_body_without_key_300": held(300, POST, "Content-Length: 1000\r\n\r\n{"),
    "half_chunks_300": held(300, CHUNKED, "5\r\nab"),
    "kept_alive_300": held(300, HEALTH),
    "unread_streams_30": slow_reader(LONG, 30),
    "unread_streams_300": slow_reader(LONG | {"max_tokens": 50}, 300),
    "unread_answers_30": slow_reader({"prompt": ["Hi"] * 100, "max_tokens": 1, "logprobs": 20}, 30),
}

SILENT = {
    "nothing_sent": silent(),
    "half_line": silent("GET /hea"),
    "half_head": silent("GET /health HTTP/1.1\r\nHost: x\r\nX-A: "),
    "half_head_dripping": silent("GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", drip=b"a"),
    "half_body": silent(POST, "KEY", "Content-Length: 1000\r\n\r\n{"),
    "half_body_dripping": silent(POST, "KEY", "Content-Length: 1000\r\n\r\n{", drip=b" "),
    "half_body_to_health": silent("GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nConnection: close\r\n\r\n"),
    "half_chunk": silent(CHUNKED, "5\r\nab"),
    "chunks_dripping": silent(CHUNKED, drip=b"1\r\n \r\n"),
}

ATTACKS: list[Attack] = [
    Attack(kind, name, act=act)
    for kind, members in {"heads": HEADS, "bodies": BODIES, "held": HELD, "silent": SILENT}.items()
    for name, act in members.items()
]
