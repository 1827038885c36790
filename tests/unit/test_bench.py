"""What is measured is what was meant to be measured."""

import hashlib
import json

import pytest

from jaxengine.bench import workloads
from jaxengine.bench.startup import measure_startup
from jaxengine.bench.throughput import percentiles
from jaxengine.bench.workloads import PresetRow, mixed, model_configs, sharegpt, uniform
from jaxengine.cli import bench
from jaxengine.cli.main import main

SMALL = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--max-model-len", "64", "--quiet"]


@pytest.mark.parametrize(
    ("workload", "checksum"),
    [
        (mixed(), "6fd41a8456df85ec"),
        (uniform(32, 128, 128), "b23895be0b75473e"),
        (uniform(1, 128, 128), "5b580761c0cb2210"),
        (workloads.cpu_preset()[2].workload, "e18bc808a95ceb1d"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_workloads_are_those_that_the_peers_ran(workload, checksum):
    """Recorded from the script that the peers' figures were measured with; (c) is ours."""
    assert hashlib.sha256(json.dumps(workload.requests).encode()).hexdigest()[:16] == checksum


def test_lengths_of_mixed():
    workload = mixed(50, 3, 9, output_lo=1, output_hi=2, vocab=10)
    assert {len(prompt) for prompt, _ in workload.requests} == set(range(3, 10))
    assert {output_len for _, output_len in workload.requests} == {1, 2}
    assert {token for prompt, _ in workload.requests for token in prompt} == set(range(11))


class Words:
    """A tokenizer of words."""

    def encode(self, text, add_special_tokens=True):
        return [len(word) for word in text.split()]


def test_sharegpt_leaves_out_what_is_too_short_or_too_long(tmp_path):
    def talk(question: int, answer: int) -> dict:
        return {"conversations": [{"from": "human", "value": "a " * question}, {"from": "gpt", "value": "b " * answer}]}

    entries = [talk(5, 6), talk(3, 9), talk(9, 3), talk(2000, 9), talk(9, 2040), {"conversations": []}, "nonsense"]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([*entries, {"prompt": "a b c d", "output_len": 7}]))
    requests = sharegpt(path, Words(), 10).requests
    assert sorted((len(prompt), output_len) for prompt, output_len in requests) == [(4, 7), (5, 6)]
    assert len(sharegpt(path, Words(), 1).requests) == 1
    path.write_text(json.dumps(entries[1:]))
    with pytest.raises(ValueError, match="no conversation"):
        sharegpt(path, Words(), 10)


def test_percentiles_are_measured_values():
    assert percentiles(range(1, 101)) == {"p50": 50, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3.0, "p99": 3.0}


def test_configurations_are_supported():
    from jaxengine.models.config import ModelConfig

    assert set(model_configs()) == {"llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b"}
    for path in model_configs().values():
        assert ModelConfig.from_hf(json.loads(path.read_text())).num_layers >= 16


def test_names_become_configurations_and_given_arguments_stay():
    chosen = bench.bench_engine_args({"model": "qwen3-0.6b", "load_format": "dummy", "max_num_seqs": 3})
    assert chosen["model"] == str(model_configs()["qwen3-0.6b"])
    assert chosen["max_model_len"] == 4608
    assert chosen["skip_tokenizer_init"] is True
    assert bench.bench_engine_args({"enable_prefix_caching": True})["enable_prefix_caching"] is True


def test_throughput_of_a_model_without_weights(tiny, tmp_path, capsys):
    """Only the configuration is there; nothing is compiled while measuring, or the exit code would be 1."""
    config = tmp_path / "some-model.json"
    config.write_text((tiny / "config.json").read_text())
    argv = ["bench", "throughput", "--model", str(config), "--load-format", "dummy", "--workload", "mixed"]
    assert main([*argv, "--num-prompts", "4", "--lo", "3", "--hi", "20", "--repeat", "2", "--json", "-", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    (result,) = report["results"]
    expected = mixed(4, 3, 20, vocab=260)
    assert result["num_input_tokens"] == expected.num_input_tokens
    assert result["num_output_tokens"] == expected.num_output_tokens
    assert result["num_compilations"] == 0
    assert len(result["all_seconds"]) == 2
    assert 0 < result["num_decode_steps"] < result["num_steps"]
    assert 0 < result["first_token_ms"]["p50"] <= result["first_token_ms"]["p99"] < 1000 * result["seconds"] + 1
    assert report["environment"]["engine_args"]["load_format"] == "dummy"
    assert report["peak_rss_bytes"] > 10**8


def test_preset_shows_the_peers_beside_our_figures(tiny, tmp_path, capsys, monkeypatch):
    rows = [
        PresetRow(uniform(1, 5, 6, vocab=200, name="alone"), {"other": 37.5}, {"other": 143}, 30, 200),
        PresetRow(uniform(3, 5, 6, vocab=200, name="three"), {"other": 11.5, "another": 12}, {}, 10**9),
    ]
    monkeypatch.setattr(bench, "cpu_preset", lambda: rows)
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "report.json"
    assert main(["bench", "throughput", "--preset", "cpu", "--model", str(tiny), "--json", str(file), *SMALL]) == 0
    out = capsys.readouterr().out
    for text in ("alone", "three", "37.5", "143 ms", "another", ">= 30", "<= 200 ms", "2026-11-23", "Most memory"):
        assert text in out, text
    report = json.loads(file.read_text())
    assert [result["workload"] for result in report["results"]] == ["alone", "three"]
    assert report["compared_with"][0]["peers"] == {"other": 37.5}


def test_compilations_while_measuring_are_told(tiny, capsys):
    """An engine that was not warmed up; `measure` counts, and the command would fail."""
    from rich.console import Console

    from jaxengine import LLM
    from jaxengine.bench.report import print_throughput
    from jaxengine.bench.throughput import measure

    with LLM(str(tiny), max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32, warmup="none") as llm:
        result = measure(llm, uniform(1, 3, 4, vocab=200))
    assert result.num_compilations > 0
    about = {"num_devices": 1, "devices": ["cpu"], "cores": 1, "cpu": "", "jax": "", "commit": None, "date": ""}
    print_throughput(Console(width=150), [result], about)
    assert "WRONG FIGURES" in capsys.readouterr().out


def test_startup_in_a_fresh_process(tiny):
    (result,) = measure_startup(["--model", str(tiny), "--max-model-len", "64", "--ignore-eos"], warm_starts=0)
    assert result.cache == "cold"
    assert 0 < result.first_token_s < result.exit_s
    assert (result.peak_rss_bytes or 10**9) > 10**8


def test_startup_tells_what_went_wrong(capsys):
    assert main(["bench", "startup", "--model", "/no/such/model"]) == 2
    assert "does not exist" in capsys.readouterr().err
