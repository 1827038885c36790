"""`LLM`'s interface: what it gives back, what it refuses, and what it survives."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import LLM, BeamSearchParams, SamplingParams
from jaxengine.loading.loader import load_model
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.models.config import ModelConfig
from jaxengine.models.training import token_log_probs

ENGINE = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 40,
    "warmup": "none",
}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny):
    with LLM(str(tiny), **ENGINE) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **kwargs: Any) -> Any:
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def test_every_form_of_a_prompt(llm):
    ids = llm.get_tokenizer().encode("hello")
    outputs = [
        *generate(llm, "hello"),
        *generate(llm, ids),
        *generate(llm, ["hello", {"prompt": "hello"}, {"prompt_token_ids": ids}]),
    ]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert outputs[0].prompt == "hello"
    assert outputs[0].prompt_token_ids == ids
    assert outputs[0].finished
    assert outputs[0].outputs[0].finish_reason == "length"


def test_one_params_each_and_several_completions(llm):
    several = SamplingParams(n=3, temperature=20.0, seed=5, max_tokens=4, ignore_eos=True)
    one, many = generate(llm, ["ab", "cd"], [GREEDY, several])
    assert len(one.outputs) == 1
    assert [c.index for c in many.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in many.outputs}) > 1
    again = generate(llm, ["xyz", "cd", "q"], [GREEDY, several, GREEDY])[1]
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in many.outputs]


def test_log_probs_for_training_are_the_engines(llm, tiny):
    token_ids = [7, 90, 41, 8, 8, 120, 33, 54, 7, 90, 11]
    (output,) = generate(llm, {"prompt_token_ids": token_ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    want = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]
    checkpoint = HFCheckpoint(tiny)
    model = load_model(checkpoint, ModelConfig.from_hf(checkpoint.config), jnp.float32)
    np.testing.assert_allclose(token_log_probs(model, jnp.asarray(token_ids))[1:], want, rtol=0, atol=1e-5)


def test_logprobs_agree_with_prompt_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
    (first,) = generate(llm, "some text to begin with", params)
    completion = first.outputs[0]
    assert completion.logprobs is not None
    assert all(step[t].rank == 1 for step, t in zip(completion.logprobs, completion.token_ids, strict=True))
    longer = [*first.prompt_token_ids, *completion.token_ids]
    (second,) = generate(
        llm, {"prompt_token_ids": longer}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    )
    assert second.prompt_logprobs[0] is None
    assert len(second.prompt_logprobs) == len(longer)
    for i, (token, step) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        found = second.prompt_logprobs[len(first.prompt_token_ids) + i]
        assert found[token].logprob == pytest.approx(step[token].logprob, abs=1e-4)
        assert list(found) == list(step)


def test_stops(llm):
    (free,) = generate(llm, "abc", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    ids, text = free.outputs[0].token_ids, free.outputs[0].text
    token = ids[5]
    first = ids.index(token)
    (stopped,) = generate(
        llm, "abc", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[token], ignore_eos=True)
    )
    assert stopped.outputs[0].token_ids == ids[: first + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == token
    (least,) = generate(
        llm, "abc", SamplingParams(temperature=0, max_tokens=12, min_tokens=9, stop_token_ids=[token], ignore_eos=True)
    )
    assert len(least.outputs[0].token_ids) >= 9
    assert token not in least.outputs[0].token_ids[:8]
    string = text[3:5]
    (cut,) = generate(llm, "abc", SamplingParams(temperature=0, max_tokens=12, stop=[string], ignore_eos=True))
    assert cut.outputs[0].text == text[: text.index(string)]
    assert cut.outputs[0].stop_reason == string


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "at least one token"),
        ([], {}, "prompts|token"),
        ({"prompt_token_ids": [5] * 64}, {}, "max_model_len=64"),
        ({"prompt_token_ids": [5, 100000]}, {}, "100000"),
        ({"prompt_token_ids": [-1]}, {}, "-1"),
        ({"text": "x"}, {}, "text"),
        ("x", {"logprobs": 50}, "max_logprobs=20"),
        ("x", {"allowed_token_ids": [100000]}, "100000"),
        ("x", {"logit_bias": {100000: 1.0}}, "100000"),
    ],
)
def test_wrong_input_is_refused_and_nothing_runs(llm, prompt, params, message):
    if prompt == []:
        assert generate(llm, []) == []
        return
    with pytest.raises(ValueError, match=message):
        generate(llm, ["fine", prompt], SamplingParams(**params))
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(generate(llm, "still works")) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 0), ("max_tokens", 0), ("temperature", -1), ("min_p", 2), ("top_k", -5), ("n", 0)]
)
def test_wrong_parameters_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"max_model_len": 10**9}, "max_model_len=1000000000"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"block_size": 17}, "block_size=17"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens=32"),
        ({"warmup": "soon"}, "warmup='soon'"),
        ({"kv_cache_memory_bytes": 1000, "num_gpu_blocks_override": None}, "kv_cache_memory_bytes"),
        ({"tokenizer": "/no/tokenizer"}, "tokenizer='/no/tokenizer'"),
    ],
)
def test_wrong_engine_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(**({"model": str(tiny)} | ENGINE | arguments))


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(str(tmp_path))


def test_a_logits_processor_that_fails_harms_nobody(llm):
    def broken(logits, state):
        raise RuntimeError("oops")

    with pytest.raises(ValueError, match="oops"):
        generate(llm, ["a", "b"], [GREEDY, SamplingParams(logits_processors=[broken])])
    assert not llm.llm_engine.has_unfinished_requests()
    assert generate(llm, "a")[0].finished


def test_ctrl_c_keeps_what_is_finished(llm, monkeypatch):
    engine = llm.llm_engine
    step, calls = engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    short, long = generate(llm, ["ab", "cd"], [GREEDY, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)])
    monkeypatch.undo()
    assert short.outputs[0].finish_reason == "length"
    assert long.outputs[0].finish_reason == "abort"
    assert 0 < len(long.outputs[0].token_ids) < 40
    usage = next(m.value for m in llm.get_metrics() if m.name == "jaxengine:kv_cache_usage_perc")
    assert usage == 0


def test_an_aborted_request_leaves_the_others_alone(llm):
    (want,) = generate(llm, "abc")
    engine = llm.llm_engine
    engine.add_request("a", "abc", GREEDY)
    engine.add_request("b", "xyz", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    outputs = {}
    for i in range(100):
        if i == 3:
            (aborted,) = engine.abort_request("b")
            assert aborted.outputs[0].finish_reason == "abort"
        for output in engine.step():
            outputs[output.request_id] = output
        if not engine.has_unfinished_requests():
            break
    assert outputs["a"].outputs[0].token_ids == want.outputs[0].token_ids


def test_beam_search_finds_at_least_what_greedy_finds(llm):
    (found,) = llm.beam_search("abc", BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True))
    assert len(found.sequences) == 4
    scores = [s.cum_logprob for s in found.sequences]
    assert scores == sorted(scores, reverse=True)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
    (greedy,) = generate(llm, "abc", params)
    assert scores[0] >= greedy.outputs[0].cumulative_logprob - 1e-4
    # The best beam's score is its log probability under the model.
    best = found.sequences[0]
    (scored,) = generate(llm, {"prompt_token_ids": best.tokens}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    total = sum(
        scored.prompt_logprobs[i][best.tokens[i]].logprob for i in range(len(best.tokens) - 5, len(best.tokens))
    )
    assert total == pytest.approx(best.cum_logprob, abs=1e-3)


def test_beam_search_wider_than_max_logprobs_is_refused(llm):
    with pytest.raises(ValueError, match="beam_width=11"):
        llm.beam_search("abc", BeamSearchParams(beam_width=11, max_tokens=2))


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_up(llm, level):
    (before,) = generate(llm, "abc")
    llm.sleep(level)
    assert llm.is_sleeping()
    with pytest.raises(RuntimeError, match="wake_up"):
        generate(llm, "abc")
    llm.wake_up()
    assert not llm.is_sleeping()
    (after,) = generate(llm, "abc")
    assert after.outputs[0].token_ids == before.outputs[0].token_ids


def test_chat_and_continue(llm):
    messages = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert answer.prompt.endswith("<|assistant|>")
    with pytest.raises(ValueError, match="messages"):
        llm.chat([], GREEDY)


def test_a_shut_down_engine_says_so(tiny):
    llm = LLM(str(tiny), **ENGINE)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        generate(llm, "x")
