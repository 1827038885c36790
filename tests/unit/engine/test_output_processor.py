"""Outputs of requests: kinds, completions, log probabilities, ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxengine.engine.output_processor import OutputProcessor, SampledUpdate, StopFound, TokenLogprobs
from jaxengine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import RequestOutputKind, SamplingParams


class FakeTokenizer:
    def __init__(self) -> None:
        vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        backend.add_special_tokens([AddedToken("</s>", special=True)])
        self.backend_tokenizer = backend

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()


TOKENIZER = FakeTokenizer()
EOS = TOKENIZER.backend_tokenizer.token_to_id("</s>") or 0


def ids(text: str) -> list[int]:
    return [TOKENIZER.backend_tokenizer.token_to_id(character) or 0 for character in text.replace(" ", "Ġ")]


class Harness:
    """An output processor with one request, whose children's steps the test plays."""

    def __init__(self, n: int = 1, tokenizer: Any = TOKENIZER, **params: Any) -> None:
        self.now = 10.0
        self.processor = OutputProcessor(tokenizer, clock=lambda: self.now)
        self.params = SamplingParams(n=n, max_tokens=None, **params)
        self.children = [
            Request(
                request_id=f"{i}_r" if n > 1 else "r",
                prompt_token_ids=ids("ab"),
                sampling_params=self.params.clone(),
                max_tokens=100,
                arrival_time=9.0,
            )
            for i in range(n)
        ]
        self.processor.add("r", "ab", ids("ab"), self.children, self.params)

    def update(self, token_ids: list[int], status: RequestStatus | None = None, child: int = 0, **rest: Any):
        request = self.children[child]
        request.status = status or RequestStatus.RUNNING
        return SampledUpdate(request, token_ids, request.status.is_finished, **rest)

    def step(self, text: str, status: RequestStatus | None = None, child: int = 0, **rest: Any) -> list[RequestOutput]:
        outputs, stopped = self.processor.process([self.update(ids(text), status, child, **rest)])
        assert not stopped
        return outputs


def logprobs_of(*rows: list[tuple[int, float]], ranks: list[int]) -> TokenLogprobs:
    return TokenLogprobs(
        np.array([[token for token, _ in row] for row in rows], np.int32),
        np.array([[value for _, value in row] for row in rows], np.float32),
        np.array(ranks, np.int32),
    )


def the(outputs: list[RequestOutput]) -> CompletionOutput:
    (output,) = outputs
    (completion,) = output.outputs
    return completion


def test_cumulative():
    run = Harness()
    first = run.step("x")
    assert (first[0].request_id, first[0].prompt, first[0].prompt_token_ids) == ("r", "ab", ids("ab"))
    assert not first[0].finished
    second = run.step("y")
    assert (the(first).text, the(second).text) == ("x", "xy"), "an output must not change after it was given out"
    assert (the(first).token_ids, the(second).token_ids) == (ids("x"), ids("xy"))
    last = run.step("z", RequestStatus.FINISHED_LENGTH)
    assert last[0].finished
    assert (the(last).text, the(last).finish_reason, the(last).stop_reason) == ("xyz", "length", None)
    assert the(last).finished()
    assert run.processor.request_ids == []


def test_delta():
    run = Harness(output_kind=RequestOutputKind.DELTA, stop="yz")
    steps = [run.step("x"), run.step("y"), run.step("x"), run.step("y", RequestStatus.FINISHED_LENGTH)]
    assert [the(step).text for step in steps] == ["x", "", "yx", "y"]
    assert [the(step).token_ids for step in steps] == [ids("x"), ids("y"), ids("x"), ids("y")]


def test_final_only():
    run = Harness(output_kind=RequestOutputKind.FINAL_ONLY)
    assert run.step("x") == run.step("y") == []
    assert the(run.step("z", RequestStatus.FINISHED_LENGTH)).text == "xyz"


def test_eos_and_stop_tokens():
    run = Harness(skip_special_tokens=False)
    run.step("x")
    outputs, _ = run.processor.process([run.update([EOS], RequestStatus.FINISHED_STOPPED)])
    assert (the(outputs).text, the(outputs).token_ids) == ("x", [*ids("x"), EOS])
    assert (the(outputs).finish_reason, the(outputs).stop_reason) == ("stop", None)
    run = Harness(stop_token_ids=ids("y"))
    run.children[0].stop_reason = ids("y")[0]
    last = the(run.step("xy", RequestStatus.FINISHED_STOPPED))
    assert (last.text, last.finish_reason, last.stop_reason) == ("x", "stop", ids("y")[0])


