"""Data-parallel shards in one program answer as one engine does, and have nothing to tell each other.

Run as a script, this file does so on virtual CPU devices, which must be asked for before JAX starts (see `main`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.runner.buckets import NUM_REPEATS
from jaxengine.runner.step_handle import StepShape

MODELS = Path(__file__).parents[1] / "models" / "data"
NUM_DEVICES = 4
PAGE, NUM_PAGES = 8, 7
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 48,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 4,
    "block_size": PAGE,
    "num_gpu_blocks_override": NUM_PAGES,
    "warmup": "none",
}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
SAMPLED = GREEDY | {
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 1,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "logprobs": 2,
    "prompt_logprobs": 2,
}
COLLECTIVE = re.compile(r" (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*")


def run(model: str, *cases: str) -> list[dict[str, Any]]:
    """Runs this file as a script; returns the lines of JSON that it prints, one for each case."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(NUM_DEVICES), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, model, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("model", "cases"),
    [
        ("gpt2", ["1x1", "2x1", "2x2 repeated"]),
        pytest.param("qwen3", ["1x1", "2x1", "4x1", "2x2"], marks=pytest.mark.slow),
        pytest.param("qwen3", ["1x1 sampled", "2x1 sampled", "2x2 sampled"], marks=pytest.mark.slow),
        pytest.param("qwen3", ["1x1", "2x1 repeated", "4x1 repeated", "2x2 repeated"], marks=pytest.mark.slow),
        pytest.param("smollm2", ["1x1", "2x1", "4x1", "2x2"], marks=pytest.mark.slow),
    ],
)
def test_shards_answer_as_one_engine(model, cases):
    one, *others = run(model, *cases)
    assert one["preemptions"] > 0
    assert bool(one["hits"]) != ("sampled" in cases[0])  # prompt log probabilities read nothing from the cache
    for other in others:
        assert other["answers"] == one["answers"]
        assert other["steps"] < one["steps"]
    for case, result in zip(cases, [one, *others], strict=True):
        assert all(all(free) for free in result["free"])
        assert bool(result["repeats"]) == case.endswith("repeated")
        assert bool(result["collectives"]) == case.startswith("2x2")
        assert not any(crosses_shards(text, NUM_DEVICES // 2) for text in result["collectives"])


def crosses_shards(text: str, size: int) -> bool:
    """Whether an instruction's groups of devices are not each within one shard of `size` devices."""
    if found := re.search(r"replica_groups=mesh\[.*?\] \{(.*?)\}", text):
        return "data" in found[1]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dims))
        groups = np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(int(found[1]), int(found[2]))
    else:
        found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text)
        if not found:  # all devices together
            return True
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    return any(len({device // size for device in group}) > 1 for group in groups)


@pytest.mark.parametrize(
    ("text", "crosses"),
    [
        ("replica_groups={{0,1},{2,3}}, x", False),
        ("replica_groups={{0,2},{1,3}}, x", True),
        ("replica_groups=[2,2]<=[4], x", False),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", True),
        ("replica_groups=mesh['data'=2,'model'=2] {'model'}, x", False),
        ("replica_groups=mesh['data'=2,'model'=2] {'data'}, x", True),
        ("source_target_pairs={{0,1},{1,0}}", False),
        ("source_target_pairs={{0,3}}", True),
        ("replica_groups={}, x", True),
    ],
)
def test_groups_of_devices_are_understood(text, crosses):
    assert crosses_shards(text, 2) is crosses


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0"),
        ({"data_parallel_size": 32, "tensor_parallel_size": 2}, "=32 x tensor_parallel_size=2 needs 64 devices: there"),
    ],
)
def test_wrong_sizes_are_refused(tiny, sizes, text):
    with pytest.raises(ValueError, match=text):
        LLM(str(tiny), **sizes)


def prompts_of(lengths: list[int]) -> list[Any]:
    """Every second one begins like the first."""
    return [{"prompt_token_ids": [3 + (j if i % 2 else 40 + i) % 90 for j in range(n)]} for i, n in enumerate(lengths)]


def free_pages(llm: LLM) -> list[bool]:
    """Of every shard: whether all of its pages are free."""
    shards = llm.llm_engine.core.scheduler.shards
    return [s.kv_cache.num_free_pages == NUM_PAGES and not s.has_unfinished_requests() for s in shards]


def main(model: str, cases: list[str]) -> None:
    for case in cases:
        shape, _, kind = case.partition(" ")
        data, size = map(int, shape.split("x"))
        given = SAMPLED if kind == "sampled" else GREEDY
        steps = NUM_REPEATS if kind == "repeated" else None
        which = {} if model == "smollm2" else {"model": str(MODELS / model)}
        sizes: dict[str, Any] = {"data_parallel_size": data, "tensor_parallel_size": size}
        with LLM(**which, **ENGINE, **sizes, num_scheduler_steps=steps) as llm:
            answers, free = [], []
            programs = llm.llm_engine.core.runner.programs
            if steps:
                programs.wait_until_compiled(programs.compile_ahead(StepShape(n, n, True) for n in (1, 3)))

            def ask(lengths: list[int], max_tokens: int, llm=llm, given=given, answers=answers, free=free) -> None:
                params = SamplingParams(**given, max_tokens=max_tokens)
                outputs = llm.generate(prompts_of(lengths), params, use_tqdm=False)
                answers += [list(output.outputs[0].token_ids) for output in outputs]
                free.append(free_pages(llm))

            ask([9, 20, 5, 17, 12, 2, 17], 16)
            ask([18], 3)  # fewer than shards
            metrics = {metric.name: metric.value for metric in llm.get_metrics()}
            engine = llm.llm_engine
            for i, prompt in enumerate(prompts_of([9, 12, 7, 3])):
                engine.add_request(f"x{i}", prompt, SamplingParams(**given, max_tokens=6))
            engine.step()
            engine.abort_request(["x0", "x3"])
            while engine.has_unfinished_requests():
                engine.step()
            free.append(free_pages(llm))
            assert llm.reset_prefix_cache()
            for level in (1, 2):
                llm.sleep(level)
                llm.wake_up()
                ask([10, 4, 7], 4)
            texts = programs.compiled_programs()
            print(
                json.dumps(
                    {
                        "answers": answers,
                        "free": free,
                        "preemptions": metrics["jaxengine:num_preemptions"],
                        "hits": metrics["jaxengine:prefix_cache_hits"],
                        "steps": metrics["jaxengine:steps"],
                        "repeats": len(re.findall(r"HloModule jit_repeat", "".join(texts))),
                        "collectives": [match[0] for text in texts for match in COLLECTIVE.finditer(text)],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
