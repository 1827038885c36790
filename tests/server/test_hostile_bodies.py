"""Bodies of the server's own schema with hostile values: none is the server's fault, ends it, or holds it up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, note, settings

from tests.server.conftest import BEARER, MAX_BODY_SIZE
from tests.server.hostile.drawn import WHOLE, drawn_bodies
from tests.server.hostile.watch import GAP_SECONDS, HEALTH_SECONDS, HostileServer

ATTEMPTS = 3
"""A machine that has other work stalls by itself."""
COMMON: Any = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
LARGE = 1_000_000
SECONDS = 20.0
"""How long an answer takes at most: what holds a worker of grammars or templates is ended by then."""


def draw(openapi: dict[str, Any], path: str, size: int, count: int, check: Callable[[bytes], None]) -> None:
    @settings(max_examples=count, **COMMON)
    @given(drawn_bodies(openapi, path, size))
    def run(body: bytes) -> None:
        check(body)

    run()


def send(client: httpx.Client, path: str, body: bytes) -> float:
    """Checks the answer; returns how many seconds it took."""
    note(f"{path} {len(body)} bytes: {body[:2000]!r}")
    start = time.monotonic()
    answer = client.post(path, content=body)
    assert answer.status_code < 500, answer.text[:2000]
    assert b'"server_error"' not in answer.content
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
        assert len(answer.content) < 20_000  # what is quoted is shortened
    return time.monotonic() - start


@pytest.mark.parametrize("path", WHOLE)
def test_hostile_values(server, path):
    with httpx.Client(
        base_url=server.url, headers=BEARER | {"Content-Type": "application/json"}, timeout=SECONDS
    ) as client:
        openapi = server.get("/openapi.json", headers=BEARER).json()

        def check(body: bytes) -> None:
            send(client, path, body)
            assert client.get("/health").status_code == 200

        draw(openapi, path, MAX_BODY_SIZE // 4, 25, check)


@pytest.fixture(scope="module")
def watched(tiny):
    server = HostileServer(tiny)
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", WHOLE)
def test_large_hostile_values(watched, path):
    headers = BEARER | {"Content-Type": "application/json"}
    with httpx.Client(base_url=watched.server.url, headers=headers, timeout=2 * SECONDS) as client:
        openapi = client.get("/openapi.json").json()
        for _ in range(ATTEMPTS):
            taken: list[tuple[float, bytes]] = []

            def check(body: bytes, taken: list[tuple[float, bytes]] = taken) -> None:
                taken.append((send(client, path, body), body[:300]))

            with watched.watch() as seen:
                draw(openapi, path, LARGE, 200, check)
            slowest = sorted(taken)[-5:]
            print(f"{path}: /health {seen.health:.2f} s, the neighbour's gap {seen.gap:.2f} s, slowest {slowest}")
            assert seen.health_status == 200
            assert not seen.errors
            if seen.health <= HEALTH_SECONDS and seen.gap <= GAP_SECONDS:
                return
    pytest.fail(f"/health takes {seen.health:.2f} s, the neighbour waits {seen.gap:.2f} s; the slowest: {slowest}")
