"""Reinforcement learning: the engine samples, a policy gradient trains the same model, the engine takes its weights.

The reward is the share of words that begin with a vowel, of which English has about one in three. It needs optax
(`pip install optax`) and some 4 GB of memory, and takes two to four minutes on two cores of a CPU.

Run: python examples/reinforce.py
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxengine import LLM, CompletionOutput, SamplingParams
from jaxengine.loading.loader import load_model, named_weights
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.training import token_log_probs

PROMPTS = ["Once upon a time, there was", "My favourite food is", "The city at night", "When I was young,"]
MAX_RATIO = 2.0
"""Bound of the importance weights: of a token that has become this much likelier since it was sampled."""


def reward(text: str) -> float:
    """Returns the share of words that begin with a vowel."""
    words = text.split()
    return sum(word[0].lower() in "aeiou" for word in words) / max(len(words), 1)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Returns how much better each completion is than the others of its prompt, `[prompts, completions]`."""
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, keepdims=True) + 1e-4)


def make_batch(samples: list[tuple[list[int], CompletionOutput]], length: int) -> dict[str, np.ndarray]:
    """Returns prompts with their completions, padded at the end: arrays `[B, length]`.

    They are the tokens, which of them were sampled, and the log probabilities that the engine sampled these with.
    """
    shape = (len(samples), length)
    batch = {
        "token_ids": np.zeros(shape, np.int32),
        "is_sampled": np.zeros(shape, bool),
        "log_probs": np.zeros(shape, np.float32),
    }
    for row, (prompt, completion) in enumerate(samples):
        tokens, start = list(completion.token_ids), len(prompt)
        sampled = slice(start, start + len(tokens))
        batch["token_ids"][row, : sampled.stop] = prompt + tokens
        batch["is_sampled"][row, sampled] = True
        steps = zip(completion.logprobs or [], tokens, strict=True)
        batch["log_probs"][row, sampled] = [step[token].logprob for step, token in steps]
    return batch


def loss_function(model: CausalLM, batch: dict[str, Any], advantage: Any) -> tuple[jax.Array, jax.Array]:
    """Returns REINFORCE's loss, and the mean distance of a token's log probability from the engine's."""
    log_probs = jax.vmap(lambda token_ids: token_log_probs(model, token_ids))(batch["token_ids"])
    difference = jnp.where(batch["is_sampled"], log_probs - batch["log_probs"], 0.0)
    # The engine holds weights in the checkpoint's bfloat16, the trainer in float32: so a token counts as often as the
    # trainer's model would sample it. Where both are in float32 the log probabilities are the same.
    weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(difference)), MAX_RATIO)
    gain = jnp.where(batch["is_sampled"], weight * advantage[:, None] * log_probs, 0.0)
    num_sampled = batch["is_sampled"].sum()
    return -gain.sum() / num_sampled, jnp.abs(difference).sum() / num_sampled


@nnx.jit
def train_step(model: CausalLM, optimizer: nnx.Optimizer, batch: dict[str, Any], advantage: Any) -> jax.Array:
    """Takes one step; returns the mean distance of a token's log probability from the engine's."""
    gradients, distance = nnx.grad(loss_function, has_aux=True)(model, batch, advantage)
    optimizer.update(model, gradients)
    return distance


def main(model_name: str | None, iterations: int, samples: int, max_tokens: int, learning_rate: float) -> None:
    """Trains, and prints a line for each iteration."""
    options: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4 * samples, "max_num_batched_tokens": 128}
    with LLM(model_name, **options) as llm:
        checkpoint = llm.llm_engine.checkpoint
        model = load_model(checkpoint, ModelConfig.from_hf(checkpoint.config), jnp.float32)
        model.stack_layers()  # compiles faster
        optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)
        prompts: Any = [{"prompt_token_ids": llm.get_tokenizer().encode(prompt)} for prompt in PROMPTS]
        length = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + max_tokens
        for iteration in range(1, iterations + 1):
            start = time.perf_counter()
            params = SamplingParams(n=samples, temperature=1.0, max_tokens=max_tokens, logprobs=0, seed=iteration)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            rewards = np.array([[reward(completion.text) for completion in output.outputs] for output in outputs])
            pairs = [(list(output.prompt_token_ids or ()), c) for output in outputs for c in output.outputs]
            advantage = advantages(rewards).reshape(-1).astype(np.float32)
            distance = train_step(model, optimizer, make_batch(pairs, length), advantage)
            llm.update_weights(named_weights(model))
            print(
                f"iteration {iteration}: reward {rewards.mean():.3f}, log probabilities {distance:.3f} from the "
                f"engine's, {time.perf_counter() - start:.1f} s, {outputs[0].outputs[0].text!r:.60}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a model; by default the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8, help="completions of each of the four prompts")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()
    main(args.model, args.iterations, args.samples, args.max_tokens, args.learning_rate)
