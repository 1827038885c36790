"""The model without a cache: the log probabilities of the engine, and gradients of every parameter."""

from __future__ import annotations

import dataclasses
import functools
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
from jaxengine.models.layers.causal_attention import causal_attention
from jaxengine.models.registry import model_class
from jaxengine.models.step import ModelInputs, StepContext
from jaxengine.models.training import token_log_probs
from jaxengine.pallas_kernels.ragged_paged_attention import (
    AttentionMetadata,
    AttentionSpec,
    make_cache,
    ragged_paged_attention,
)

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name for path in DATA.iterdir())
KINDS_OF_LAYERS = ("gemma2", "gpt2", "llama3", "olmo2")  # the other families have these kinds of layers too
TOLERANCE = 1e-4


def load(case: str) -> tuple[CausalLM, np.ndarray, np.ndarray]:
    """The model in float32, tokens, and the logits that transformers computes after each."""
    checkpoint = HFCheckpoint(DATA / case)
    reference = np.load(DATA / case / "reference.npz")
    config = ModelConfig.from_hf(checkpoint.config)
    if case == "phi3_longrope_short":  # served no longer than the original context: the short factors
        config = dataclasses.replace(config, max_model_len=64)
    return load_model(checkpoint, config, jnp.float32), reference["token_ids"], reference["logits"]


def log_probs_of(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Of each token but the first, from the logits after the one before it."""
    return np.asarray(jax.nn.log_softmax(logits[:-1]))[np.arange(len(token_ids) - 1), token_ids[1:]]


def loss(model: CausalLM, token_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs = token_log_probs(model, token_ids, positions)
    return -log_probs.mean(), log_probs


@pytest.mark.parametrize(
    "case", [case if case in KINDS_OF_LAYERS else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_log_probs_and_gradients(case):
    """Of two sequences side by side, the second one shorter: each as by itself."""
    model, token_ids, logits = load(case)
    want, short = log_probs_of(logits, token_ids), len(token_ids) // 2
    packed = jnp.asarray(np.concatenate([token_ids, token_ids[:short]]))
    positions = jnp.concatenate([jnp.arange(len(token_ids)), jnp.arange(short)])
    differentiate = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    (_, got), gradients = differentiate(model, packed, positions)
    assert got[0] == got[len(token_ids)] == 0
    np.testing.assert_allclose(got[1 : len(token_ids)], want, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got[len(token_ids) + 1 :], want[: short - 1], rtol=0, atol=TOLERANCE)

    gradients = nnx.to_flat_state(gradients)
    assert len(gradients) == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, gradient in gradients:
        values = np.asarray(gradient[...])
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path


def test_a_batch_is_each_sequence_by_itself():
    model, token_ids, _ = load("llama3")
    batch = jnp.asarray(token_ids[:24].reshape(3, 8))
    got = nnx.jit(lambda model: jax.vmap(functools.partial(token_log_probs, model))(batch))(model)
    want = nnx.jit(token_log_probs)(model, batch.reshape(-1), jnp.tile(jnp.arange(8), 3))
    np.testing.assert_allclose(got.reshape(-1), want, rtol=0, atol=1e-5)


def test_stacked_layers_give_the_same():
    model, token_ids, logits = load("llama3")
    assert model.stack_layers()
    assert model.stack_layers()
    differentiate = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    (_, got), gradients = differentiate(model, jnp.asarray(token_ids), jnp.arange(len(token_ids)))
    np.testing.assert_allclose(got[1:], log_probs_of(logits, token_ids), rtol=0, atol=TOLERANCE)
    gradient = np.asarray(gradients["layers"]["layer"]["mlp"]["down_proj"]["weight"][...])
    assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    ("dtype", "window", "soft_cap", "has_sinks"),
    [
        ("float32", None, None, False),
        ("bfloat16", 5, 2.0, True),
        *(pytest.param("float32", *case, marks=pytest.mark.slow) for case in ((3, None, True), (None, 0.7, True))),
    ],
)
def test_attention_is_that_of_the_op(dtype, window, soft_cap, has_sinks):
    """Three sequences, of 9, 1 and 13 tokens, through the paged cache and without."""
    lengths, num_heads, num_kv_heads, head_dim, page_size = [9, 1, 13], 6, 2, 8, 4
    starts = np.concatenate([[0], np.cumsum(lengths)])
    draw = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(draw.normal(size=(starts[-1], heads, head_dim)), dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    sinks = jnp.asarray(draw.normal(size=num_heads), jnp.float32) if has_sinks else None
    options = {"scale": 0.4, "sliding_window": window, "soft_cap": soft_cap, "sinks": sinks}
    table = np.arange(12).reshape(3, 4)
    numbers = np.array(lengths), starts, table, 3, 0
    meta = AttentionMetadata(*(jnp.asarray(x, jnp.int32) for x in numbers))  # pyright: ignore[reportArgumentType]
    cache = make_cache(AttentionSpec(num_heads, num_kv_heads, head_dim, page_size, dtype, dtype), 12)
    want, _ = ragged_paged_attention(q, k, v, cache, meta, **options)
    got = causal_attention(q, k, v, jnp.repeat(jnp.arange(3), np.array(lengths)), **options)
    assert got.dtype == want.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0, atol=tolerance)


def test_no_kernel_runs_where_gradients_are_taken(monkeypatch):
    """Of a step whose products and norms have kernels on a Hopper when it has caches."""
    monkeypatch.setattr("jaxengine.pallas_kernels.skinny_matmul.api.MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr("jaxengine.pallas_kernels.add_norm.api.MIN_COLUMNS", 0)
    config = ModelConfig.from_hf(
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
    )
    graphdef, state = nnx.split(model_class(config.architecture)(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    token_ids = jnp.arange(16)

    def with_caches(state):
        numbers = [16], [0, 16], [[0]], 1, 0
        meta = AttentionMetadata(*(jnp.asarray(x, jnp.int32) for x in numbers))  # pyright: ignore[reportArgumentType]
        caches = [make_cache(AttentionSpec(4, 4, 128, 16, "bfloat16", "bfloat16"), 1)] * 2
        inputs = ModelInputs(token_ids, token_ids)
        return nnx.merge(graphdef, state)(inputs, caches, StepContext((meta,))).hidden

    def gradients(state):
        return jax.grad(lambda state: loss(nnx.merge(graphdef, state), token_ids, token_ids)[0])(state)

    hopper = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=hopper)):
        kernels = [str(jax.make_jaxpr(function)(state)).count("mpmd_map[") for function in (with_caches, gradients)]
    assert kernels[0] > 0
    assert kernels[1] == 0


def test_caches_and_context_go_together():
    model, token_ids, _ = load("llama3")
    inputs = ModelInputs(jnp.asarray(token_ids), jnp.arange(len(token_ids)))
    with pytest.raises(ValueError, match="caches and step go together"):
        model(inputs, step=StepContext())
    with pytest.raises(ValueError, match="caches and step go together"):
        model(inputs, [None, None])
