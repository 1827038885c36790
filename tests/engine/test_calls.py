"""What an engine in this process is asked beside requests: to sleep, to pause, to forget, to be profiled."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxengine import LLM, RequestOutput, SamplingParams
from jaxengine.engine.calls import AsyncCalls, EngineStateError, SyncCalls
from jaxengine.engine.controls import Controls
from tests.engine.test_llm import ENGINE

PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1, seed=4, max_tokens=7, ignore_eos=True, repetition_penalty=1.3, logprobs=1),
    SamplingParams(temperature=1, seed=5, n=2, max_tokens=8, ignore_eos=True, presence_penalty=0.5),
]
PROMPTS = [[7] * 33, [9, 8, 7], [7] * 20 + [3]]


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    with LLM(str(tiny), **ENGINE, profiler_dir=str(tmp_path_factory.mktemp("profiles"))) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm) -> list[list[list[int]]]:
    return [tokens(output) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(autouse=True)
def leave_it_as_it_was(llm):
    yield
    llm.wake_up()
    llm.resume_generation()
    engine = llm.llm_engine
    engine.abort_request(engine.unfinished_request_ids)
    assert not engine.core.scheduler.unfinished_requests
    assert llm.reset_prefix_cache()


def tokens(output: RequestOutput) -> list[list[int]]:
    return [list(completion.token_ids) for completion in output.outputs]


def add(llm: LLM, index: int) -> None:
    llm.llm_engine.add_request(str(index), {"prompt_token_ids": PROMPTS[index]}, PARAMS[index])


def steps(llm: LLM, count: int | None = None) -> dict[str, RequestOutput]:
    """Steps so often, or to the end; returns the newest output of each request."""
    found = {}
    while llm.llm_engine.has_unfinished_requests() and count != 0:
        found |= {output.request_id: output for output in llm.llm_engine.step()}
        count = None if count is None else count - 1
    return found


def free_pages(llm: LLM) -> list[int]:
    return [shard.kv_cache.num_free_pages for shard in llm.llm_engine.core.scheduler.shards]


def test_all_engines_offer_the_same_calls():
    def calls(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")} - {"collective_rpc"}

    assert calls(SyncCalls) == calls(AsyncCalls)
    assert calls(SyncCalls) == set(Controls(None, None, None).table)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("clear_cache", [True, False])
@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_what_is_kept_goes_on(llm, expected, num_steps, clear_cache):
    for index in range(3):
        add(llm, index)
    before = steps(llm, num_steps)
    llm.pause_generation(mode="keep", clear_cache=clear_cache)
    assert llm.is_paused()
    assert not llm.is_sleeping()
    settled = steps(llm, 1)  # tokens of the step that was under way
    with pytest.raises(EngineStateError, match="resume_generation"):
        llm.llm_engine.step()
    if clear_cache:
        assert free_pages(llm) == [ENGINE["num_gpu_blocks_override"]] * len(free_pages(llm))
    llm.resume_generation()
    outputs = before | settled | steps(llm)
    assert [tokens(outputs[str(index)]) for index in range(3)] == expected


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_is_kept_over_a_sleep_goes_on(llm, expected, level):
    for index in range(3):
        add(llm, index)
    outputs = steps(llm, 3)
    llm.sleep(level, mode="keep")
    outputs |= steps(llm, 1)
    with pytest.raises(EngineStateError, match="wake_up"):
        llm.llm_engine.step()
    with pytest.raises(EngineStateError, match="mode='wait': the engine sleeps"):
        llm.pause_generation(mode="wait")
    llm.wake_up()
    outputs |= steps(llm)
    assert [tokens(outputs[str(index)]) for index in range(3)] == expected


def test_what_is_waited_for_finishes_and_what_comes_later_is_held_back(llm, expected):
    add(llm, 0)
    add(llm, 1)
    outputs = steps(llm, 2)
    llm.pause_generation(mode="wait")
    add(llm, 2)
    outputs |= {output.request_id: output for output in llm.llm_engine.step()}
    assert [tokens(outputs[str(index)]) for index in range(2)] == expected[:2]
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    assert metrics["jaxengine:num_requests_waiting"] == 2  # n=2
    with pytest.raises(ValueError, match="in use"):
        add(llm, 2)
    with pytest.raises(EngineStateError, match="resume_generation"):
        llm.generate("x", use_tqdm=False)
    llm.resume_generation()
    assert tokens(steps(llm)["2"]) == expected[2]


@pytest.mark.parametrize("call", ["pause_generation", "sleep"])
def test_what_is_aborted_says_so(llm, call):
    for index in range(3):
        add(llm, index)
    before = steps(llm, 4)
    getattr(llm, call)()
    outputs = steps(llm)
    assert set(outputs) == {"0", "1", "2"}
    for request_id, output in outputs.items():
        assert output.finished
        reasons = [completion.finish_reason for completion in output.outputs]
        assert set(reasons) == {"abort"}, request_id
        for ours, theirs in zip(
            tokens(before[request_id]) if request_id in before else [], tokens(output), strict=False
        ):
            assert theirs[: len(ours)] == ours
    assert not any(shard.num_running or shard.num_waiting for shard in llm.llm_engine.core.scheduler.shards)


def test_an_abort_ends_what_is_held_back_too(llm):
    llm.pause_generation()
    add(llm, 0)
    add(llm, 1)
    (aborted,) = llm.llm_engine.abort_request("1")
    assert aborted.outputs[0].finish_reason == "abort"
    llm.pause_generation()
    assert steps(llm)["0"].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_memory_comes_back_part_by_part(llm, expected, level, order):
    runner = llm.llm_engine.core.runner
    llm.sleep(level)
    add(llm, 0)
    parts = {"weights": lambda: runner._leaves, "kv_cache": lambda: runner._caches}
    assert [part() for part in parts.values()] == [None, None]
    llm.wake_up([order[0]])
    assert parts[order[0]]() is not None
    assert parts[order[1]]() is None
    assert llm.is_sleeping()
    for forbidden in (llm.resume_generation, llm.llm_engine.step, lambda: llm.generate("x", use_tqdm=False)):
        with pytest.raises(EngineStateError, match="wake_up"):
            forbidden()
    llm.wake_up([order[1], order[0]])
    assert not llm.is_sleeping()
    assert not llm.is_paused()
    assert tokens(steps(llm)["0"]) == expected[0]


def test_the_prefix_cache_is_not_taken_from_requests_unasked(llm, expected):
    add(llm, 0)
    outputs = steps(llm, 2)
    assert not llm.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    assert free_pages(llm) == [ENGINE["num_gpu_blocks_override"]] * len(free_pages(llm))
    outputs |= steps(llm)
    assert tokens(outputs["0"]) == expected[0]
    assert outputs["0"].num_cached_tokens == 0


def test_profiles_are_written(llm):
    with pytest.raises(EngineStateError, match="start_profile"):
        llm.stop_profile()
    llm.start_profile("part")
    with pytest.raises(EngineStateError, match="stop_profile"):
        llm.start_profile()
    llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)
    llm.stop_profile()
    assert list((Path(llm.llm_engine.args.profiler_dir) / "part").rglob("*.xplane.pb"))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sleep", {"level": 3}, "level=3: expected 0 or 1 or 2"),
    ("sleep", {"level": True}, "level=True"),
    ("sleep", {"mode": "later"}, "mode='later': expected one of abort, wait, keep"),
    ("wake_up", {"tags": ["weight"]}, "tags: 'weight': expected a list of 'weights' and 'kv_cache'"),
    ("wake_up", {"tags": "weights"}, "tags='weights': expected a list"),
    ("wake_up", {"tags": []}, r"tags=\[\]: expected a list"),
    ("wake_up", {"tags": 5}, "tags=5: expected a list"),
    ("pause_generation", {"mode": None}, "mode=None"),
    ("pause_generation", {"clear_cache": "no"}, "clear_cache='no': expected True or False"),
    ("reset_prefix_cache", {"reset_running_requests": 1}, "reset_running_requests=1: expected True or False"),
    ("start_profile", {"profile_prefix": "../x"}, r"profile_prefix='\.\./x': expected a folder's name"),
    ("sleep", {"depth": 1}, "sleep.*: got an unexpected keyword argument 'depth'"),
    ("is_paused", {"now": 1}, "is_paused"),
    ("shutdown", {}, "method='shutdown': expected one of sleep, "),
    ("__init__", {}, "method='__init__': expected one of sleep, "),
]


@pytest.mark.parametrize(("method", "kwargs", "message"), WRONG)
def test_wrong_calls_are_refused_and_change_nothing(llm, method, kwargs, message):
    with pytest.raises(ValueError, match=message):
        llm.collective_rpc(method, (), kwargs)
    assert llm.collective_rpc("is_paused") == [False]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["add", "step", "step", "keep", "wait", "resume", "reset", "sleep", "wake", "weights", "clear"]
        ),
        max_size=14,
    )
)
def test_nothing_is_lost_whatever_the_order(llm, expected, actions):
    """Requests that nobody aborts give the same tokens, whatever comes between their steps."""
    todo, outputs = [0, 1, 2], {}
    actions_of = {
        "add": lambda: add(llm, todo.pop()) if todo else None,
        "step": lambda: outputs.update(steps(llm, 1)),
        "keep": lambda: llm.pause_generation(mode="keep", clear_cache=False),
        "clear": lambda: llm.pause_generation(mode="keep"),
        "wait": lambda: llm.pause_generation(mode="wait"),
        "resume": llm.resume_generation,
        "reset": lambda: llm.reset_prefix_cache(reset_running_requests=True),
        "sleep": lambda: llm.sleep(1, mode="keep"),
        "wake": llm.wake_up,
        "weights": lambda: llm.wake_up(["weights"]),
    }
    for action in actions:
        try:
            actions_of[action]()
        except EngineStateError:
            assert llm.is_paused() or llm.is_sleeping()
    llm.wake_up()
    llm.resume_generation()
    while todo:
        add(llm, todo.pop())
    outputs |= steps(llm)
    assert [tokens(outputs[str(index)]) for index in range(3)] == expected
    assert free_pages(llm) == [ENGINE["num_gpu_blocks_override"]] * len(free_pages(llm))
