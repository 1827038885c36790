"""The embedded model against outputs recorded with transformers in float32."""

import json
from pathlib import Path

import pytest

from jaxengine import SamplingParams

GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2_135m_instruct.json").read_text())
NEAR_TIE = 0.03


@pytest.fixture(scope="module")
def outputs(smollm2):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=5)
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in GOLDEN["rows"]]
    return smollm2.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("index", range(len(GOLDEN["rows"])))
def test_tokens_and_logprobs(outputs, index):
    row, got = GOLDEN["rows"][index], outputs[index].outputs[0]
    end = next((i for i, gap in enumerate(row["gaps"]) if gap < NEAR_TIE), len(row["output_ids"]))
    assert end > 5
    assert list(got.token_ids)[:end] == row["output_ids"][:end]
    same = 0
    for step, (token_ids, logprobs) in enumerate(row["top"]):
        if list(got.token_ids)[:step] != row["output_ids"][:step]:
            break  # after a near tie went the other way, the contexts differ
        found = got.logprobs[step]
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            assert found[token_id].logprob == pytest.approx(logprob, abs=0.01)
            same += 1
    assert same >= 5 * min(end, len(row["top"]))


@pytest.mark.parametrize("index", range(len(GOLDEN["rows"])))
def test_the_tokenizer_gives_the_recorded_ids(smollm2, index):
    row = GOLDEN["rows"][index]
    assert smollm2.get_tokenizer().encode(row["prompt"]) == row["prompt_ids"]


def test_chat_renders_the_recorded_prompt(smollm2):
    chats = [row for row in GOLDEN["rows"] if row["kind"] == "chat"]
    assert chats
    params = SamplingParams(temperature=0, max_tokens=1)
    outputs = smollm2.chat([row["messages"] for row in chats], params, use_tqdm=False)
    for row, output in zip(chats, outputs, strict=True):
        assert output.prompt_token_ids == row["prompt_ids"]
