"""What is measured is what was meant to be measured."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxengine.bench import gpu_figures, throughput
from jaxengine.bench.gpu_figures import Card, Figures, comparison
from jaxengine.bench.presets import CpuRow, GpuRow, cpu_preset, gpu_preset
from jaxengine.bench.throughput import percentiles
from jaxengine.bench.workloads import mixed, sharegpt, uniform
from jaxengine.cli import bench, bench_gpu
from jaxengine.cli.bench_common import bench_engine_args
from jaxengine.cli.main import main, parse_args
from jaxengine.loading.shapes import model_configs

SMALL = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--max-model-len", "64", "--quiet"]


@pytest.mark.parametrize(
    ("workload", "checksum"),
    [
        (mixed(), "6fd41a8456df85ec"),
        (uniform(32, 128, 128), "b23895be0b75473e"),
        (uniform(1, 128, 128), "5b580761c0cb2210"),
        (cpu_preset()[2].workload, "e18bc808a95ceb1d"),
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

    assert set(model_configs()) == {"llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "qwen3-0.6b", "smollm2-135m"}
    for path in model_configs().values():
        assert ModelConfig.from_hf(json.loads(path.read_text())).num_layers >= 16


def test_names_become_configurations_and_given_arguments_stay():
    chosen = bench_engine_args({"model": "qwen3-0.6b", "load_format": "dummy", "max_num_seqs": 3})
    assert chosen["model"] == str(model_configs()["qwen3-0.6b"])
    assert chosen["max_model_len"] == 4608
    assert chosen["skip_tokenizer_init"] is True
    assert bench_engine_args({"enable_prefix_caching": True})["enable_prefix_caching"] is True


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
        CpuRow(uniform(1, 5, 6, vocab=200, name="alone"), {"other": 37.5}, {"other": 143}, 30, 200),
        CpuRow(uniform(3, 5, 6, vocab=200, name="three"), {"other": 11.5, "another": 12}, {}, 10**9),
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


def test_step_clock_leaves_out_steps_next_to_prompts(monkeypatch):
    """Each call takes in a step and has dispatched the next; prompts are counted when they are dispatched."""
    stats = SimpleNamespace(num_prompt_tokens=0, num_steps_done=0)
    core: Any = SimpleNamespace(stats=stats, scheduler=SimpleNamespace(num_running=0))
    clock: Any = SimpleNamespace(now=0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    all_steps, together = throughput.StepClock(core), throughput.StepClock(core, 2)
    steps = [(8, 1), (16, 1), (20, 2), (20, 2), (20, 2), (20, 2), (20, 1), (20, 1)]
    for seconds, (num_prompt_tokens, num_running) in enumerate(steps, start=1):
        clock.now += seconds
        stats.num_prompt_tokens, core.scheduler.num_running = num_prompt_tokens, num_running
        stats.num_steps_done += 4 if seconds == 6 else 1
        all_steps.tick()
        together.tick()
    # The third call dispatched the last prompt, so the fourth step computed it. The sixth took in four steps.
    assert all_steps.decode_ms == [5000, *[1500] * 4, 7000, 8000]
    assert together.decode_ms == [5000, *[1500] * 4]


FLOORS = {
    "llama-3.1-8b": {(1, 1024): 5.05, (16, 1024): 5.74, (64, 1024): 7.96, (256, 1024): 16.8, (64, 4096): 16.5},
    "qwen3-0.6b": {(1, 128): 0.40, (16, 1024): 1.04, (64, 1024): 2.98, (256, 1024): 10.7},
    "llama-3.2-1b": {(1, 128): 0.82, (64, 1024): 1.56, (256, 1024): 3.78},
}
"""Milliseconds at 3.0 TB/s by (B, ctx), where contexts grow by 64: computed by hand from the shapes."""


def config_of(model: str) -> Any:
    from jaxengine.models.config import ModelConfig

    hf = json.loads(model_configs()[model].read_text())
    return SimpleNamespace(
        model=ModelConfig.from_hf(hf), dtype="bfloat16", weight_dtype="bfloat16", kv_cache_dtype="bfloat16"
    )


@pytest.mark.parametrize("model", FLOORS)
def test_floors_of_the_gpu_preset(model):
    from jaxengine.bench.floor import decode_bytes

    config = config_of(model)
    for (batch_size, context), floor in FLOORS[model].items():
        milliseconds = 1000 * decode_bytes(config, batch_size, context + 32) / 3.0e12
        assert milliseconds == pytest.approx(floor, rel=0.005, abs=0.006), (batch_size, context)
    rows = {(row.batch_size, row.context) for row in gpu_preset() if row.kind == "decode" and row.model == model}
    assert rows == set(FLOORS[model])


def test_bytes_of_a_decode_step(tiny):
    """2 layers of 64, FFN of 128, 4 and 2 heads of 16, a tied table of 261 tokens; in float32."""
    from jaxengine.bench.floor import kv_bytes, weight_bytes
    from jaxengine.models.config import ModelConfig

    hf = json.loads((tiny / "config.json").read_text())
    config: Any = SimpleNamespace(dtype="float32", weight_dtype="float32", kv_cache_dtype="float32")
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128 + 2 * 64
    for tied in (True, False):
        config.model = ModelConfig.from_hf(hf | {"tie_word_embeddings": tied})  # the head is as large as the table
        assert weight_bytes(config) == 4 * (2 * layer + 64 + 261 * 64)
    assert kv_bytes(config, 10.5) == 10.5 * 2 * 2 * (2 * 16) * 4
    hf |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    config.model = ModelConfig.from_hf(hf)
    assert kv_bytes(config, 10.5) == 8 * 2 * 2 * (2 * 16) * 4


def test_rows_of_the_gpu_preset():
    rows = gpu_preset()
    assert len({row.name for row in rows}) == len(rows) == 12 + 3 * 3
    assert Counter(row.model for row in rows) == {"llama-3.1-8b": 8, "qwen3-0.6b": 7, "llama-3.2-1b": 6}


@pytest.mark.parametrize(
    ("device_kind", "num_devices", "known"),
    [
        (
            "NVIDIA H100 80GB HBM3",
            1,
            {
                "llama-3.1-8b decode B=64 ctx=4096": (18.7, 18.0),
                "qwen3-0.6b decode B=1 ctx=128": (2.47, 1.0),
                "llama-3.2-1b decode B=256 ctx=1024": (6.64, 5.0),
                "llama-3.1-8b mixed B=256": (8514, 10000),
                "qwen3-0.6b prefill B=64 ctx=1024": (333855, 340000),
                "llama-3.2-1b first token B=1 ctx=1024": (10.7, 8),
            },
        ),
        (
            "NVIDIA H100 80GB HBM3",
            2,
            {
                "llama-3.1-8b decode B=256 ctx=1024": (12.9, 11.3),
                "llama-3.1-8b prefill B=64 ctx=1024": (72731, 74000),
            },
        ),
        (
            "NVIDIA H200",
            1,
            {
                "llama-3.1-8b decode B=64 ctx=4096": (13.92, 12.6),
                "qwen3-0.6b decode B=1 ctx=128": (1.70, 0.6),
                "llama-3.2-1b decode B=256 ctx=1024": (None, 3.5),
                "llama-3.1-8b mixed B=256": (9868, None),
                "qwen3-0.6b prefill B=64 ctx=1024": (414265, None),
                "llama-3.1-8b first token B=1 ctx=1024": (26.2, None),
                "llama-3.2-1b mixed B=256": (None, None),
            },
        ),
    ],
)
def test_figures_are_those_of_the_card(device_kind, num_devices, known):
    compared = comparison({device_kind}, num_devices)
    assert compared.card is not None
    assert compared.card.device_kind == device_kind
    rows = gpu_preset(num_devices)
    assert compared.figures.keys() == set(rows)  # each row of the preset, and nothing else
    by_name = {row.name: compared.of(row) for row in rows}
    for name, (vllm, goal) in known.items():
        assert (by_name[name].vllm, by_name[name].goal) == (vllm, goal), name


@pytest.mark.parametrize(
    ("device_kinds", "num_devices"),
    [
        (["cpu"], 1),
        (["NVIDIA H100 PCIe"], 1),
        (["NVIDIA H100 80GB HBM3 MIG 1g.10gb"], 1),
        (["NVIDIA H200"], 2),
        (["NVIDIA H100 80GB HBM3", "NVIDIA H200"], 1),
    ],
)
def test_other_devices_are_compared_with_nothing(device_kinds, num_devices):
    compared = comparison(device_kinds, num_devices)
    assert compared.card is None
    assert compared.note.startswith("No comparison: ")
    assert "\n" not in compared.note
    assert all(kind in compared.note for kind in device_kinds)
    assert {compared.of(row) for row in gpu_preset(num_devices)} == {Figures()}


def test_two_gpus_that_share_a_model():
    from jaxengine.bench.floor import kv_bytes, weight_bytes

    rows = gpu_preset(tensor_parallel_size=2)
    assert [(row.kind, row.batch_size) for row in rows] == [
        ("decode", 1),
        ("decode", 16),
        ("decode", 64),
        ("decode", 256),
        ("prefill", 64),
    ]
    one, two = config_of("llama-3.1-8b"), config_of("llama-3.1-8b")
    two.model = dataclasses.replace(two.model, tensor_parallel_size=2)
    norms = 2 * 4096 * (2 * 32 + 1)  # which both have
    assert weight_bytes(two) - norms == (weight_bytes(one) - norms) / 2
    assert kv_bytes(two, 100) == kv_bytes(one, 100) / 2


@pytest.fixture
def tiny_config(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny-model.json"
    path.write_text(json.dumps(json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 4096}))
    return path


def test_latency_of_a_batch(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "report.json"
    argv = ["bench", "latency", "--model", str(tiny_config), "--load-format", "dummy", "--json", str(file), "--quiet"]
    argv += ["--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--max-model-len", "64", "--bandwidth", "2.5"]
    assert main([*argv, "--batch-size", "3", "--input-len", "20", "--output-len", "6"]) == 0
    report = json.loads(file.read_text())
    (result,) = report["results"]
    assert (result["batch_size"], result["input_len"], result["num_steps"]) == (3, 20, 6)
    assert result["num_compilations"] == 0
    # 60 prompt tokens and the decodes between them take 5 steps, of which the first request samples in 4 and the second
    # in 2 or 3; then come 3 steps that are not counted, and of the 6 others the mean is 2.5 after the first.
    assert 20 + 3 + 2.5 < result["context"] < 20 + 8 + 2.5
    assert 0 < result["step_ms"]["p50"] <= result["step_ms"]["p99"]
    assert 0 < result["first_token_ms"]["p50"] <= result["first_token_ms"]["p99"]
    weights = 4 * (2 * (64 * 192 + 3 * 64 * 128 + 2 * 64) + 64 + 261 * 64)
    expected = 1000 * (weights + 3 * result["context"] * 2 * 2 * 32 * 4) / 2.5e9
    assert result["floor_ms"] == pytest.approx(expected)
    assert result["floor_share"] == pytest.approx(expected / result["step_ms"]["mean"])
    out = capsys.readouterr().out
    for text in ("decode step, ms, p50 / p99", "share of the floor", "2 GB/s, given", "first token"):
        assert text in out, text


GPU_ARGS = ["bench", "throughput", "--preset", "gpu", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"]


def test_gpu_preset_on_a_small_scale(tiny_config, tmp_path, capsys, monkeypatch):
    """All kinds of rows; one that cannot run, and a model that cannot be loaded, do not keep others from running."""
    model = str(tiny_config)
    rows = [
        GpuRow("decode", model, 2, 70),
        GpuRow("decode", model, 3, 70),
        GpuRow("decode", "no-such-model", 1, 10),
        GpuRow("mixed", model, 2, None),
        GpuRow("prefill", model, 2, 100),
        GpuRow("first token", model, 1, 100),
    ]
    figures = {rows[0]: Figures(7.5, 6.5), rows[3]: Figures(8514, 10000), rows[5]: Figures(39.4)}
    monkeypatch.setattr(bench_gpu, "gpu_preset", lambda size: rows)
    monkeypatch.setenv("COLUMNS", "200")
    file, traces = tmp_path / "report.json", tmp_path / "traces"
    argv = [*GPU_ARGS, "--max-model-len", "2100", "--json", str(file), "--bandwidth", "100"]
    assert main([*argv, "--models", model, "--only", "PREFILL", "--profile", str(traces)]) == 0
    assert list(traces.rglob("*.xplane.pb"))
    report = json.loads(file.read_text())
    (result,) = report["results"]
    assert result["vllm"] is result["goal"] is None
    out = capsys.readouterr().out
    assert report["compared_with"] in out
    assert "this is 1 x cpu." in out
    assert "vLLM, " not in out
    assert "goal, " not in out
    card = Card("cpu", "this card", "vLLM on this card, 2026-12-01", {1: figures})
    monkeypatch.setattr(gpu_figures, "CARDS", (card,))
    assert main(argv) == 1
    report = json.loads(file.read_text())
    by_name = {result["name"]: result for result in report["results"]}
    assert len(by_name) == len(rows)
    failed = {result["batch_size"]: result["error"] for result in report["results"] if result["error"]}
    assert failed.keys() == {3, 1}
    assert "batch_size=3: must be at most max_num_seqs=2" in failed[3]
    assert "no-such-model" in failed[1]
    assert [engine["model"] for engine in report["engines"]] == [model]
    for result in report["results"]:
        assert result["error"] or (result["value"] > 0 and result["num_compilations"] == 0), result
    decode = by_name[rows[0].name]
    assert (decode["vllm"], decode["goal"]) == (7.5, 6.5)
    assert report["compared_with"] == "vLLM on this card, 2026-12-01"
    assert decode["details"]["context"] == pytest.approx(70 + 32, abs=1.5)
    assert decode["floor_share"] == pytest.approx(decode["floor_ms"] / decode["value"])
    captured = capsys.readouterr()
    for text in (
        "decode, ms/step",
        "share of floor",
        "vLLM's figures: vLLM on this card, 2026-12-01.",
        "goal, this card",
        "8,514",
        ">= 10,000",
        "39.40",
    ):
        assert text in captured.out, text
    assert f"{rows[4].name}: " in captured.err


def test_a_row_that_breaks_the_engine_gets_the_next_one_a_fresh_engine(tiny_config, capsys, monkeypatch):
    from jaxengine.bench import gpu_preset as module

    engines = []

    def broken(*args, **kwargs):
        raise RuntimeError("the device fell off the bus")

    def broken_measure(llm, *args, **kwargs):
        engines.append(llm.llm_engine)
        monkeypatch.setattr(llm.llm_engine.core, "drain", broken)
        broken()

    rows = [GpuRow("decode", str(tiny_config), 1, 10), GpuRow("first token", str(tiny_config), 1, 10)]
    monkeypatch.setattr(bench_gpu, "gpu_preset", lambda size: rows)
    monkeypatch.setattr(module, "measure_decode", broken_measure)
    assert main([*GPU_ARGS, "--max-model-len", "128", "--json", "-", "--quiet"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [result["error"] for result in report["results"]] == ["RuntimeError: the device fell off the bus", None]
    assert len(report["engines"]) == 2
    assert engines[0].core.runner.is_sleeping  # its memory has been given back all the same


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "throughput --preset gpu --models qwen3-0.6b,gpt-5",
            "'gpt-5' is none of llama-3.1-8b, qwen3-0.6b, llama-3.2-1b",
        ),
        (
            "throughput --preset gpu --tensor-parallel-size 3",
            "tensor_parallel_size=3: preset 'gpu' has rows for 1 and 2",
        ),
        ("throughput --preset gpu --data-parallel-size 2", "data_parallel_size=2: preset 'gpu' compares one copy"),
        ("throughput --preset gpu --only B=7", "only='B=7': no row's name contains it"),
        ("throughput --preset gpu --model x", "model='x': preset 'gpu' has its own models"),
        ("throughput --preset gpu --repeat 2", "repeat=2: must be 1"),
        ("throughput --preset gpu --bandwidth 0", "bandwidth=0.0: must be a number of GB/s above 0"),
        ("throughput --preset cpu --only (d)", "only='(d)': no row's name contains it"),
        ("throughput --models qwen3-0.6b", "models='qwen3-0.6b': only for --preset gpu"),
        ("throughput --bandwidth 3000", "bandwidth=3000.0: only for --preset gpu"),
        ("latency --batch-size 0", "batch_size=0: must be at least 1"),
        ("latency --bandwidth -1", "bandwidth=-1.0: must be a number of GB/s above 0"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    assert main(["bench", *argv.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batch-size 3", "batch_size=3: must be at most max_num_seqs=2"),
        ("--input-len 60", "input_len=60 and output_len=5: with 3 steps before they must be at most max_model_len=64"),
        ("--input-len 56 --batch-size 2", "2 requests never decode 8 tokens together with max_model_len=64"),
    ],
)
def test_batches_that_cannot_run(argv, message, tiny, capsys):
    assert main(["bench", "latency", "--model", str(tiny), "--output-len", "5", *argv.split(), *SMALL]) == 2
    assert message in capsys.readouterr().err


def test_models_and_rows_are_chosen():
    args = parse_args(
        ["bench", "throughput", "--preset", "gpu", "--models", "llama-3.2-1b, qwen3-0.6b", "--only", "b=1 "]
    )
    names = [row.name for row in bench_gpu.chosen_rows(args, {})]
    assert names == [
        "qwen3-0.6b decode B=1 ctx=128",
        "qwen3-0.6b first token B=1 ctx=1024",
        "llama-3.2-1b decode B=1 ctx=128",
        "llama-3.2-1b first token B=1 ctx=1024",
    ]
