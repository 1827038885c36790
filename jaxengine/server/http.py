"""HTTP connections with bounds that come before keys and endpoints: bytes of headers, seconds of silence, how many."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any, ClassVar, override

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 2**16
"""Of a request's first line, its headers, and what may follow its body."""
MAX_HEADERS = 128
HEADER_SECONDS = 10.0
"""What a request's headers may take to arrive, once the connection is there or their first byte has come."""
BODY_SECONDS = 30.0
MIN_BODY_BYTES = 2**13
"""So many more bytes of a body must have arrived after every `BODY_SECONDS`, while somebody reads it."""
MAX_CONNECTIONS = 2**16
PROBES = (b"/health", b"/ping", b"/metrics")
"""What is answered even where no more connections are taken."""
TOO_MANY = "too many connections"

_PHRASES = {
    400: ("Bad Request", "invalid_request"),
    408: ("Request Timeout", "request_timeout"),
    413: ("Content Too Large", "body_too_large"),
    431: ("Request Header Fields Too Large", "headers_too_large"),
    503: ("Service Unavailable", "too_many_connections"),
}


def max_connections() -> int:
    """Raises the limit of open files as far as it goes; returns how many connections it leaves room for.

    A quarter of what is not open yet is left to the server itself, and to connections that are being closed.
    """
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    folder = Path("/dev/fd")
    num_open = len(list(folder.iterdir())) if folder.exists() else 64
    room = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else (soft - num_open) * 3 // 4
    return max(1, min(room, MAX_CONNECTIONS))


def bounded_protocol(max_body_size: int, num_allowed: int) -> type[BoundedProtocol]:
    """Returns the protocol of one server. Args: max_body_size, num_allowed: See `BoundedProtocol`."""
    members = {"max_body_size": max_body_size, "num_allowed": num_allowed, "_idle": {}, "_unfinished": {}}
    return type("ServerProtocol", (BoundedProtocol,), members)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with httptools' parser, and bounds.

    What is beyond one is answered if that can be done, and the connection is closed.

    Attributes:
        num_allowed: Connections at most. One that comes beyond takes the place of the one that has been without a
            request for longest, or else of the one whose body has been arriving for longest. If all have whole
            requests, it may ask for `PROBES`; anything else is answered 503.
        max_body_size: Bytes of a body, whether anybody reads it or not.
    """

    num_allowed: ClassVar[int]
    max_body_size: ClassVar[int]
    _idle: ClassVar[dict[BoundedProtocol, None]]  # without a request, those that have been so for longest first
    _unfinished: ClassVar[dict[BoundedProtocol, None]]  # whose bodies are arriving, likewise

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_headers = self._is_in_body = self._has_begun = self._refused = self._is_extra = False
        self._num_bytes = 0  # of a request, framing included
        self._num_headers = self._num_header_bytes = 0
        self._num_other_bytes = 0  # that have come without any of a body
        self._num_body_bytes = self._num_before = 0
        self._timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self.num_allowed:
            oldest = next(iter(self._idle or self._unfinished), None)
            if oldest is not None:
                oldest._drop()
                oldest.transport.abort()  # what it has not read yet must not keep it open
            elif len(self.connections) > self.num_allowed + max(self.num_allowed // 16, 4):
                self._refuse(503, TOO_MANY)
                return
            else:
                self._is_extra = True
        self._idle[self] = None
        self._timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._unfinished.pop(self, None)
        self._cancel_timer()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._refused or self.parser is None:
            return
        self._unset_keepalive_if_required()
        num_before, self._has_begun = self._num_body_bytes, False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(400, "this is no HTTP request")
        if self._refused:
            return
        self._num_bytes += len(data)
        if self._num_bytes > 2 * self.max_body_size + MAX_HEADER_BYTES:  # many tiny chunks
            self._refuse(413, f"the body and its chunks are larger than {2 * self.max_body_size} bytes")
            return
        # A piece may hold the end of one request too: that in which one begins does not count.
        self._num_other_bytes += 0 if self._has_begun or self._num_body_bytes > num_before else len(data)
        if self._num_other_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"headers of at most {MAX_HEADER_BYTES} bytes are accepted")
        elif self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        """What is still to come has its time."""
        if self._is_in_headers:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)
        elif self._is_in_body:
            self._watch_body()
        elif (self.cycle is None or self.cycle.response_complete) and self.timeout_keep_alive_task is None:
            # uvicorn's own timer has ended with what came after an answer, as the rest of a body that nobody read.
            keep = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = keep

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers = self._has_begun = True
        self._num_headers = self._num_header_bytes = self._num_other_bytes = self._num_body_bytes = 0
        self._num_bytes = 0

    @override
    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1  # those after a chunked body too
        self._count_header(len(name) + len(value))
        super().on_header(name, value)

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_headers > MAX_HEADERS or self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are accepted")
            raise _RefusedError

    @override
    def on_headers_complete(self) -> None:
        self._cancel_timer()
        self._is_in_headers, self._is_in_body = False, True
        self._idle.pop(self, None)
        self._unfinished[self] = None
        if self._is_extra and self.url.partition(b"?")[0] not in PROBES:
            self._is_in_headers = True  # there is no cycle of this request yet
            self._refuse(503, TOO_MANY)
            raise _RefusedError
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        # Whoever reads a body that is too large says so; nobody reads that of a request without a key.
        if self._num_body_bytes > self.max_body_size and self.cycle.response_complete:
            self._drop()
            return
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._unfinished.pop(self, None)
        self._cancel_timer()
        super().on_message_complete()

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._idle[self] = None

    def _headers_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # the beginning of a next request waits for the end of this one
        if self._is_in_headers:
            self._refuse(408, f"the headers of a request must arrive within {HEADER_SECONDS:g} seconds")
        else:  # nothing has come: nothing is answered
            self._drop()

    def _watch_body(self) -> None:
        self._num_before = self._num_body_bytes
        self._timer = self.loop.call_later(BODY_SECONDS, self._check_body)

    def _check_body(self) -> None:
        self._timer = None
        is_read = not self.flow.read_paused
        if is_read and self._num_body_bytes - self._num_before < MIN_BODY_BYTES:
            self._refuse(408, f"at least {MIN_BODY_BYTES} bytes of a body must arrive in {BODY_SECONDS:g} seconds")
        else:
            self._watch_body()

    def _refuse(self, status: int, message: str) -> None:
        """Answers, unless an answer has begun, and closes."""
        self._refused = True
        if self.transport.is_closing():
            return
        # The request whose headers come has no cycle yet: the last one is that of the request before.
        is_answered = self.cycle is not None and self.cycle.response_started
        if not is_answered or (self._is_in_headers and self.cycle.response_complete):
            phrase, code = _PHRASES[status]
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = json.dumps({"error": error}).encode()
            head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self._drop()

    def _drop(self) -> None:
        self._refused = True
        self._idle.pop(self, None)
        self._unfinished.pop(self, None)
        self._cancel_timer()
        self.transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _RefusedError(Exception):
    """Ends the parsing of a request that has been refused."""
