"""Many questions about one text: its keys and values are computed once and shared.

Run: python examples/batch_prefix_caching.py
"""

from jaxengine import LLM, SamplingParams

TEXT = (
    "The lighthouse on the island was built in 1871. Its keeper, an old sailor named Anna, painted it red. "
    "Every evening she lit the lamp, and every morning she wrote the weather into a book. "
    "When the lamp became electric, Anna stayed, and kept the book until she was ninety. "
)
QUESTIONS = ["When was the lighthouse built?", "Which colour is it?", "Who wrote the book?", "What became electric?"]

with LLM(enable_prefix_caching=True) as llm:  # True is the default
    params = SamplingParams(temperature=0, max_tokens=12, stop=["\n"])
    # The first request fills the cache; those after it find the text there.
    for output in llm.generate(TEXT + "Question:", params) + llm.generate(
        [f"{TEXT}Question: {question} Answer:" for question in QUESTIONS], params
    ):
        assert output.prompt is not None
        assert output.prompt_token_ids is not None
        print(
            f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens cached; "
            f"{output.prompt.removeprefix(TEXT)}{output.outputs[0].text}"
        )
    for metric in llm.get_metrics():
        if "prefix_cache" in metric.name:
            print(metric.name, metric.value)
