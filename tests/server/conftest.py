"""Servers in processes of their own, for all tests of this folder."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.server.scripted import TEMPLATE, write_scripted_model

KEY = "secret"
ORIGIN = "https://chat.example"
MAX_NUM_SEQS, MAX_QUEUE = 8, 40
ROOM = MAX_NUM_SEQS + MAX_QUEUE
MAX_BODY_SIZE = 20_000
SHUTDOWN_SECONDS = 3.0
README_NAME = "smollm2-135m-instruct"
# The shapes are those of tests/engine/test_async_llm.py: what is compiled there is not compiled here.
ENGINE = (
    *("--max-model-len", "1000", "--max-num-batched-tokens", "64", "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--num-gpu-blocks-override", "60", "--warmup", "lazy", "--dtype", "float32"),
)


class Server:
    """`jaxengine serve` on a free port."""

    def __init__(self, model: Path, *arguments: str):
        command = [sys.executable, "-m", "jaxengine", "serve", str(model), "--port", "0", *ENGINE, *arguments]
        environment = os.environ | {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds; spans need not wait in tests
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._found = threading.Event()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def url(self) -> str:
        """Waits until the server listens."""
        deadline = time.monotonic() + 300  # importing and compiling take long on a machine that has other work
        while not (found := re.search(r"on (http://\S+)\n", "".join(self.lines))):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)
        return found[1]

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **{"timeout": 60, "headers": BEARER, **options})

    def call(self, method: str, path: str, **options) -> httpx.Response:
        return httpx.request(method, self.url + path, **options)

    def metrics(self) -> dict[str, float]:
        """Values by name, those with several labels by all of them."""
        lines = [line.rpartition(" ") for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {re.sub(r'\{model_name="[^"]*"\}', "", name): float(value) for name, _, value in lines}

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def wait_until_idle(self) -> None:
        """Waits until nothing runs and no page is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        wait_until(lambda: not any(self.metrics()[f"jaxengine:{name}"] for name in names))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


BEARER = {"Authorization": f"Bearer {KEY}"}


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Collector(ThreadingHTTPServer):
    """Takes OpenTelemetry's spans.

    Attributes:
        spans: What has come.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TakeSpans)
        self.spans: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class _TakeSpans(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        assert isinstance(self.server, Collector)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            about = {item.key: item.value.string_value for item in resource.resource.attributes}
            for span in [span for scope in resource.scope_spans for span in scope.spans]:
                values = {item.key: item.value for item in span.attributes}
                kinds = {name: value.WhichOneof("value") or "" for name, value in values.items()}
                self.server.spans.append(
                    {
                        "name": span.name,
                        "trace": span.trace_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "service": about["service.name"],
                        "attributes": {name: getattr(value, kinds[name]) for name, value in values.items()},
                    }
                )
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield collector
        collector.shutdown()


@pytest.fixture(scope="session")
def servers(tiny, collector, session_folder) -> Iterator[tuple[Server, Server]]:
    limits = ("--max-queue", str(MAX_QUEUE), "--max-body-size", str(MAX_BODY_SIZE))
    first = Server(
        tiny,
        *("--api-key", "another", "--api-key", KEY, "--served-model-name", "tiny", "--served-model-name", "alias"),
        *limits,
        *("--allowed-origins", ORIGIN),
        *("--enable-log-requests", "--otlp-traces-endpoint", collector.url),
    )
    assert first.url  # what it compiles the second one finds in the cache
    second = Server(
        tiny,
        *("--served-model-name", README_NAME, "--request-timeout", "1.5"),
        *("--enable-dev-endpoints", "--profiler-dir", str(session_folder / "profiles")),
    )
    yield first, second
    first.close()
    second.close()


@pytest.fixture(scope="session")
def server(servers) -> Server:
    """One with keys and limits, which logs and traces requests."""
    return servers[0]


@pytest.fixture(scope="session")
def open_server(servers) -> Server:
    """One without keys, in which requests may take 1.5 seconds, with development endpoints."""
    return servers[1]


@pytest.fixture(scope="session")
def client(server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of the model that follows scripts, which may call tools and thinks."""
    folder = tmp_path_factory.mktemp("scripted")
    write_scripted_model(folder)
    (folder / "template.jinja").write_text(TEMPLATE)
    server = Server(
        folder,
        *("--served-model-name", "scripted", "--chat-template", str(folder / "template.jinja")),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
        "--trust-request-chat-template",
    )
    yield server
    server.close()