def test_stop_string():
    run = Harness(stop=["yz"], logprobs=0)
    values = logprobs_of([(1, -1.0)], [(2, -2.0)], [(3, -4.0)], ranks=[1, 1, 1])
    run.step("x", logprobs=logprobs_of([(1, -0.5)], ranks=[1]))
    outputs, stopped = run.processor.process([run.update(ids("yzq"), logprobs=values)])
    assert stopped == [StopFound("r", "yz")]
    last = the(outputs)
    assert (last.text, last.finish_reason, last.stop_reason) == ("x", "stop", "yz")
    # The token after the stop string is dropped, with its log probability.
    assert last.token_ids == ids("xyz")
    assert last.logprobs is not None
    assert (len(last.logprobs), last.cumulative_logprob) == (3, -3.5)
    assert outputs[0].finished
    # The engine ran a step ahead: what it still brings is ignored.
    assert run.processor.process([run.update(ids("w"))]) == ([], [])


def test_stop_string_in_the_last_token():
    """The scheduler has finished the request already, for its length: nothing is left to finish there."""
    run = Harness(stop=["z"], include_stop_str_in_output=True)
    last = the(run.step("xz", RequestStatus.FINISHED_LENGTH))
    assert (last.text, last.finish_reason, last.stop_reason) == ("xz", "stop", "z")


