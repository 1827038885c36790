"""Clients that leave and clients that are slow, in one process with the server: nothing of them can hide."""

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from jaxengine.engine.async_llm import AsyncLLM, RequestStream
from jaxengine.engine_args import EngineArgs
from jaxengine.server.app import make_app
from jaxengine.server.generation import EventStream
from jaxengine.server.run import bind
from jaxengine.server.state import ServerSettings
from tests.server.conftest import MAX_NUM_SEQS

SETTINGS = ServerSettings(("tiny",), max_queue=5000)
WAYS = ("before the body ends", "at once", "while it streams", "while it streams, rudely", "late", "at the end")
SMALL_BUFFER = 4096
ALLOWED_BYTES = {"server": 16 * 2**20, "core": 2**20}
"""What three crowds of 500 may add to a process: allocators keep some."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm(tiny, runner) -> Iterator[AsyncLLM]:
    # The shapes are those of the other servers.
    limits: dict[str, Any] = {"max_model_len": 1000, "max_num_batched_tokens": 64, "max_num_seqs": MAX_NUM_SEQS}
    args = EngineArgs(model=str(tiny), dtype="float32", warmup="lazy", num_gpu_blocks_override=60, **limits)
    with AsyncLLM(args) as llm:
        yield llm


@contextlib.asynccontextmanager
async def serving(llm: AsyncLLM) -> AsyncIterator[int]:
    """The port of a server in this event loop."""
    llm.start()
    with bind("127.0.0.1", 0) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)  # what a client does not read fills it soon
        config = uvicorn.Config(make_app(llm, SETTINGS), log_config=None, log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield sock.getsockname()[1]
        server.should_exit = True
        await task


def request(**fields: object) -> bytes:
    body = {"prompt": "x", "max_tokens": 60, "temperature": 20, "ignore_eos": True, "stream": True, **fields}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def vanish(port: int, draw: random.Random) -> None:
    """A client that leaves in one of many ways."""
    way = draw.choice(WAYS)
    data = request(n=draw.choice((1, 1, 3)), stream=way != "late", max_tokens=draw.randint(1, 100))
    await asyncio.sleep(draw.random())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data[:-5] if way == "before the body ends" else data)
    await writer.drain()
    if way == "late":
        await asyncio.sleep(draw.random())
    elif way == "at the end":
        await reader.read()
    elif way != "at once":
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(draw.random() * 3):
                for _ in range(draw.randint(0, 12)):
                    await reader.readuntil(b"\n\n")
    if way == "while it streams, rudely":
        writer.transport.abort()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def crowd(llm: AsyncLLM, num_clients: int, seed: int) -> None:
    """Clients that all leave; afterwards nothing is left of them."""
    async with serving(llm) as port:
        before = asyncio.all_tasks()
        draw = random.Random(seed)
        await asyncio.gather(*(vanish(port, random.Random(draw.random())) for _ in range(num_clients)))
        await until(lambda: llm.num_unfinished_requests == 0)
        await until(lambda: asyncio.all_tasks() == before)
        await until(lambda: not any(metric(llm, name) for name in ("running", "waiting")))
        await until(lambda: metric(llm, "kv_cache") == 0)
    gc.collect()
    left = [thing for thing in gc.get_objects() if isinstance(thing, RequestStream | EventStream)]
    assert left == []


async def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def metric(llm: AsyncLLM, part: str) -> float:
    (value,) = [metric.value for metric in llm.get_metrics() if metric.kind == "gauge" and part in metric.name]
    return value


def memory(pid: int) -> int:
    """Bytes that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_of_clients_that_vanish_nothing_is_left(llm, runner):
    runner.run(crowd(llm, 40, seed=1))


@pytest.mark.slow
def test_of_500_clients_that_vanish_nothing_is_left(llm, runner):
    """Nor do crowds add up: the least that is held after three of them is as much as after the three before."""
    processes = {"server": os.getpid(), "core": llm._client._process.pid}
    held: list[dict[str, int]] = []
    for seed in range(8):
        runner.run(crowd(llm, 500, seed))
        objects = {"objects": len(gc.get_objects())}
        held.append(objects | {name: memory(pid) for name, pid in processes.items()})
    # The first two make what is made once.
    before, after = ({name: min(one[name] for one in part) for name in held[0]} for part in (held[2:5], held[5:]))
    grown = {name: after[name] - before[name] for name in before}
    print("objects of the server, and bytes, gained by three crowds:", grown, "after each:", held)
    assert grown["objects"] < 3 * 500 / 2  # more than half of the clients come as far as a stream
    for name, allowed in ALLOWED_BYTES.items():
        assert grown[name] < allowed, name


async def slow_connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that holds little of what is not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=SMALL_BUFFER)


def text(data: bytes) -> str:
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_a_slow_reader_slows_nobody_else(llm, runner):
    # With log probabilities the answer is larger than all buffers between the server and a client that does not read.
    long = request(max_tokens=250, seed=7, logprobs=20)

    async def others(port: int) -> float:
        """Seconds that short requests take, one after the other."""
        started = time.perf_counter()
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(max_tokens=8, seed=1))
            assert b"[DONE]" in await reader.read()
            writer.close()
            await writer.wait_closed()
        return time.perf_counter() - started

    async def compare() -> None:
        async with serving(llm) as port:
            seconds, whole = {}, {}
            for kind in ("warm", "fast", "slow"):
                clients = [await slow_connection(port) for _ in range(3)]
                for _, writer in clients:
                    writer.write(long)
                reading = [asyncio.create_task(reader.read()) for reader, _ in clients if kind != "slow"]
                if kind != "warm":  # which waits for steps to be compiled
                    await until(lambda: metric(llm, "running") == 3)
                seconds[kind] = await others(port)
                # The engine does not wait for its readers either.
                if kind != "warm":
                    await until(lambda: metric(llm, "running") == 0)
                data = await asyncio.gather(*(reading or [reader.read() for reader, _ in clients]))
                whole[kind] = {text(answer) for answer in data}
                assert all(answer.rstrip().endswith(b"0") for answer in data)  # the last chunk
                for _, writer in clients:
                    writer.close()
                    await writer.wait_closed()
            assert len(whole["fast"]) == 1
            assert whole["slow"] == whole["fast"]
            assert seconds["slow"] < 2 * seconds["fast"] + 0.5, seconds

    runner.run(compare())
