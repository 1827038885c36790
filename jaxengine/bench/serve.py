"""Sends a workload to a server that speaks OpenAI's API, and measures the answers as their readers see them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import statistics
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp  # half of httpx's time for an event, which is what bounds a load generator of one process

from jaxengine.bench.throughput import percentiles

RANKS = (50, 90, 99)
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
TEST_LEN = 8
"""Output tokens at most of the request that is sent before all others."""
CALL_SECONDS = 60.0
KEEPALIVE_SECONDS = 3.0
"""Shorter than servers keep idle connections (uvicorn: 5): none is used just as it is closed."""
MAX_LINE = 2**20
"""Bytes of a line of a stream at most."""


class ServerApi:
    """The server's small endpoints, and how to reach the others."""

    def __init__(self, base_url: str, api_key: str | None = None):
        """Args: base_url: With or without /v1 at its end.

        Raises:
            ValueError: It is no URL.
        """
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r}: must begin with http:// or https://")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def call(self, path: str, body: Any = None) -> Any:
        """GETs or, with a body, POSTs; returns the answer's JSON.

        Raises:
            ValueError: The server does not answer, or answers with an error.
        """
        return json.loads(self._read(path, body))

    def metrics(self) -> dict[str, float] | None:
        """Returns the values of /metrics without labels; None if the server is not ours."""
        try:
            lines = self._read("/metrics").decode().splitlines()
        except ValueError:
            return None
        found = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name.startswith("jaxengine"):
                found[name.partition("{")[0]] = float(value)
        return found or None

    def _read(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(f"{path}: {failure(error.code, error.read())}") from error
        except OSError as error:  # what URLError is too
            raise ValueError(f"base_url={self.base_url!r}: no answer: {getattr(error, 'reason', error)}") from error


class ServerTokenizer:
    """The server's tokenizer, as far as workloads need one."""

    def __init__(self, api: ServerApi, model: str):
        self._api, self._model = api, model

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a text."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": add_special_tokens}
        return self._api.call("/tokenize", body)["tokens"]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return self._api.call("/detokenize", {"model": self._model, "tokens": list(token_ids)})["prompt"]


