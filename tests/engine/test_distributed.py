"""One model over two processes answers as in one, and ends when a process does.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxengine import LLM, AsyncLLM, EngineArgs, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "data" / "gpt2"
ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 48,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 4,
    "num_gpu_blocks_override": 7,
    "block_size": 8,
    "scheduling_policy": "priority",
    "warmup": "none",
}
SECONDS_TO_END = 30


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def torchrun(rank: int, port: int, size: int = 2) -> dict[str, str]:
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}


def slurm(rank: int, port: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_NODES": "1"}


def start(variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Starts this file as a script."""
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, list[Any], str]:
    """Exit code, lines of JSON, and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, [json.loads(line) for line in out.splitlines() if line.startswith("[[")], err


@pytest.mark.parametrize(
    ("launcher", "sizes"),
    [
        (torchrun, ("1", "2")),
        pytest.param(torchrun, ("1", "2", "sampled"), marks=pytest.mark.slow),
        pytest.param(torchrun, ("2", "1", "sampled"), marks=pytest.mark.slow),
        pytest.param(slurm, ("1", "2"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_answer_as_one(launcher, sizes):
    port = free_port()
    processes = [start(launcher(rank, port), "run", *sizes) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(finish, processes)
        with LLM(**ENGINE) as llm:
            one = answers(llm, is_sampled="sampled" in sizes)
            assert llm.llm_engine.core.scheduler.num_preemptions > 0
    for code, found, err in both:
        assert code == 0, err[-2000:]
        assert found == [one]


@pytest.mark.parametrize("mode", ["exit", pytest.param("raise", marks=pytest.mark.slow)])
def test_when_one_ends_the_other_does(mode):
    port = free_port()
    first, second = (start(torchrun(rank, port), mode, "1", "2") for rank in range(2))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(finish, first)
        code, _, err = finish(second)
        ended = time.monotonic()
        assert code == (7 if mode == "exit" else 1), err[-2000:]
        code, _, err = other.result()
    assert time.monotonic() - ended < SECONDS_TO_END
    assert code != 0
    assert "another may have died" in err or "another task died" in err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_alone_gives_up(rank):
    started = time.monotonic()
    code, _, err = finish(start(torchrun(rank, free_port()), "run", "1", "2"))
    assert code == 1
    assert ("ranks [1] of WORLD_SIZE=2 did not come" if rank == 0 else "rank 0 does not answer") in err
    assert time.monotonic() - started < 2 * SECONDS_TO_END  # Python starts slowly on a busy machine


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "no launcher found: set MASTER_ADDR"),
        ({"RANK": "0"}, "MASTER_ADDR, MASTER_PORT, WORLD_SIZE must be set too"),
        (torchrun(5, 1), "rank 5 is not one of WORLD_SIZE=2"),
        (torchrun(0, 1) | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a number"),
    ],
)
def test_wrong_settings_are_refused(variables, text, monkeypatch):
    from jaxengine.sharding import distributed

    def detect_nothing(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", detect_nothing)
    with pytest.raises(ValueError, match=text):
        distributed.initialize(variables)


def test_only_llm_runs_over_several_processes(tiny):
    with pytest.raises(ValueError, match="distributed_executor_backend='ray': expected one of None, external_launcher"):
        EngineArgs(model=str(tiny), distributed_executor_backend="ray")
    with pytest.raises(ValueError, match="use LLM"):
        AsyncLLM(EngineArgs(model=str(tiny), distributed_executor_backend="external_launcher"))


def answers(llm: LLM, is_sampled: bool) -> list[list[list[int]]]:
    """Tokens of a few requests, some of them preempted."""
    prompts: Any = [{"prompt_token_ids": list(range(3 + i, 3 + i + n))} for i, n in enumerate((9, 20, 5, 13))]
    given: list[dict[str, Any]] = [{"temperature": 0, "max_tokens": 16}]
    if is_sampled:
        given.append({"temperature": 0.7, "max_tokens": 4, "repetition_penalty": 1.1})
    found = []
    for params in given:
        sampling = SamplingParams(**params, ignore_eos=True, detokenize=False)
        outputs = llm.generate(prompts, sampling, use_tqdm=False, priority=[0, 1, 0, 1])
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    return found


def main(mode: str, data: int, size: int, is_sampled: bool) -> None:
    given: dict[str, Any] = {"data_parallel_size": data, "tensor_parallel_size": size}
    with LLM(**ENGINE, **given, distributed_executor_backend="external_launcher") as llm:
        print(json.dumps(answers(llm, is_sampled)), flush=True)
        if mode == "run":
            if is_sampled:
                llm.sleep(2)
                llm.wake_up()
                answers(llm, is_sampled)
            return
        if int(os.environ.get("RANK", 0)) == 0:
            while True:
                answers(llm, is_sampled)
        time.sleep(1)
        if mode == "exit":
            os._exit(7)
        raise RuntimeError("this process ends")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), is_sampled="sampled" in sys.argv[4:])
