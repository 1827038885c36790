"""After warm-up nothing is ever compiled again."""

import itertools
import random

from jaxengine import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jaxengine.runner.buckets import fitting, make_buckets, token_sizes


def test_buckets_carry_bounded_padding():
    for max_tokens in (1, 7, 64, 100, 2048, 8192):
        for coarse, most in ((False, 1.25), (True, 1.5)):
            sizes = token_sizes(max_tokens, coarse=coarse)
            assert sizes == sorted(set(sizes))
            assert sizes[-1] == max_tokens
            assert all(b / (a + 1) <= most for a, b in itertools.pairwise(sizes) if b > 64)
            buckets = make_buckets(max_tokens, 32, coarse=coarse)
            for num_tokens in range(1, min(max_tokens, 300) + 1):
                for num_seqs in {1, min(num_tokens, 32)}:
                    found = fitting(buckets, num_tokens, num_seqs)[0]
                    assert found.num_tokens >= num_tokens
                    assert found.num_seqs >= num_seqs
                    assert not found.decode_only
                if not coarse and num_tokens <= 32:
                    found = fitting(buckets, num_tokens, num_tokens, decode_only=True)[0]
                    assert found.decode_only
                    assert num_tokens <= found.num_tokens == found.num_seqs <= 2 * num_tokens


def test_no_compilation_after_warm_up(tiny):
    rng = random.Random(0)

    def even(logits, state):
        return logits.at[1::2].set(-1e9)

    with LLM(
        str(tiny),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=60,
        logits_processors=[even],
        warmup="full",
    ) as llm:
        engine = llm.llm_engine
        before = engine.compilations.count
        assert before > 0
        choices = [
            SamplingParams(temperature=0, max_tokens=9),
            SamplingParams(temperature=1.0, top_p=0.9, top_k=20, min_p=0.1, seed=3, max_tokens=9),
            SamplingParams(temperature=0, logprobs=5, prompt_logprobs=3, max_tokens=9),
            SamplingParams(temperature=0.5, repetition_penalty=1.2, presence_penalty=0.1, bad_words=["a b"], n=3),
            SamplingParams(temperature=0, logit_bias={5: 3.0}, min_tokens=4, allowed_token_ids=list(range(50))),
            SamplingParams(temperature=0, logits_processors=[even], max_tokens=5),
            SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(regex="[a-z]+"), max_tokens=5),
        ]
        for _ in range(12):
            count = rng.randint(1, 30)
            prompts = [[rng.randrange(5, 200) for _ in range(rng.randint(1, 100))] for _ in range(count)]
            params = [rng.choice(choices) for _ in prompts]
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            for output, param in zip(outputs, params, strict=True):
                assert output.finished
                if param.logits_processors:
                    assert all(t % 2 == 0 for t in output.outputs[0].token_ids)
        llm.beam_search({"prompt_token_ids": [5, 6, 7]}, BeamSearchParams(beam_width=3, max_tokens=4))
        assert engine.compilations.count == before
        metric = next(m for m in llm.get_metrics() if m.name == "jaxengine_compilations_total")
        assert metric.value == before
