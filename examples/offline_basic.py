"""Continues some prompts.

Run: python examples/offline_basic.py
"""

from jaxengine import LLM, SamplingParams

prompts = ["The capital of France is", "Water boils at", "Once upon a time"]

with LLM() as llm:  # SmolLM2-135M-Instruct; LLM("Qwen/Qwen3-0.6B") takes a model from the Hugging Face hub
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))

for output in outputs:
    completion = output.outputs[0]
    print(f"{output.prompt!r} -> {completion.text!r} ({len(completion.token_ids)} tokens, {completion.finish_reason})")
