"""Every endpoint, through the real OpenAI client where it has it."""

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError, NotFoundError

from jaxengine import __version__
from tests.server.conftest import BEARER, KEY

# Far from greedy: the tiny model repeats itself else. All bytes come, so characters are cut in the middle too.
RANDOM: dict[str, Any] = {"temperature": 20.0, "seed": 5, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def complete(client, prompt: Any = "Hello", **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **RANDOM | fields)


def chat(client, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **RANDOM | fields)


def test_completion(client):
    answer = complete(client)
    (choice,) = answer.choices
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert choice.finish_reason == "length"
    assert choice.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 24, 29)


def test_streams_add_up_to_the_whole_text(client):
    whole = complete(client).choices[0].text
    chunks = list(complete(client, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_streams_add_up_too(client):
    answer = chat(client)
    message = answer.choices[0].message
    assert (answer.object, message.role, answer.choices[0].finish_reason) == ("chat.completion", "assistant", "length")
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert last.choices == []
    assert last.usage == answer.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})


def test_a_seed_repeats_and_another_does_not(client):
    texts = [complete(client, seed=seed).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {complete(client, seed=None).choices[0].text for _ in range(2)}
    assert len(unseeded) == 2


def test_several_prompts_and_completions(client):
    answer = complete(client, prompt=["ab", "cd"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 96)
    texts = [""] * 4
    for chunk in complete(client, prompt=["ab", "cd"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]
    several = chat(client, n=3)
    assert len({choice.message.content for choice in several.choices}) == 3


def test_token_ids_are_a_prompt(client, server):
    ids = server.post("/tokenize", {"prompt": "Hello"}).json()["tokens"]
    texts = [complete(client, prompt=prompt).choices[0].text for prompt in ("Hello", ids, [ids])]
    assert len(set(texts)) == 1


def test_token_ids_of_answers(client, server):
    asked = {"extra_body": RANDOM["extra_body"] | {"return_token_ids": True}}
    plain = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1}).json()
    assert "token_ids" not in plain["choices"][0]
    prompt = server.post("/tokenize", {"prompt": "Hello"}).json()["tokens"]
    whole = complete(client, **asked).choices[0]
    assert whole.prompt_token_ids == prompt
    assert len(whole.token_ids) == 24
    chunks = [chunk.choices[0] for chunk in complete(client, stream=True, **asked)]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [getattr(chunk, "prompt_token_ids", None) for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)

    whole = chat(client, **asked)
    chunks = list(chat(client, stream=True, **asked))
    assert len(whole.choices[0].token_ids) == 24
    told = [getattr(chunk.choices[0], "token_ids", None) or [] for chunk in chunks]
    assert [token for token_ids in told for token in token_ids] == whole.choices[0].token_ids
    prompts = [getattr(chunk, "prompt_token_ids", None) for chunk in chunks]
    assert prompts == [whole.prompt_token_ids] + [None] * (len(chunks) - 1)


def test_stop_strings_and_tokens(client, server):
    text = complete(client, max_tokens=40).choices[0].text
    stop = next(text[i : i + 2] for i in range(6, 40) if "\ufffd" not in text[i : i + 2])
    stopped = complete(client, max_tokens=40, stop=["never there", stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    streamed = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text
    assert streamed[-1].choices[0].finish_reason == "stop"
    kept = complete(
        client, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True, "ignore_eos": True}
    )
    assert kept.choices[0].text == stopped.text + stop
    (token,) = server.post("/tokenize", {"prompt": stop[0]}).json()["tokens"]
    by_token = complete(client, max_tokens=40, extra_body={"stop_token_ids": [token], "ignore_eos": True}).choices[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)


def test_vllms_parameters_reach_the_sampler(client, server):
    a, b = server.post("/tokenize", {"prompt": "ab"}).json()["tokens"]
    only = complete(client, extra_body={"allowed_token_ids": [a, b]})
    assert set(only.choices[0].text) == {"a", "b"}
    biased = complete(client, temperature=0, logit_bias={str(a): 100}).choices[0].text
    assert set(biased) == {"a"}
    banned = complete(client, extra_body={"allowed_token_ids": [a, b], "bad_words": ["a"]})
    assert set(banned.choices[0].text) == {"b"}
    two = {"allowed_token_ids": [a, b], "ignore_eos": True}
    greedy = complete(client, temperature=0, extra_body=two).choices[0].text
    for alone in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(client, extra_body=two | alone).choices[0].text == greedy
    rising, falling = (complete(client, temperature=0, frequency_penalty=p, extra_body=two) for p in (2, -2))
    assert len(set(rising.choices[0].text)) == 2
    assert len(set(falling.choices[0].text[8:])) == 1


def test_completion_logprobs(client):
    fields = {"logprobs": 2, "extra_body": {"ignore_eos": True, "allowed_token_ids": list(range(70, 90))}}
    logprobs = complete(client, **fields).choices[0].logprobs
    assert {len(part) for part in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)} == {24}
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 2 <= len(top) <= 3
        assert top[token] == logprob <= 0
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(24)]
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, **fields, stream=True)]
    assert [token for part in streamed for token in part.tokens] == logprobs.tokens
    assert [offset for part in streamed for offset in part.text_offset] == logprobs.text_offset


