"""Ways to sample: several completions, seeds, stop strings, log probabilities, a function on the logits, beams.

Run: python examples/sampling.py
"""

import jax
import jax.numpy as jnp

from jaxengine import LLM, BeamSearchParams, SamplingParams


def no_even_tokens(logits: jax.Array, state: object) -> jax.Array:
    """Forbids even tokens. A logits processor is a pure JAX function, which is compiled into the step."""
    return logits.at[::2].set(-jnp.inf)


with LLM(logits_processors=[no_even_tokens]) as llm:
    prompt = "My favourite animal is"

    params = SamplingParams(n=3, temperature=0.9, top_p=0.95, seed=7, max_tokens=12)
    (output,) = llm.generate(prompt, params)
    for completion in output.outputs:
        print(f"sampled {completion.index}: {completion.text!r}")

    (output,) = llm.generate(prompt, SamplingParams(temperature=0, stop=[".", "\n"], max_tokens=40))
    print(f"until {output.outputs[0].stop_reason!r}: {output.outputs[0].text!r}")

    (output,) = llm.generate(prompt, SamplingParams(temperature=0, logprobs=3, max_tokens=1))
    for logprob in (output.outputs[0].logprobs or [])[0].values():
        print(f"rank {logprob.rank}: {logprob.decoded_token!r} {logprob.logprob:.2f}")

    (output,) = llm.generate(prompt, SamplingParams(temperature=0, logits_processors=[no_even_tokens], max_tokens=8))
    print(f"odd token ids only: {output.outputs[0].token_ids}")

    (beams,) = llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=8))
    for beam in beams.sequences:
        print(f"beam {beam.cum_logprob:.2f}: {beam.text!r}")
