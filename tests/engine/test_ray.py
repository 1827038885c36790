"""Replicas and batch inference on a Ray of this machine: uv run --extra ray pytest tests/engine/test_ray.py

Ray and what it needs take 400 MB, so that no dependency group has it.

Run as a script, this file starts Ray, checks them, and ends it; see `main`.
"""

import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine import SamplingParams

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples" / "ray_batch.py")
ENGINE: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "warmup": "none",
    "dtype": "float32",
}
PROMPTS = ["one", "two and more", "three", "four words are here", "five"]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
SETTINGS |= {"RAY_AUTH_MODE": "disabled", "JAX_PLATFORMS": "cpu"}


@pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install "jaxengine[ray]"')
def test_on_a_ray_of_this_machine(tiny):
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' paths must be short
    try:
        command = [sys.executable, __file__, str(tiny), folder]
        done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "all is well"
        deadline = time.monotonic() + 20
        while (left := processes_of(folder)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: str) -> list[str]:
    """Command lines of the processes that were started with the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if folder in line:
            found.append(line)
    return found


def check_replicas(model: str, expected: list[str]) -> None:
    import ray  # pyright: ignore[reportMissingImports]

    from jaxengine.ray import RayReplicas

    with pytest.raises(ValueError, match=r"num_replicas=3 with \{'CPU': 1\} each: this Ray cluster has room for 2"):
        RayReplicas(model, num_replicas=3, **ENGINE)
    with pytest.raises(ValueError, match="warmup='never'"):
        RayReplicas(model, **{**ENGINE, "warmup": "never"})
    replicas = RayReplicas(model, num_replicas=2, **ENGINE)
    outputs = replicas.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [output.outputs[0].text for output in outputs] == expected
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 2, 1)]
    assert [len(output.outputs[0].token_ids) for output in replicas.generate(PROMPTS[:3], params)] == [3, 2, 1]
    assert len(replicas.generate(PROMPTS[:1], GREEDY)) == 1
    with pytest.raises(ValueError, match="max_model_len"):  # the engine's own error
        replicas.generate(["too long " * 100] * 2, GREEDY)
    with pytest.raises(ValueError, match="not a single one"):
        replicas.generate([1, 2, 3], GREEDY)

    check_calls(replicas, expected)
    victim = ray.get(replicas._actors[1].__ray_call__.remote(lambda engine: os.getpid()))
    started = time.monotonic()
    threading.Timer(1, os.kill, (victim, signal.SIGKILL)).start()
    endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with pytest.raises(RuntimeError, match="replica 1 of 2 has died"):
        replicas.generate(["on and on"] * 200, endless)
    assert time.monotonic() - started < 30
    with pytest.raises(RuntimeError, match="shut down"):
        replicas.generate(PROMPTS, GREEDY)


def check_calls(replicas, expected: list[str]) -> None:
    """All replicas do what is asked, and an error names the one that has raised it."""
    import ray  # pyright: ignore[reportMissingImports]

    from jaxengine.engine.calls import EngineStateError

    replicas.sleep()
    assert replicas.collective_rpc("is_sleeping") == [True, True]
    with pytest.raises(EngineStateError, match="wake_up"):
        replicas.generate(PROMPTS, GREEDY)
    replicas.wake_up(["weights"])
    assert replicas.is_sleeping()
    replicas.wake_up()
    assert not replicas.is_sleeping()
    assert replicas.reset_prefix_cache()
    with pytest.raises(ValueError, match="replica 0 of 2: level=7: expected"):
        replicas.sleep(7)
    ray.get(replicas._actors[0].call.remote("pause_generation", [], {}))
    assert replicas.collective_rpc("is_paused") == [True, False]
    ray.get(replicas._actors[1].call.remote("sleep", [], {}))
    with pytest.raises(EngineStateError, match="replica 1 of 2: the engine sleeps"):
        replicas.resume_generation()
    assert replicas.collective_rpc("is_paused") == [False, True]
    replicas.wake_up()
    with pytest.raises(ValueError, match=r"replica 0 of 2: .*nothing"):
        replicas.update_weights([("nothing", np.ones(3))])
    assert [output.outputs[0].text for output in replicas.generate(PROMPTS, GREEDY)] == expected


def check_stage(model: str, expected: list[str]) -> None:
    """The example, which is a whole stage."""
    import ray.data  # pyright: ignore[reportMissingImports]

    from jaxengine.ray import build_llm_processor

    with pytest.raises(ValueError, match="concurrency=3 with"):
        build_llm_processor(model, concurrency=3, **ENGINE)(ray.data.from_items([{"prompt": "x"}]))
    out = io.StringIO()
    sys.argv = [EXAMPLE, "--model", model, "--max-tokens", "6"]
    with contextlib.redirect_stdout(out):
        questions = runpy.run_path(EXAMPLE, run_name="__main__")["QUESTIONS"]
    assert sorted(out.getvalue().splitlines()) == sorted(
        f"{question} -> {answer!r}" for question, answer in zip(questions, expected, strict=True)
    )


def check_rows(stage) -> None:
    """Conversations, token ids, and fields that only some rows have, without Ray around the stage."""
    import pandas as pd  # pyright: ignore[reportMissingImports]

    conversation = [{"role": "user", "content": "hi"}]
    greedy = {"temperature": 0.0, "ignore_eos": True}
    fields = [greedy | {"max_tokens": 2, "seed": None}, greedy | {"max_tokens": 3, "seed": 5}]
    answered = stage(pd.DataFrame({"messages": [conversation] * 2, "sampling_params": fields}))
    assert list(answered["num_generated_tokens"]) == [2, 3]
    answered = stage(pd.DataFrame({"prompt_token_ids": [[5, 6, 7]], "sampling_params": fields[:1]}))
    assert list(answered["num_input_tokens"]) == [3]
    assert list(answered["finish_reason"]) == ["length"]
    with pytest.raises(ValueError, match=r"they have \['text'\]"):
        stage(pd.DataFrame({"text": ["x"]}))


def main(model: str, folder: str) -> None:
    import ray  # pyright: ignore[reportMissingImports]

    from jaxengine.ray import _Stage

    # Before JAX has threads, since it forks.
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=folder)
    stage = _Stage(model, ENGINE)
    check_rows(stage)
    llm = stage._engine._llm
    generated = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=6)
    questions = runpy.run_path(EXAMPLE)["QUESTIONS"]
    answered = llm.chat([[{"role": "user", "content": question}] for question in questions], params, use_tqdm=False)
    llm.shutdown()
    check_replicas(model, [output.outputs[0].text for output in generated])
    check_stage(model, [output.outputs[0].text for output in answered])
    ray.shutdown()
    print("all is well")


if __name__ == "__main__":
    main(*sys.argv[1:])