def test_chat_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 24
    for entry in content:
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0]
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    tokens = [entry.token for part in streamed if part for entry in part.content]
    assert tokens == [entry.token for entry in content]
    bare = chat(client, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in bare] == [[]] * 24


def test_echo(client):
    plain = complete(client).choices[0]
    echoed = complete(client, echo=True, logprobs=1).choices[0]
    assert echoed.text == "Hello" + plain.text
    assert echoed.logprobs.tokens[:5] == list("Hello")
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.token_logprobs) == 5 + 24
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, echo=True, stream=True))
    assert streamed == echoed.text
    scored = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert (scored.choices[0].text, scored.usage.completion_tokens) == ("Hello", 0)
    assert scored.choices[0].logprobs.token_logprobs == echoed.logprobs.token_logprobs[:5]


def test_prompt_logprobs(client):
    answer = complete(client, extra_body={"prompt_logprobs": 1})
    first, *others = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(others) == 4
    assert all(entry["logprob"] <= 0 for position in others for entry in position.values())


def test_a_message_can_be_continued(client, server):
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    open_end = {"add_generation_prompt": False, "continue_final_message": True}
    ids = server.post("/tokenize", {"messages": messages} | open_end).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"].endswith("Well")
    answer = client.chat.completions.create(
        model="tiny", messages=messages, **RANDOM | {"extra_body": open_end | {"ignore_eos": True}}
    )
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == complete(client, prompt=ids).choices[0].text


def test_cached_tokens_are_told(client):
    prompt = "a prompt that is longer than a few pages of the cache, said twice"
    usages = [complete(client, prompt=prompt).usage for _ in range(2)]
    assert [usage.prompt_tokens_details.cached_tokens > 0 for usage in usages] == [False, True]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 1000
    assert complete(client).model == "tiny"
    assert client.completions.create(model="alias", prompt="x", max_tokens=1).model == "alias"
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")


def test_tokenize_and_detokenize(server):
    answer = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["H", "i"]
    assert (answer["count"], answer["max_model_len"]) == (2, 1000)
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Hi"}
    assert server.post("/tokenize", {"prompt": "Hi", "messages": MESSAGES}).status_code == 400


def test_small_endpoints(server):
    assert server.get("/version", headers=BEARER).json() == {"version": __version__}
    for path in ("/health", "/ping"):
        assert server.get(path).status_code == 200


def test_metrics_count(server, client):
    before = server.metrics()
    complete(client, n=2)
    complete(client, stop=" ", max_tokens=900, temperature=1, logit_bias={"36": 100})
    server.wait_until_idle()
    after = server.metrics()

    def gained(name):
        return after[f"jaxengine:{name}"] - before[f"jaxengine:{name}"]

    assert gained("generation_tokens_total") >= 48
    assert gained("prompt_tokens_total") >= 10
    assert gained("e2e_request_latency_seconds_count") == gained("time_to_first_token_seconds_count") == 2
    assert gained("inter_token_latency_seconds_count") >= 46
    name = 'request_success_total{finished_reason="length",model_name="tiny"}'
    assert gained(name) >= 2
    assert (
        after['jaxengine:e2e_request_latency_seconds_bucket{le="+Inf",model_name="tiny"}']
        == (after["jaxengine:e2e_request_latency_seconds_count"])
    )


# What vLLM's Grafana dashboards ask for; here the prefix is another.
DASHBOARD = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_prefill_kv_computed_tokens_sum",
    "iteration_tokens_total_bucket",
    "request_success_total",
]


def test_dashboards_find_their_metrics(server, client):
    before = server.metrics()
    complete(client, n=2)
    server.wait_until_idle()
    after = server.metrics()
    names = {name.partition("{")[0] for name in after}
    assert {f"jaxengine:{name}" for name in DASHBOARD} <= names

    def gained(name):
        return after[f"jaxengine:{name}"] - before[f"jaxengine:{name}"]

    assert gained("request_prompt_tokens_sum") == 10
    assert gained("request_generation_tokens_sum") == 48
    phases = {phase: gained(f"request_{phase}_time_seconds_sum") for phase in ("queue", "prefill", "decode")}
    assert all(0 < seconds < 60 for seconds in phases.values()), phases
    assert gained("request_inference_time_seconds_sum") == pytest.approx(phases["prefill"] + phases["decode"])
    assert gained("request_time_per_output_token_seconds_count") == 2
    # Both prompts and all tokens but the last of each are computed, and one of each past its end.
    assert gained("iteration_tokens_total_sum") >= 10 + 2 * 23
    assert gained("iteration_tokens_total_count") == gained("steps_total")


def test_32_streams_at_once(server, client):
    expected = [complete(client, seed=seed).choices[0].text for seed in range(3)]

    async def stream(client: AsyncOpenAI, seed: int) -> str:
        fields: dict[str, Any] = RANDOM | {"seed": seed, "stream": True}
        chunks = await client.completions.create(model="tiny", prompt="Hello", **fields)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as many:
            return await asyncio.gather(*(stream(many, seed) for seed in range(32)))

    texts = asyncio.run(all_of_them())
    assert texts[:3] == expected
    assert len(set(texts)) == 32
    server.wait_until_idle()


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", f"Basic {KEY}"])
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/nowhere"])
def test_without_a_key_nothing_is_told(server, path, header):
    answer = server.get(path, headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_client_knows_a_wrong_key(client):
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert client.with_options(api_key="another").models.list().data
