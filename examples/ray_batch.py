"""Batch inference as a stage of Ray Data: pip install "jaxengine[ray]".

python examples/ray_batch.py --engines 2
On a cluster, call `ray.init(address="auto")` first, or set RAY_ADDRESS; every engine gets the GPUs of its
tensor-parallel group, or one CPU where there are none.
"""

import argparse

import ray.data  # pyright: ignore[reportMissingImports]

from jaxengine.ray import build_llm_processor

QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Why is the sky blue?"]


def main() -> None:
    """Answers a data set of questions, and prints it."""
    parser = argparse.ArgumentParser(description="Batch inference with Ray Data.")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    process = build_llm_processor(
        args.model,
        concurrency=args.engines,
        batch_size=32,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=512,
        warmup="lazy",
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": row["item"]}],
            "sampling_params": {"temperature": 0.0, "max_tokens": args.max_tokens},
        },
        postprocess=lambda row: {"question": row["messages"][0]["content"], "answer": row["generated_text"]},
    )
    for row in process(ray.data.from_items(QUESTIONS)).take_all():
        print(f"{row['question']} -> {row['answer']!r}")


if __name__ == "__main__":
    main()