def test_several_completions():
    run = Harness(n=2)
    (output,) = run.step("x", child=1)
    assert [(c.index, c.text) for c in output.outputs] == [(0, ""), (1, "x")]
    run.step("y", RequestStatus.FINISHED_LENGTH, child=1)
    (output,) = run.step("z", RequestStatus.FINISHED_LENGTH, child=0)
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("z", "length"), ("xy", "length")]
    assert output.finished
    assert output.request_id == "r"

    run = Harness(n=2)
    outputs, _ = run.processor.process([run.update(ids("p"), child=0), run.update(ids("q"), child=1)])
    assert len(outputs) == 1, "one output for all completions of a step"

    run = Harness(n=2, output_kind=RequestOutputKind.DELTA)
    (output,) = run.step("x", child=1)
    assert [(c.index, c.text) for c in output.outputs] == [(1, "x")]
    assert not run.step("y", RequestStatus.FINISHED_LENGTH, child=1)[0].finished
    (output,) = run.step("z", RequestStatus.FINISHED_LENGTH, child=0)
    assert [(c.index, c.text) for c in output.outputs] == [(0, "z")]
    assert output.finished

    run = Harness(n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    assert run.step("x", RequestStatus.FINISHED_LENGTH, child=0) == []
    (output,) = run.step("y", RequestStatus.FINISHED_LENGTH, child=1)
    assert [c.text for c in output.outputs] == ["x", "y"]


def test_logprobs():
    """A batch's columns are those of the request that wants most: only its own are given to this one."""
    run = Harness(logprobs=2)
    x, y, z, w = ids("xyzw")
    values = logprobs_of([(y, -1.5), (x, -0.5), (y, -1.5), (z, -3.0)], ranks=[2])
    completion = the(run.step("y", logprobs=values))
    assert completion.logprobs == [{y: Logprob(-1.5, 2, "y"), x: Logprob(-0.5, 1, "x")}]
    assert completion.logprobs is not None
    assert next(iter(completion.logprobs[0])) == y, "the chosen token comes first"
    values = logprobs_of([(w, -9.0), (x, -0.5), (y, -1.5), (z, -3.0)], ranks=[7])
    completion = the(run.step("w", logprobs=values))
    assert completion.logprobs is not None
    assert completion.logprobs[1] == {w: Logprob(-9.0, 7, "w"), x: Logprob(-0.5, 1, "x"), y: Logprob(-1.5, 2, "y")}
    assert completion.cumulative_logprob == pytest.approx(-10.5)
    assert the(Harness().step("x")).cumulative_logprob is None


def test_logprobs_of_deltas_and_whole_vocabulary():
    run = Harness(logprobs=-1, output_kind=RequestOutputKind.DELTA)
    x, y, z = ids("xyz")
    values = logprobs_of([(x, -1.0), (x, -1.0), (y, -2.0), (z, -3.0)], ranks=[1])
    for _ in range(2):
        completion = the(run.step("x", logprobs=values))
        assert completion.logprobs is not None
        assert [list(row) for row in completion.logprobs] == [[x, y, z]]


def test_no_text_without_detokenising():
    for run in (Harness(detokenize=False, logprobs=0), Harness(tokenizer=None, logprobs=0)):
        completion = the(run.step("x", logprobs=logprobs_of([(1, -1.0)], ranks=[1])))
        assert (completion.text, completion.token_ids) == ("", ids("x"))
        assert completion.logprobs == [{1: Logprob(-1.0, 1, None)}]


def test_prompt_logprobs_come_in_chunks():
    for kind in RequestOutputKind:
        run = Harness(prompt_logprobs=0, output_kind=kind)
        a, b = ids("ab")
        for token_id, value in ((a, -1.0), (b, -2.0)):
            chunk = run.update([], prompt_logprobs=logprobs_of([(token_id, value)], ranks=[1]))
            assert run.processor.process([chunk]) == ([], [])
        expected = [None, {a: Logprob(-1.0, 1, "a")}, {b: Logprob(-2.0, 1, "b")}]
        outputs = run.step("x") + run.step("y", RequestStatus.FINISHED_LENGTH)
        assert outputs[0].prompt_logprobs == expected
        assert all(output.prompt_logprobs is None for output in outputs[1:]) or kind is RequestOutputKind.CUMULATIVE


def test_abort_keeps_what_there_is():
    run = Harness(stop="yz", output_kind=RequestOutputKind.DELTA)
    run.step("x")
    run.step("y")
    assert run.processor.child_ids("r") == ["r"]
    output = run.processor.abort("r")
    assert output is not None
    assert output.finished
    assert (the([output]).text, the([output]).token_ids, the([output]).finish_reason) == ("y", [], "abort")
    assert run.processor.abort("r") is None
    assert run.processor.child_ids("r") == []
    assert run.processor.process([run.update(ids("w"))]) == ([], [])


def test_abort_of_several_completions():
    run = Harness(n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    run.step("x", RequestStatus.FINISHED_LENGTH, child=0)
    run.step("y", child=1)
    assert run.processor.child_ids("r") == ["1_r"]
    output = run.processor.abort("r", reason="error")
    assert output is not None
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("x", "length"), ("y", "error")]


def test_ids_are_unique_while_in_use():
    run = Harness()
    with pytest.raises(ValueError, match="request_id='r'"):
        run.processor.add("r", "ab", ids("ab"), run.children, run.params)
    run.processor.abort("r")
    run.processor.add("r", "ab", ids("ab"), run.children, run.params)
    assert run.processor.request_ids == ["r"]


def test_metrics():
    run = Harness(n=2)
    run.children[0].num_cached_tokens = 1
    run.now = 11.0
    run.step("x", child=0)
    run.children[1].num_preemptions = 2
    run.now = 12.0
    (output,) = run.step("yz", child=1)
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_token_time, metrics.last_token_time) == (9.0, 11.0, 12.0)
    assert (metrics.num_prompt_tokens, metrics.num_generation_tokens, metrics.num_preemptions) == (2, 3, 2)
    assert (metrics.first_token_latency, metrics.finished_time) == (2.0, 0.0)
    assert output.num_cached_tokens == 1
    run.now = 13.0
    final = run.processor.abort("r")
    assert final is not None
    assert final.metrics is not None
    assert final.metrics.finished_time == 13.0
    assert metrics.finished_time == 0.0


def test_slow_readers_merge_outputs():
    for kind, aggregate in ((RequestOutputKind.DELTA, True), (RequestOutputKind.CUMULATIVE, False)):
        run = Harness(n=2, logprobs=0, output_kind=kind)
        one = logprobs_of([(1, -1.0)], ranks=[1])
        (merged,) = run.step("x", child=1, logprobs=one)
        for text, child in (("y", 0), ("z", 1)):
            (newer,) = run.step(text, RequestStatus.FINISHED_LENGTH, child=child, logprobs=one)
            merged.add(newer, aggregate=aggregate)
        assert [(c.index, c.text, c.finish_reason) for c in merged.outputs] == [(0, "y", "length"), (1, "xz", "length")]
        assert [len(c.logprobs or []) for c in merged.outputs] == [1, 2]
        assert merged.finished
