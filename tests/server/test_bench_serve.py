"""`jaxengine bench serve`, against a real server and against one that does everything wrong."""

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from threading import Thread

import pytest

from jaxengine.bench.serve import LoadGenerator, Record, ServerApi, arrival_times, request_body, summarize
from jaxengine.cli.main import main
from tests.server.conftest import KEY, Server

SMALL = ["--num-prompts", "6", "--input-len", "12", "--output-len", "16", "--vocab", "200", "--temperature", "20"]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_run_measures_and_reports(server, tmp_path, capsys, endpoint):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra plot")
    report, plot = tmp_path / "new" / "report.json", tmp_path / "new" / "plot.png"
    command = ["bench", "serve", "--base-url", server.url, "--api-key", KEY, "--endpoint", endpoint, *SMALL]
    assert main([*command, "--request-rate", "50", "--json", str(report), "--plot", str(plot), "--quiet"]) == 0
    found = json.loads(report.read_text())
    (result,) = found["results"]
    assert (result["num_completed"], result["num_failed"], result["num_compilations"]) == (6, 0, 0)
    assert result["num_output_tokens"] == 6 * 16
    if endpoint == "completions":
        assert result["num_input_tokens"] == 6 * 12
    assert len(result["requests"]) == 6
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms"):
        figures = result[name]
        assert 0 <= figures["p50"] <= figures["p90"] <= figures["p99"]
    assert result["ttft_ms"]["p50"] < result["e2e_ms"]["p50"]
    assert found["environment"]["model"] == "tiny"
    assert found["environment"]["commit"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "time to first token" in shown
    assert "6" in shown


def test_a_model_without_weights_and_tokenizer(tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    server = Server(tmp_path, "--load-format", "dummy", "--skip-tokenizer-init", "--served-model-name", "shape")
    try:
        command = ["bench", "serve", "--base-url", server.url, *SMALL, "--quiet"]
        assert main([*command, "--json", "-"]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        assert result["num_output_tokens"] == 6 * 16
        assert 0 < result["ttft_ms"]["p50"] < result["e2e_ms"]["p50"]  # tokens are told as they come
        assert result["itl_ms"] is not None
        assert main([*command, "--endpoint", "chat"]) == 2
        assert "no tokenizer (skip_tokenizer_init)" in capsys.readouterr().err
        answer = server.post("/v1/completions", {"prompt": "text"}).json()["error"]
        assert answer["message"] == "prompt: prompt='text': there is no tokenizer; give prompt_token_ids"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "request_rate=0.0"),
        (["--request-rate", "nan"], "request_rate=nan"),
        (["--burstiness", "-1"], "burstiness=-1.0"),
        (["--num-prompts", "0"], "num_prompts=0"),
        (["--max-concurrency", "0"], "max_concurrency=0"),
        (["--endpoint", "embeddings"], "expected completions or chat"),
        (["--base-url", "127.0.0.1:80"], "must begin with http"),
        (["--base-url", "http://127.0.0.1:1"], "no answer"),
        (["--workload", "sharegpt"], "--dataset"),
        (["--plot", "plot.txt"], ".png"),
        (["--extra-body", "[]"], "JSON object"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_the_server_refuses_is_said_before_the_run(server, capsys):
    command = ["bench", "serve", "--base-url", server.url]
    assert main([*command, "--model", "tiny"]) == 2
    assert "401" in capsys.readouterr().err
    assert main([*command, "--api-key", KEY, "--model", "other"]) == 2
    assert "the server has tiny, alias" in capsys.readouterr().err
    assert main([*command, "--api-key", KEY]) == 2
    assert "--vocab" in capsys.readouterr().err


def test_arrivals_are_a_poisson_process():
    times = arrival_times(4000, 20.0, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)
    assert times == arrival_times(4000, 20.0, seed=3) != arrival_times(4000, 20.0, seed=4)
    assert arrival_times(3, float("inf")) == [0, 0, 0]


def test_figures_are_those_of_the_records():
    # Two tokens of 0.1 and 0.3 s after the first, which took 0.5 s.
    slow = Record(due=0.0, sent=1.0, token_times=[1.5, 1.6, 1.9], ended=1.9, num_input_tokens=4, num_output_tokens=3)
    failed = Record(due=0.5, sent=0.5, ended=9.0, error="500 no")
    result = summarize("w", [slow, failed], rate=2.0, max_concurrency=None)
    assert result.ttft_ms == {"mean": 500, "p50": 500, "p90": 500, "p99": 500}
    assert result.tpot_ms is not None
    assert result.tpot_ms["p50"] == pytest.approx(200)
    assert result.itl_ms == {"mean": 200, "p50": 100, "p90": 300, "p99": 300}
    assert result.e2e_ms is not None
    assert result.e2e_ms["p99"] == 900
    assert result.late_ms is not None
    assert result.late_ms["p99"] == 1000
    assert (result.num_failed, result.errors, result.seconds) == (1, {"500 no": 1}, 8.5)
    assert result.num_compilations is None


class WrongAnswers(BaseHTTPRequestHandler):
    """Answers in turn: an error, a stream that is cut, one that fails, one with odd lines that is right."""

    STREAM = b'data: {"choices": [{"text": "a"}]}\r\n\r\n'
    ANSWERS = (
        (503, b'{"error": {"message": "busy"}}'),
        (200, STREAM),
        (200, STREAM + b'data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n'),
        (200, b": hello\r\nevent: x\r\n" + STREAM + b'data: {"choices": [{"text": "b"}]}\n\ndata: [DONE]\n\n'),
    )
    num_asked = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, data = self.ANSWERS[WrongAnswers.num_asked % len(self.ANSWERS)]
        WrongAnswers.num_asked += 1
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def wrong_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), WrongAnswers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_failures_are_told_apart(wrong_url):
    body = request_body("completions", "m", [1], 4, {})
    load = LoadGenerator(ServerApi(wrong_url), "completions", max_concurrency=1)
    records = asyncio.run(load.run([body] * 4, [0.0] * 4))
    assert [record.error for record in records] == ["503 busy", "the stream ended early", "200 broken", None]
    assert records[-1].num_output_tokens == 2  # no usage is told
