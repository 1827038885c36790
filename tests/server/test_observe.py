"""What is told of requests: their ids, lines of the log, spans of traces."""

import re

import pytest

from jaxengine.cli.main import main
from jaxengine.metrics import FinishedRequest
from jaxengine.outputs import RequestMetrics
from jaxengine.sampling_params import SamplingParams
from tests.server.conftest import BEARER, wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(("path", "kind"), [("completions", "cmpl"), ("chat/completions", "chatcmpl")])
def test_a_call_keeps_the_id_it_brings(server, path, kind):
    body = (
        {"max_tokens": 2, "prompt": "x"}
        if kind == "cmpl"
        else {"max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    )
    answer = server.post(f"/v1/{path}", body, headers=BEARER | {"X-Request-Id": "mine/1"})
    assert answer.headers["x-request-id"] == "mine/1"
    assert answer.json()["id"] == f"{kind}-mine/1"
    other = server.post(f"/v1/{path}", body)
    assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"])
    assert other.json()["id"] == f"{kind}-{other.headers['x-request-id']}"
    for wrong in ("a b", "x" * 201, "\x85"):
        answer = server.post(f"/v1/{path}", body, headers=BEARER | {"X-Request-Id": wrong.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_errors_have_ids_too(server):
    headers = {"X-Request-Id": "mine"}
    for answer in (server.get("/v1/models", headers=headers), server.get("/v1/no", headers=BEARER | headers)):
        assert answer.status_code in (401, 404)
        assert answer.headers["x-request-id"] == "mine"


def test_the_same_id_twice_at_once(server, client):
    """A client that tries again does so with the same id."""
    both = {"extra_headers": {"X-Request-Id": "again"}, "extra_body": {"ignore_eos": True}}
    with client.completions.create(model="tiny", prompt="x", max_tokens=400, stream=True, **both) as stream:
        next(iter(stream))
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1, **both).id == "cmpl-again"


def test_requests_are_logged(server):
    body = {"prompt": "Hello", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", body, headers=BEARER | {"X-Request-Id": "logged"})

    def lines():
        return [line for line in server.lines if "cmpl-logged-" in line]

    wait_until(lambda: len(lines()) == 2)
    received, finished = lines()
    assert "received request" in received
    assert "/v1/completions, 5 prompt tokens" in received
    assert "max_tokens=3" in received
    assert "presence_penalty" not in received
    assert re.search(r"finished request \S+: length, 3 tokens, queued \S+ s, first token after \S+ s", finished)


def test_spans_reach_a_collector(server, collector):
    headers = BEARER | {"X-Request-Id": "traced", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"prompt": ["Hello", "you"], "max_tokens": 3, "temperature": 0.5, "ignore_eos": True}
    assert server.post("/v1/completions", body, headers=headers).status_code == 200

    def spans():
        return [span for span in collector.spans if span["attributes"]["gen_ai.request.id"].startswith("cmpl-traced-")]

    wait_until(lambda: len(spans()) == 2)
    for span in spans():
        attributes = span["attributes"]
        assert (span["name"], span["trace"], span["parent"]) == ("llm_request", TRACE, PARENT)
        assert attributes["gen_ai.usage.completion_tokens"] == 3
        assert 0 < attributes["gen_ai.latency.time_to_first_token"] <= attributes["gen_ai.latency.e2e"]
        assert 0 <= attributes["gen_ai.latency.time_in_queue"] < attributes["gen_ai.latency.e2e"]
    assert sorted(span["attributes"]["gen_ai.usage.prompt_tokens"] for span in spans()) == [3, 5]
    assert {span["service"] for span in spans()} == {"jaxengine"}


def test_a_span_has_vllms_names():
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: the extra otel")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from jaxengine.server.tracing import RequestTracer

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = RequestTracer(provider, "tiny")
    metrics = RequestMetrics(
        arrival_time=100.0,
        scheduled_time=100.5,
        first_token_time=101.5,
        last_token_time=104.0,
        finished_time=104.25,
        num_prompt_tokens=7,
        num_generation_tokens=9,
    )
    params = SamplingParams(n=2, max_tokens=12, temperature=0.5, top_p=0.75)
    tracer.begin("a", {})
    tracer.end(FinishedRequest("a", params, metrics, ["stop", "length"]))
    tracer.end(FinishedRequest("b", params, RequestMetrics(arrival_time=1.0, finished_time=3.0), ["abort"]))
    whole, aborted = exporter.get_finished_spans()
    assert (whole.start_time, whole.end_time) == (100_000_000_000, 104_250_000_000)
    assert dict(whole.attributes or {}) == {
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.request.id": "a",
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.n": 2,
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 9,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_to_first_token": 1.5,
        "gen_ai.latency.time_in_model_prefill": 1.0,
        "gen_ai.latency.time_in_model_decode": 2.5,
        "gen_ai.latency.time_in_model_inference": 3.5,
        "gen_ai.latency.e2e": 4.25,
    }
    assert "gen_ai.latency.time_to_first_token" not in (aborted.attributes or {})
    assert tracer._contexts == {}
    tracer.close()


def test_wrong_arguments(capsys):
    assert main(["serve", "--otlp-traces-endpoint", "grpc://localhost:4317"]) == 2
    assert "OTLP over HTTP" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--uvicorn-log-level", "loud"])
