"""Every family computes what transformers computes, in one chunk and through the paged cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.loading.loader import load_model
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.registry import model_class
from jaxengine.models.step import ModelInputs, StepContext
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, AttentionSpec, make_cache

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name for path in DATA.iterdir())
TOLERANCE = 1e-4
NUM_ROWS = 48  # tokens of a step, padding included: one shape, so that each model is compiled once
PAGE_SIZE = 8
PAGES_PER_SEQUENCE = 6
# Pages are handed out in no order, and page 0 to nobody.
PAGE_TABLE = np.random.default_rng(0).permutation(np.arange(1, 1 + 2 * PAGES_PER_SEQUENCE)).reshape(2, -1)


class Runner:
    """Runs steps of two sequences of the same tokens, and keeps the logits of every token."""

    def __init__(self, config: ModelConfig, model: CausalLM, token_ids: np.ndarray):
        self.token_ids = token_ids
        graphdef, state = nnx.split(model)
        self.leaves, treedef = jax.tree.flatten(state)
        layout = config.cache_layout
        num_pages = len(layout.groups) * (1 + PAGE_TABLE.size)
        self.caches = [make_cache(_spec(config, "float32"), num_pages) for _ in range(layout.num_arrays)]

        def step(leaves, token_ids, positions, caches, meta):
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            tables = [meta.page_table + group * (1 + PAGE_TABLE.size) for group in range(len(layout.groups))]
            context = StepContext(tuple(dataclasses.replace(meta, page_table=table) for table in tables))
            outputs = model(ModelInputs(token_ids, positions), caches, context)
            return model.compute_logits(outputs.hidden), outputs.caches

        self.step = jax.jit(step, donate_argnums=3)
        self.restart()

    def restart(self) -> None:
        self.computed = [0, 0]
        self.logits: list[list[np.ndarray]] = [[], []]

    def run(self, *work: tuple[int, int]) -> None:
        """One step over (sequence, number of new tokens), those with one new token first."""
        ids, positions = np.zeros(NUM_ROWS, np.int32), np.zeros(NUM_ROWS, np.int32)
        kv_lens, table = np.zeros(2, np.int32), np.zeros((2, PAGES_PER_SEQUENCE), np.int32)
        starts = [0]
        for row, (sequence, count) in enumerate(work):
            first, low = self.computed[sequence], starts[-1]
            ids[low : low + count] = self.token_ids[first : first + count]
            positions[low : low + count] = np.arange(first, first + count)
            kv_lens[row], table[row] = first + count, PAGE_TABLE[sequence]
            self.computed[sequence] += count
            starts.append(low + count)
        starts += [starts[-1]] * (3 - len(starts))
        num_decodes = sum(count == 1 for _, count in work)
        numbers = (kv_lens, np.array(starts, np.int32), table, np.int32(len(work)), np.int32(num_decodes))
        meta = AttentionMetadata(*map(jnp.asarray, numbers))  # pyright: ignore[reportArgumentType]
        logits, self.caches = self.step(self.leaves, jnp.asarray(ids), jnp.asarray(positions), self.caches, meta)
        for row, (sequence, _) in enumerate(work):
            self.logits[sequence].append(np.asarray(logits)[starts[row] : starts[row + 1]])


def _spec(config: ModelConfig, dtype: str) -> AttentionSpec:
    return AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE, dtype, dtype)


@pytest.mark.parametrize("case", CASES)
def test_reference_logits(case):
    checkpoint = HFCheckpoint(DATA / case)
    reference = np.load(DATA / case / "reference.npz")
    token_ids, expected = reference["token_ids"], reference["logits"]
    config = ModelConfig.from_hf(checkpoint.config)
    if case == "phi3_longrope_short":  # served no longer than the original context: the short factors
        config = dataclasses.replace(config, max_model_len=64)
    runner = Runner(config, load_model(checkpoint, config, jnp.float32), token_ids)

    runner.run((0, len(token_ids)))
    np.testing.assert_allclose(runner.logits[0][0], expected, rtol=0, atol=TOLERANCE)

    # Chunks of 16 and single tokens, each step mixed with those of another sequence.
    runner.restart()
    runner.run((1, 24))
    runner.run((1, 1), (0, 16))
    runner.run((1, 1), (0, 16))
    while runner.computed[0] < len(token_ids):
        runner.run((1, 1), (0, 1))
    for logits in map(np.concatenate, runner.logits):
        np.testing.assert_allclose(logits, expected[: len(logits)], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["gemma3", "gpt2", "llama3", "olmo2", "phi3", "qwen3"])
def test_activations_keep_the_dtype_of_the_weights(case):
    config = ModelConfig.from_hf(HFCheckpoint(DATA / case).config)
    model = model_class(config.architecture)(config, dtype=jnp.bfloat16)
    leaves, treedef = jax.tree.flatten(model)
    layout = config.cache_layout
    caches = [make_cache(_spec(config, "bfloat16"), 2)] * layout.num_arrays
    numbers = [jnp.zeros(shape, jnp.int32) for shape in ((2,), (3,), (2, 2), (), (), (11,), (11,))]

    def step(leaves, inputs, caches, context):
        model = jax.tree.unflatten(treedef, leaves)
        hidden, _, caches = model(inputs, caches, context)
        return hidden, model.compute_logits(hidden), caches

    context = StepContext((AttentionMetadata(*numbers[:5]),) * len(layout.groups))  # pyright: ignore[reportArgumentType]
    hidden, logits, caches = jax.eval_shape(step, leaves, ModelInputs(*numbers[5:]), caches, context)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(caches)} == {jnp.dtype(jnp.bfloat16)}
