"""Greedy outputs do not depend on how the work was cut, cached, shared or interrupted."""

import random
from typing import Any

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.runner.buckets import NUM_REPEATS, Bucket
from jaxengine.runner.model_runner import ModelRunner
from jaxengine.runner.programs import RepeatedStep, base
from jaxengine.runner.step_handle import StepShape
from jaxengine.sampling.sampler import AMONG_FEW, Feature

NUM_PROMPTS = 64
NUM_TOKENS = 24


def make_prompts(vocab_size: int, longest: int = 90) -> list[list[int]]:
    """Random prompts, half of which begin alike: the prefix cache has something to find."""
    rng = random.Random(0)
    shared = [rng.randrange(5, vocab_size) for _ in range(40)]
    prompts = []
    for i in range(NUM_PROMPTS):
        own = [rng.randrange(5, vocab_size) for _ in range(rng.randint(1, longest))]
        prompts.append((shared + own)[:longest] if i % 2 else own)
    return prompts


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == NUM_TOKENS for o in outputs)
    return [list(o.outputs[0].token_ids) for o in outputs]


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name == name)


BASE = {"dtype": "float32", "max_model_len": 128, "warmup": "none", "max_num_seqs": 64, "num_gpu_blocks_override": 600}


@pytest.fixture(scope="module")
def tiny_reference(tiny):
    """Each prompt alone, one after the other, without any sharing."""
    prompts = make_prompts(LLM_VOCAB)
    with LLM(str(tiny), **BASE, enable_prefix_caching=False, async_scheduling=False) as llm:
        return prompts, [greedy(llm, [prompt])[0] for prompt in prompts]