@dataclass
class Record:
    """One request; times are seconds since the run began.

    Attributes:
        due: When it should have been sent.
        sent: When it was.
        token_times: When each event with text arrived.
        ended: When the last event did.
        num_input_tokens: As the server counts them, or as it was sent.
        num_output_tokens: As the server counts them, or one for each event.
        error: Why it failed, if it did.
    """

    due: float
    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return (self.token_times or [self.ended])[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None if there is none, or if all text came at once."""
        num_later = self.num_output_tokens - 1
        return (self.e2e - self.ttft) / num_later if num_later > 0 and len(self.token_times) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between events with text."""
        return [after - before for before, after in pairwise(self.token_times)]

    def to_json(self) -> dict[str, Any]:
        """Returns times, in seconds, and counts."""
        times = {"sent": self.sent, "ttft": self.ttft, "e2e": self.e2e} if self.error is None else {"sent": self.sent}
        counts = {"num_input_tokens": self.num_input_tokens, "num_output_tokens": self.num_output_tokens}
        return {name: round(value, 6) for name, value in times.items()} | counts | {"error": self.error}


@dataclass
class ServeResult:
    """Figures of a run. Latencies are of the requests that succeeded: "mean", "p50", "p90", "p99", in ms.

    Attributes:
        workload: Its name.
        request_rate: Requests a second that were meant to be sent; None: all at once.
        max_concurrency: Requests at once at most; None: no limit.
        num_completed: Requests that succeeded.
        num_failed: The others.
        errors: Why, and how often.
        num_input_tokens: Of the requests that succeeded.
        num_output_tokens: Of the same.
        seconds: From the first request sent to the end of the last.
        ttft_ms: Time to the first token; None like the others if there is nothing to measure.
        tpot_ms: Time for each later token, a mean for each request.
        itl_ms: Times between events of a stream; a server may send several tokens in one.
        e2e_ms: Time to the end of the answer.
        late_ms: How much later than meant requests were sent; large if `max_concurrency` held them up, or if the load
            generator is too slow.
        num_cached_tokens: Prompt tokens that the server had in its prefix cache; None if it does not tell.
        num_compilations: Compilations in the server. If not 0, the figures are wrong. None if it does not tell.
        records: The requests, in the order in which they were due.
    """

    workload: str
    request_rate: float | None
    max_concurrency: int | None
    num_completed: int
    num_failed: int
    errors: dict[str, int]
    num_input_tokens: int
    num_output_tokens: int
    seconds: float
    ttft_ms: dict[str, float] | None
    tpot_ms: dict[str, float] | None
    itl_ms: dict[str, float] | None
    e2e_ms: dict[str, float] | None
    late_ms: dict[str, float] | None
    num_cached_tokens: int | None
    num_compilations: int | None
    records: list[Record] = field(repr=False)

    @property
    def requests_per_s(self) -> float:
        """Requests completed in a second."""
        return self.num_completed / self.seconds

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated in a second."""
        return self.num_output_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Tokens of prompts and outputs in a second."""
        return (self.num_input_tokens + self.num_output_tokens) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Returns all figures, without the records."""
        rates = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
        values = {name: value for name, value in vars(self).items() if name != "records"}
        values |= {name: round(getattr(self, name), 3) for name in rates} | {"seconds": round(self.seconds, 4)}
        return values | {"requests": [record.to_json() for record in self.records]}


def failure(status: int, data: bytes) -> str:
    """Returns what went wrong, in a line."""
    try:
        message = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode("utf-8", "replace").strip()[:200]
    return f"{status} {message}".strip()


def arrival_times(num_requests: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Returns the seconds at which requests are due.

    Args:
        num_requests: How many.
        rate: Requests a second, on average; infinity: all at 0.
        burstiness: Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, more is
            steadier.
        seed: Of the draws.
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(num_requests):
        times.append(now)
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def request_body(endpoint: str, model: str, prompt: list[int] | str, output_len: int, options: dict[str, Any]) -> Any:
    """Returns the body of a request for a stream; a chat's prompt is text."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    fields = {"model": model, "max_tokens": output_len, "stream": True, "stream_options": {"include_usage": True}}
    return asked | fields | options


class LoadGenerator:
    """Sends requests when they are due, and records their answers."""

    def __init__(self, api: ServerApi, endpoint: str, *, max_concurrency: int | None = None):
        """Args: endpoint: A key of `PATHS`. max_concurrency: Requests at once at most."""
        self._url, self._headers = api.base_url + PATHS[endpoint], api.headers
        self._places = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
        self._start = 0.0

    async def run(
        self, bodies: Sequence[Any], due: Sequence[float], on_done: Callable[[Record], None] = lambda record: None
    ) -> list[Record]:
        """Sends bodies at their times; returns when all have been answered.

        Args:
            bodies: See `request_body`.
            due: Seconds from now, ascending.
            on_done: Called with each request that has ended.
        """
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as session:
            self._start = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                sending = []
                for body, moment in zip(bodies, due, strict=True):
                    await asyncio.sleep(max(0.0, moment - self._now()))
                    sending.append(tasks.create_task(self._one(session, body, Record(moment), on_done)))
        return [task.result() for task in sending]

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _one(
        self, session: aiohttp.ClientSession, body: Any, record: Record, on_done: Callable[[Record], None]
    ) -> Record:
        if self._places is not None:
            await self._places.acquire()
        record.sent = self._now()
        try:
            async with session.post(self._url, data=json.dumps(body)) as answer:
                if answer.status == 200:
                    await self._read(answer, record)
                else:
                    record.error = failure(answer.status, await answer.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            record.ended = record.ended or self._now()
            if self._places is not None:
                self._places.release()
        on_done(record)
        return record

    async def _read(self, answer: aiohttp.ClientResponse, record: Record) -> None:
        record.error = "the stream ended early"
        async with contextlib.aclosing(_events(answer.content)) as events:
            async for data in events:
                if data == b"[DONE]":
                    record.error = None
                    break
                event = json.loads(data)
                if "error" in event:
                    record.error = failure(answer.status, data)
                    return
                self._take(event, record)
        if record.error is None and not record.ended:
            record.error = "the stream has no choices"

    def _take(self, event: dict[str, Any], record: Record) -> None:
        if event.get("choices"):
            record.ended = self._now()
            choice = event["choices"][0]
            delta = choice.get("delta", {})
            # A server without a tokenizer has token ids to tell, and no text.
            if (
                choice.get("text")
                or choice.get("token_ids")
                or any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))
            ):
                record.token_times.append(record.ended)
                record.num_output_tokens += 1
        if usage := event.get("usage"):
            record.num_input_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
    """Yields the data of a stream's events.

    Lines are found here, in whatever has come: a reader that is behind does not wait for each of them.

    Raises:
        ValueError: A line is too long.
    """
    rest = b""
    async for block in content.iter_any():
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > MAX_LINE:
            raise ValueError(f"a line of the stream has more than {MAX_LINE} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def summarize(
    workload: str,
    records: list[Record],
    *,
    rate: float,
    max_concurrency: int | None,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
) -> ServeResult:
    """Figures of a run.

    Args:
        before: `ServerApi.metrics()` before the run.
        after: The same after it.
    """
    good = [record for record in records if record.error is None]

    def gained(name: str) -> int | None:
        if before is None or after is None or name not in after:
            return None
        return int(after[name] - before.get(name, 0))

    return ServeResult(
        workload=workload,
        request_rate=None if math.isinf(rate) else rate,
        max_concurrency=max_concurrency,
        num_completed=len(good),
        num_failed=len(records) - len(good),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        num_input_tokens=sum(record.num_input_tokens for record in good),
        num_output_tokens=sum(record.num_output_tokens for record in good),
        seconds=max(r.ended for r in records) - min(r.sent for r in records),
        ttft_ms=_figures([record.ttft for record in good]),
        tpot_ms=_figures([tpot for record in good if (tpot := record.tpot) is not None]),
        itl_ms=_figures([itl for record in good for itl in record.itl]),
        e2e_ms=_figures([record.e2e for record in good]),
        late_ms=None if math.isinf(rate) else _figures([record.sent - record.due for record in records]),
        num_cached_tokens=gained("jaxengine:prefix_cache_hits_total"),
        num_compilations=gained("jaxengine_compilations_total"),
        records=records,
    )


def _figures(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = [value * 1000 for value in seconds]
    return {"mean": round(statistics.fmean(values), 3), **percentiles(values, RANKS)}
