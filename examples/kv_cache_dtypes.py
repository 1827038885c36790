"""What a cache of 8 bits costs: perplexity of a text, and how often the most likely token is another.

Run: python examples/kv_cache_dtypes.py (two minutes on two CPU cores)
"""

import math
from pathlib import Path

from jaxengine import LLM, SamplingParams

TEXT = Path(__file__).parents[1] / "docs" / "architecture.md"
DTYPES = ("bfloat16", "fp8", "int8")
CHUNK, CHUNKS = 450, 6
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Once upon a time there was a",
    "The three primary colours are",
    "In 1969, the first",
    "To make bread you need",
    "A prime number is",
]


def measure(dtype: str, text: str) -> tuple[list[float], list[int], list[list[int]]]:
    """Returns the log probability of each token of the text, the most likely token there, and greedy answers."""
    with LLM(kv_cache_dtype=dtype, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=256) as llm:
        tokens = llm.get_tokenizer().encode(text)
        chunks = [tokens[i * CHUNK : (i + 1) * CHUNK] for i in range(CHUNKS)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        logprobs, best = [], []
        for output in llm.generate([{"prompt_token_ids": chunk} for chunk in chunks if chunk], params):
            for token, entries in zip(output.prompt_token_ids or [], output.prompt_logprobs or [], strict=True):
                if entries:  # nothing predicts the first
                    logprobs.append(entries[token].logprob)
                    best.append(max(entries, key=lambda t, entries=entries: entries[t].logprob))
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        answers = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]
    return logprobs, best, answers


def same_prefix(answer: list[int], other: list[int]) -> int:
    """Returns how many tokens two answers begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), len(answer))


def main() -> None:
    """Prints the table."""
    results = {dtype: measure(dtype, TEXT.read_text(encoding="utf-8")) for dtype in DTYPES}
    _, best, answers = results[DTYPES[0]]
    print(f"{len(best)} tokens of {TEXT.name}; {len(PROMPTS)} greedy answers of 64 tokens")
    print(f"{'kv_cache_dtype':<15} {'perplexity':>10} {'same token':>11} {'same beginning':>15}")
    for dtype, (logprobs, own_best, own_answers) in results.items():
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        same = sum(a == b for a, b in zip(best, own_best, strict=True)) / len(best)
        begin = sum(map(same_prefix, answers, own_answers)) / len(answers)
        print(f"{dtype:<15} {perplexity:>10.3f} {same:>11.1%} {begin:>9.1f} of 64")


if __name__ == "__main__":
    main()
