"""`AsyncLLM`: what it generates, how requests end, and what a dead core means. One core process for all."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxengine import (
    LLM,
    AsyncLLM,
    EngineArgs,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jaxengine.engine import async_llm, wire
from jaxengine.engine.calls import EngineStateError
from jaxengine.engine.core_client import FEW_REQUESTS, EngineDeadError
from jaxengine.engine.output_processor import OutputProcessor
from jaxengine.engine.weight_transfer import pieces
from tests.conftest import write_tiny_model

# Fewer pages than the longest request would take, so that the core has something to refuse.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1000,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 60,
    "warmup": "lazy",
}
LONG = SamplingParams(temperature=1, seed=1, max_tokens=800, ignore_eos=True)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm(tiny, runner):
    llm = AsyncLLM(EngineArgs(model=str(tiny), **ENGINE))
    yield llm
    llm.shutdown()


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, request_id: str = "r") -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, request_id)]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def gauge(llm: AsyncLLM, name: str) -> float:
    return next(metric.value for metric in llm.get_metrics() if metric.name == f"jaxengine:{name}")


def test_a_prompt_of_one_token_has_no_log_probabilities(llm, runner):
    """Its only token follows nothing."""
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    output = runner.run(collect(llm, [5], params))[-1]
    assert output.prompt_logprobs == [None]
    assert len(output.outputs[0].token_ids) == 2


async def beside_a_neighbour(llm: AsyncLLM, damage: Callable[[], None]) -> tuple[Any, list[RequestOutput]]:
    """Runs a request "bad" while another one runs, with something damaged once both are on their way.

    Returns:
        The bad one's error or outputs, and the neighbour's outputs.
    """
    neighbour = asyncio.create_task(collect(llm, [9, 8], LONG.clone(), "good"))
    await until(lambda: "good" in llm._front.request_ids)
    bad = asyncio.create_task(collect(llm, [7, 7], LONG.clone(), "bad"))
    await until(lambda: "bad" in llm._front.request_ids)
    damage()
    (result,) = await asyncio.gather(bad, return_exceptions=True)
    llm.abort("good")
    outputs = await neighbour
    await until(lambda: gauge(llm, "num_requests_running") == 0)
    assert gauge(llm, "kv_cache_usage_perc") == 0
    llm.check_health()
    return result, outputs


def test_an_update_that_cannot_be_read_ends_its_own_request(llm, runner, monkeypatch):
    apply = wire.Update.apply

    def damaged(self, request):
        if request.request_id == "bad":
            raise OverflowError("too large")
        return apply(self, request)

    def damage() -> None:
        monkeypatch.setattr(wire.Update, "apply", damaged)

    result, outputs = runner.run(beside_a_neighbour(llm, damage))
    assert isinstance(result, ValueError)
    assert "too large" in str(result)
    assert outputs[-1].finished


def test_an_output_that_cannot_be_made_ends_its_own_request(llm, runner, monkeypatch):
    take = OutputProcessor._take

    def damaged(self, parent, *args):
        if parent.request_id == "bad":
            raise KeyError("a token")
        return take(self, parent, *args)

    def damage() -> None:
        monkeypatch.setattr(OutputProcessor, "_take", damaged)

    result, outputs = runner.run(beside_a_neighbour(llm, damage))
    assert isinstance(result, list)
    assert result[-1].finished
    assert result[-1].outputs[0].finish_reason == "error"
    assert outputs[-1].outputs[0].finish_reason == "abort"


def test_a_message_that_the_core_cannot_read_ends_its_own_request(llm, runner, monkeypatch):
    encode = wire.encode

    def damaged(message):
        if isinstance(message, wire.Add):
            return encode(["Add", message.keys, 5])
        return encode(message)

    async def run() -> None:
        neighbour = asyncio.create_task(collect(llm, [9, 8], LONG.clone(), "good"))
        await until(lambda: gauge(llm, "num_requests_running") == 1)
        monkeypatch.setattr(wire, "encode", damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            await collect(llm, [7, 7], LONG.clone(), "bad")
        monkeypatch.undo()
        llm.abort("good")
        assert (await neighbour)[-1].finished

    runner.run(run())
    llm.check_health()


def test_gives_what_llm_gives(llm, tiny, runner):
    asked = [
        ("some text", SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1, ignore_eos=True)),
        ([9, 8, 7], SamplingParams(n=2, temperature=2.0, seed=3, max_tokens=9, min_p=0.001, logit_bias={50: 3.0})),
        ("abc", SamplingParams(temperature=0, max_tokens=9, bad_words=["e"], stop_token_ids=[77], min_tokens=3)),
    ]

    async def all_of_them():
        return await asyncio.gather(*(collect(llm, p, params, str(i)) for i, (p, params) in enumerate(asked)))

    got = [outputs[-1] for outputs in runner.run(all_of_them())]
    with LLM(str(tiny), **ENGINE) as offline:
        expected = offline.generate([p for p, _ in asked], [params for _, params in asked], use_tqdm=False)
    for one, other in zip(got, expected, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.text, a.token_ids, a.finish_reason, a.stop_reason) == (
                b.text,
                b.token_ids,
                b.finish_reason,
                b.stop_reason,
            )
    first, second = got[0], expected[0]
    assert first.outputs[0].logprobs is not None
    assert [list(step) for step in first.outputs[0].logprobs] == [list(s) for s in second.outputs[0].logprobs or []]
    assert first.prompt_logprobs is not None
    assert second.prompt_logprobs is not None
    assert [step and list(step) for step in first.prompt_logprobs] == [s and list(s) for s in second.prompt_logprobs]


def test_deltas_add_up_and_a_stop_string_ends_the_request_in_the_core(llm, runner):
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    whole = runner.run(collect(llm, "abc", plain))[-1].outputs[0].text
    stop = whole[4:6]
    params = SamplingParams(
        temperature=0, max_tokens=800, ignore_eos=True, stop=stop, output_kind=RequestOutputKind.DELTA
    )
    outputs = runner.run(collect(llm, "abc", params))
    assert "".join(output.outputs[0].text for output in outputs) == whole[: whole.index(stop)]
    assert outputs[-1].outputs[0].stop_reason == stop
    assert len(outputs) > 1
    runner.run(until(lambda: gauge(llm, "num_requests_running") == 0))


def test_a_slow_reader_gets_merged_outputs(llm, runner):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def slow():
        outputs = []
        async for output in llm.generate("abc", params, "slow"):
            outputs.append(output)
            await until(lambda: llm.num_unfinished_requests == 0)
        return outputs

    outputs = runner.run(slow())
    assert 1 <= len(outputs) <= 2
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 30


def test_a_busy_front_takes_several_steps_at_once_if_it_has_many_readers(llm, runner):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    delta = params.clone()
    delta.output_kind = RequestOutputKind.DELTA

    async def read(index: int, busy_seconds: float) -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate("abc", delta, str(index)):
            outputs.append(output)
            if index == len(outputs) - 1 == 0:
                time.sleep(busy_seconds)  # nothing of the event loop runs meanwhile, and the core goes on
        return outputs

    async def read_all(num_readers: int, busy_seconds: float) -> list[list[RequestOutput]]:
        return await asyncio.gather(*(read(index, busy_seconds) for index in range(num_readers)))

    def numbers(num_readers: int, busy_seconds: float) -> list[int]:
        """How many outputs each reader got. Checks that they add up to the whole."""
        answers = runner.run(read_all(num_readers, busy_seconds))
        for outputs in answers:
            deltas = [output.outputs[0] for output in outputs]
            assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
            assert "".join(delta.text for delta in deltas) == whole.text
            assert sum(len(delta.logprobs or []) for delta in deltas) == 30
            assert deltas[-1].finish_reason == "length"
        return list(map(len, answers))

    (whole,) = runner.run(collect(llm, "abc", params))[-1].outputs
    # A core that still compiles, or gets no processor, needs a front that is busy for longer.
    busy_seconds = 1
    while max(numbers(FEW_REQUESTS, busy_seconds)) >= 20:
        busy_seconds *= 2
        assert busy_seconds <= 16
    assert set(numbers(FEW_REQUESTS - 1, busy_seconds)) == {30}


@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_whoever_leaves_frees_the_pages(llm, runner, how):
    async def leave():
        async def read():
            outputs = llm.generate("some text", LONG.clone(), "leaver")
            async for _ in outputs:
                started.set()
                if how == "leave":
                    break
            await outputs.aclose()  # pyright: ignore[reportAttributeAccessIssue]

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        await until(lambda: gauge(llm, "kv_cache_usage_perc") > 0)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: gauge(llm, "kv_cache_usage_perc") == gauge(llm, "num_requests_running") == 0)
        return gauge(llm, "generation_tokens")

    before = gauge(llm, "generation_tokens")
    assert runner.run(leave()) - before < 800
    assert llm.num_unfinished_requests == 0


def test_abort_ends_the_stream_with_what_there_is(llm, runner):
    async def aborted():
        outputs = []
        async for output in llm.generate("some text", LONG.clone(), "victim"):
            outputs.append(output)
            llm.abort("victim")
        return outputs

    last = runner.run(aborted())[-1]
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"
    assert last.outputs[0].token_ids


def test_an_id_can_be_used_again_at_once(llm, runner):
    async def again():
        async for _ in (outputs := llm.generate("some text", LONG.clone(), "same")):
            break
        await outputs.aclose()
        return await collect(llm, "abc", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), "same")

    expected = runner.run(collect(llm, "abc", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    assert runner.run(again())[-1].outputs[0].token_ids == expected[-1].outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "at least one token"),
        ([5] * 2000, {}, "max_model_len"),
        ("x", {"logprobs": 50}, "max_logprobs"),
        ("x", {"logits_processors": [abs]}, "another process"),
    ],
)
def test_wrong_requests_are_refused(llm, runner, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        runner.run(collect(llm, prompt, SamplingParams(**params)))
    assert llm.num_unfinished_requests == 0


def test_what_only_the_core_can_refuse_fails_that_request_alone(llm, runner):
    async def both():
        params = SamplingParams(temperature=1, n=2, max_tokens=3, ignore_eos=True)
        return await asyncio.gather(
            collect(llm, [7] * 970, params, "too long"), collect(llm, [7] * 9, params, "b"), return_exceptions=True
        )

    refused, served = runner.run(both())
    assert isinstance(refused, ValueError)
    assert "the KV cache of 60 pages" in str(refused)
    assert isinstance(served, list)
    assert llm.num_unfinished_requests == 0


def test_what_is_wrong_at_start_is_told(tiny):
    with pytest.raises(ValueError, match="max_model_len=9999"):
        AsyncLLM(EngineArgs(model=str(tiny), max_model_len=9999))
    with pytest.raises(ValueError, match="does not exist"):
        AsyncLLM(EngineArgs(model="/no/such/model"))


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


async def started(llm: AsyncLLM, request_id: str, params: SamplingParams) -> asyncio.Task:
    """Begins a request, and waits until it runs."""
    task = asyncio.create_task(collect(llm, [9, 8, 7], params, request_id))
    await until(lambda: gauge(llm, "num_requests_running") == 1)
    return task


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("sleep", {"level": 5}, "level=5: expected"),
        ("wake_up", {"tags": ["x"]}, "tags: 'x': expected"),
        ("pause_generation", {"mode": "x"}, "mode='x': expected"),
        ("start_profile", {}, "profiler_dir"),
        ("_step", {}, "method='_step': expected one of sleep, "),
        ("sleep", {"level": object()}, "object cannot be sent"),
    ],
)
def test_wrong_calls_are_refused(llm, runner, method, kwargs, message):
    with pytest.raises(ValueError, match=message):
        runner.run(llm.collective_rpc(method, (), kwargs))
    assert runner.run(llm.is_paused()) is False


def test_what_the_state_forbids_keeps_its_kind(llm, runner):
    with pytest.raises(EngineStateError, match="start_profile"):
        runner.run(llm.stop_profile())


async def and_leave_awake(llm: AsyncLLM, test: Coroutine[Any, Any, None]) -> None:
    try:
        await test
    finally:
        llm.abort_all()
        await llm.wake_up()
        await llm.resume_generation()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_requests_wait_until_all_is_awake(llm, runner, level):
    async def run() -> None:
        (before,) = (await collect(llm, [9, 8, 7], GREEDY))[-1].outputs
        kept = await started(llm, "kept", LONG)
        await llm.sleep(level, mode="keep")
        assert await llm.is_sleeping()
        held = asyncio.create_task(collect(llm, [9, 8, 7], GREEDY, "held"))
        num_waiting = 2 if level > 0 else 1  # what is kept has no pages any more, and waits too
        await until(lambda: gauge(llm, "num_requests_waiting") == num_waiting)
        await llm.wake_up(["weights"])
        if level > 0:
            assert await llm.is_sleeping()
            with pytest.raises(EngineStateError, match="wake_up"):
                await llm.resume_generation()
            assert not held.done()
            await llm.wake_up(["kv_cache"])
        assert not await llm.is_sleeping()
        assert (await held)[-1].outputs[0].token_ids == before.token_ids
        assert not kept.done()
        llm.abort("kept")
        assert (await kept)[-1].outputs[0].finish_reason == "abort"

    runner.run(and_leave_awake(llm, run()))


def test_a_pause_ends_keeps_or_waits_for_requests(llm, runner):
    async def run() -> None:
        task = await started(llm, "aborted", LONG)
        await llm.pause_generation()
        (output,) = (await task)[-1].outputs
        assert (output.finish_reason, len(output.token_ids) > 0) == ("abort", True)
        held = asyncio.create_task(collect(llm, [5], GREEDY, "held"))
        await until(lambda: gauge(llm, "num_requests_waiting") == 1)
        await llm.resume_generation()
        assert (await held)[-1].outputs[0].finish_reason == "length"

        middle = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        task = await started(llm, "finished", middle)
        await llm.pause_generation(wait_for_inflight_requests=True)
        assert await llm.is_paused()
        (finished,) = (await asyncio.wait_for(task, 1))[-1].outputs
        assert finished.finish_reason == "length"
        await llm.resume_generation()

        task = await started(llm, "kept", middle)
        await llm.pause_generation(mode="keep")
        assert await llm.reset_prefix_cache()
        await asyncio.sleep(0.1)
        assert not task.done()
        await llm.resume_generation()
        assert (await task)[-1].outputs[0].token_ids == finished.token_ids

        task = await started(llm, "endless", LONG)
        waiting = asyncio.create_task(llm.pause_generation(mode="wait"))
        while not await llm.is_paused():
            await asyncio.sleep(0.01)
        await llm.resume_generation()
        with pytest.raises(EngineStateError, match="resumed before"):
            await waiting
        llm.abort("endless")
        await task

    runner.run(and_leave_awake(llm, run()))


def test_a_pause_ends_requests_whose_grammars_are_being_compiled(llm, runner):
    """They have come before it. Those that come later are held back."""
    form = StructuredOutputsParams(regex="(abc|d[e-z]{1,40}){1,40}")
    params = SamplingParams(max_tokens=5, structured_outputs=form)

    async def run() -> None:
        processed = llm.input_processor.process_one("g", [9], params)
        stream = llm.submit([processed])
        await llm.pause_generation()
        outputs = [output async for output in stream]
        assert outputs[-1].outputs[0].finish_reason == "abort"
        held = asyncio.create_task(collect(llm, [9], params, "h"))
        await until(lambda: gauge(llm, "num_requests_waiting") == 1)
        await llm.resume_generation()
        assert (await held)[-1].finished

    runner.run(and_leave_awake(llm, run()))


def test_new_weights_are_sent_in_pieces(llm, tiny, tmp_path, runner, monkeypatch):
    """And what is wrong with them, or who sends them, changes nothing."""
    write_tiny_model(tmp_path, seed=1)
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path))
    monkeypatch.setattr(async_llm, "pieces", lambda weights: pieces(weights, 20_000))

    sampled = SamplingParams(temperature=20, seed=3, max_tokens=12, ignore_eos=True)

    async def answer() -> list[int]:
        return list((await collect(llm, [9, 8, 7], sampled))[-1].outputs[0].token_ids)

    async def run() -> None:
        before = await answer()
        wrong = [
            ({"model.norm.weight": np.ones(3, np.float32)}, "model.norm.weight"),
            ({"nothing": np.ones(1)}, "nothing"),
        ]
        for weights, message in wrong:
            with pytest.raises(ValueError, match=message):
                await llm.update_weights((new | weights).items())
            assert await answer() == before

        def breaking():
            yield from list(new.items())[:9]
            raise KeyError("the trainer's own")

        with pytest.raises(KeyError):
            await llm.update_weights(breaking())
        with pytest.raises(ValueError, match="comes twice"):
            await llm.update_weights([*new.items(), *new.items()])
        task = await started(llm, "kept", LONG)
        with pytest.raises(EngineStateError, match="requests are running"):
            await llm.update_weights(new.items())
        await llm.pause_generation(mode="keep")
        await llm.update_weights(new.items())
        llm.abort("kept")
        await task
        await llm.resume_generation()
        changed = await answer()
        assert changed != before
        with LLM(str(tmp_path), **ENGINE) as offline:
            (expected,) = offline.generate([[9, 8, 7]], sampled, use_tqdm=False)
        assert changed == expected.outputs[0].token_ids
        await llm.update_weights(old.items())
        assert await answer() == before

    runner.run(and_leave_awake(llm, run()))


def test_when_the_core_dies_requests_fail(llm, runner):
    """Must be the last one: nothing runs any more."""

    async def die():
        task = asyncio.create_task(collect(llm, [7] * 9, LONG.clone(), "c"))
        await until(lambda: gauge(llm, "num_requests_running") == 1)
        call = asyncio.create_task(llm.pause_generation(mode="wait"))
        while not await llm.is_paused():
            await asyncio.sleep(0.01)
        llm._client._process.kill()
        with pytest.raises(EngineDeadError, match="exit code -9"):
            await call
        with pytest.raises(EngineDeadError, match="exit code -9"):
            await task
        with pytest.raises(EngineDeadError):
            await collect(llm, "x", LONG.clone())
        with pytest.raises(EngineDeadError):
            llm.check_health()
        with pytest.raises(EngineDeadError):
            await llm.is_sleeping()

    runner.run(die())