LLM_VOCAB = 200
FEW_PAGES = {"num_gpu_blocks_override": 24, "max_num_seqs": 16, "max_num_batched_tokens": 64}
"""Requests are preempted all the time. Few shapes, since a cache of another size has programs of its own."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 512},
        FEW_PAGES,
        FEW_PAGES | {"enable_prefix_caching": False, "async_scheduling": False},
        {"async_scheduling": False},
        {"block_size": 32, "num_gpu_blocks_override": 300, "max_num_seqs": 16, "max_num_batched_tokens": 64},
        {"enable_chunked_prefill": False},
        FEW_PAGES | {"scheduling_policy": "priority"},
        FEW_PAGES | {"num_scheduler_steps": 4},
        {"long_prefill_token_threshold": 10},
    ],
    ids=str,
)
def test_a_batch_of_64_equals_each_alone(tiny, tiny_reference, options):
    prompts, want = tiny_reference
    with LLM(str(tiny), **(BASE | options)) as llm:
        assert greedy(llm, prompts) == want
        assert greedy(llm, prompts) == want  # the prefix cache is full now
        if options.get("num_gpu_blocks_override") == 24:
            assert metric(llm, "jaxengine:num_preemptions") > 0
        elif options.get("enable_prefix_caching", True):
            assert metric(llm, "jaxengine:prefix_cache_hits") > 0
        assert metric(llm, "jaxengine:kv_cache_usage_perc") == 0


def test_the_shapes_that_accelerators_use(tiny, tiny_reference, monkeypatch):
    prompts, want = tiny_reference
    make_buckets = base.make_buckets
    monkeypatch.setattr(base, "make_buckets", lambda *args, coarse: make_buckets(*args, coarse=False))
    with LLM(str(tiny), **(BASE | {"max_num_batched_tokens": 64, "max_num_seqs": 16})) as llm:
        assert any(bucket.decode_only for bucket in llm.llm_engine.core.runner.programs.buckets)
        assert greedy(llm, prompts) == want


def test_several_steps_in_one_call(tiny, monkeypatch):
    prompts: list[Any] = [{"prompt_token_ids": prompt[:7]} for prompt in make_prompts(LLM_VOCAB)[:4]]
    length: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    greedy_ones = [SamplingParams(temperature=0, **length)] * 4
    among_few = [SamplingParams(temperature=0.9, top_k=9 + i, seed=i, **length) for i in range(4)]
    mixed = [*greedy_ones[:1], *among_few[1:3], SamplingParams(temperature=1.1, top_p=0.9, seed=3, **length)]
    calls: list[int] = []
    repeat = ModelRunner._repeat
    monkeypatch.setattr(ModelRunner, "_repeat", lambda *args: calls.append(len(args[-1])) or repeat(*args))

    def answers(llm: LLM, expected_calls: list[int]) -> list[list[list[int]]]:
        found = []
        for params in (greedy_ones, among_few, mixed):
            calls.clear()
            found.append([list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)])
            assert calls == expected_calls
        return found

    few = BASE | {"max_num_batched_tokens": 32, "max_num_seqs": 8, "warmup": "lazy"}
    with LLM(str(tiny), **few) as llm:
        want = answers(llm, [])
    with LLM(str(tiny), **few, num_scheduler_steps=6) as llm:  # a call of four, and two steps by themselves
        programs = llm.llm_engine.core.runner.programs
        programs.wait_until_compiled(programs.compile_ahead([StepShape(4, 4, True)]))
        assert programs.repeated(Bucket(4, 4), 0) is not None
        for features in (AMONG_FEW, Feature.RANDOM | Feature.FILTER | Feature.WIDE):
            assert programs.repeated(Bucket(4, 4), features) is None  # no step waits for it
            programs.wait_until_compiled([RepeatedStep(Bucket(4, 4), features)])
        assert answers(llm, [NUM_REPEATS] * 4) == want
        assert metric(llm, "jaxengine:kv_cache_usage_perc") == 0
        assert programs.repeated(Bucket(4, 4), Feature.PENALTIES) is None  # whose counts a loop does not keep
        assert programs.repeated(Bucket(32, 8), 0) is None  # which holds prompts
    with LLM(str(tiny), **few, num_scheduler_steps=3) as llm:
        assert llm.llm_engine.core.runner.programs.repeated(Bucket(4, 4), 0) is None


def test_several_steps_planned_at_once_sample_the_same(tiny, monkeypatch):
    """Also beyond a request's end, which comes within them."""
    prompts = make_prompts(LLM_VOCAB)[:9]
    draw = {"temperature": 0.9, "seed": 3, "ignore_eos": True}
    params = [
        SamplingParams(max_tokens=30, **draw),
        SamplingParams(max_tokens=13, **draw, top_k=20, top_p=0.9),
        SamplingParams(max_tokens=3, **draw, min_p=0.01),
        SamplingParams(max_tokens=30, **draw, min_tokens=6, stop_token_ids=list(range(0, LLM_VOCAB, 3))),
        SamplingParams(max_tokens=30, **draw, stop_token_ids=list(range(0, LLM_VOCAB, 9))),
        SamplingParams(max_tokens=22, **draw, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(max_tokens=17, **draw, logit_bias={7: 4.0}),
        SamplingParams(max_tokens=26, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=1, **draw),
    ]

    def answers(llm: LLM, params: list[SamplingParams]) -> list[tuple]:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        return [(o.token_ids, o.finish_reason, o.stop_reason, o.logprobs) for o in outputs]

    few = BASE | {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    with_logprobs = [*params[:8], SamplingParams(max_tokens=20, **draw, logprobs=2)]
    with LLM(str(tiny), **few) as llm:
        want = answers(llm, params), answers(llm, with_logprobs)
    with LLM(str(tiny), **few, num_scheduler_steps=8) as llm:
        core = llm.llm_engine.core
        schedule, planned = core.scheduler.schedule, []
        monkeypatch.setattr(
            core.scheduler, "schedule", lambda *args: planned.append(batches := schedule(*args)) or batches
        )
        assert (answers(llm, params), answers(llm, with_logprobs)) == want
        assert {batches[0].num_steps for batches in planned if batches} == {1, 8}
        assert core.stats.num_steps == core.stats.num_steps_done
        assert metric(llm, "jaxengine:kv_cache_usage_perc") == 0


def test_the_real_model_alone_in_a_batch_cached_and_chunked(smollm2):
    prompts = make_prompts(40000, longest=70)[:24]
    alone = [greedy(smollm2, [prompt])[0] for prompt in prompts[:4]]
    batch = greedy(smollm2, prompts)
    assert batch[:4] == alone
    assert greedy(smollm2, prompts) == batch  # from the prefix cache
    assert metric(smollm2, "jaxengine:prefix_cache_hits") > 0
    assert smollm2.reset_prefix_cache()
    assert greedy(smollm2, prompts) == batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 512, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 512, "num_gpu_blocks_override": 60},
    ],
    ids=str,
)
def test_the_real_model_in_a_batch_of_64(smollm2, options):
    prompts = make_prompts(40000)
    want = [greedy(smollm2, [prompt])[0] for prompt in prompts]
    with LLM(**(BASE | options)) as llm:
        assert greedy(llm, prompts) == want
        if options.get("num_gpu_blocks_override") == 60:
            assert metric(llm, "jaxengine:num_preemptions") > 0
