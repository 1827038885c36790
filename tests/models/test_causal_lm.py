"""What goes into the model besides tokens, and what it returns besides the last hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.norm import add_up
from jaxengine.models.registry import model_class
from jaxengine.models.step import ModelInputs, ModelOutputs, StepContext
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, AttentionSpec, make_cache

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
NUM_TOKENS, NUM_PAGES, PAGE_SIZE = 11, 8, 8


def make_model(architecture: str, *, num_layers: int = 3, taps: tuple[int, ...] = ()) -> CausalLM:
    config = ModelConfig.from_hf(
        {"architectures": [architecture], "num_hidden_layers": num_layers, "head_dim": 8, "vocab_size": 50}
        | {"max_position_embeddings": 64, "n_embd": 32, "n_layer": num_layers, "n_head": 4, "n_positions": 64}
        | SIZES
    )
    config = dataclasses.replace(config, taps=taps)
    return model_class(architecture)(config, rngs=nnx.Rngs(0))


def make_inputs(**fields: Any) -> ModelInputs:
    return ModelInputs(jnp.arange(NUM_TOKENS) * 7 % 50, jnp.arange(NUM_TOKENS), **fields)


def make_step(model: CausalLM) -> StepContext:
    """Of one sequence on two pages of each group."""

    def attention(group: int) -> AttentionMetadata:
        numbers = [NUM_TOKENS], [0, NUM_TOKENS], [[2 * group, 2 * group + 1]], 1, 0
        return AttentionMetadata(*(jnp.asarray(x, jnp.int32) for x in numbers))  # pyright: ignore[reportArgumentType]

    return StepContext(tuple(map(attention, range(len(model.config.cache_layout.groups)))))


def make_caches(model: CausalLM, num_caches: int) -> list[Any]:
    config = model.config
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE, "float32", "float32")
    return [make_cache(spec, NUM_PAGES * config.num_layers // num_caches) for _ in range(num_caches)]


def run(model: CausalLM, inputs: ModelInputs) -> ModelOutputs:
    """One step with caches, of stacked layers or not."""
    num_caches = model.config.cache_layout.num_arrays if isinstance(model.layers, nnx.List) else 1
    return nnx.jit(CausalLM.__call__)(model, inputs, make_caches(model, num_caches), make_step(model))


def residuals_by_hand(model: CausalLM, inputs: ModelInputs) -> list[jax.Array]:
    """The embeddings, and what each layer makes of those before it; without caches."""
    step = model._complete(StepContext(segment_ids=inputs.segment_ids()), inputs, [])
    found = [model.embed(inputs)]
    assert isinstance(model.layers, nnx.List)
    for layer in model.layers:
        found.append(add_up(layer(found[-1], None, step)[0]))
    return found


def assert_close(outputs: ModelOutputs, want: list[jax.Array], model: CausalLM) -> None:
    np.testing.assert_allclose(outputs.hidden, model.norm(want[-1]), rtol=0, atol=1e-5)
    for tap, number in zip(outputs.taps, model.config.taps, strict=True):
        np.testing.assert_allclose(tap, want[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_taps_are_the_residuals_between_layers(architecture):
    """With caches and without, and of stacked layers."""
    inputs, model = make_inputs(), make_model(architecture, taps=(0, 2, 3))
    want = residuals_by_hand(model, inputs)
    assert_close(model(inputs), want, model)
    model.stack_layers()  # of Llama; Gemma's layers differ
    assert_close(run(model, inputs), want, model)


def test_what_is_not_asked_for_is_not_computed():
    """A step without taps and vectors has the operations of its layers, embedding and norm, and no more."""

    def operations(**options: Any) -> int:
        model = make_model("LlamaForCausalLM", **options)
        graphdef, state = nnx.split(model)
        caches, step = make_caches(model, 3), make_step(model)

        def hidden(state, inputs, caches, step):
            return nnx.merge(graphdef, state)(inputs, caches, step)

        return len(jax.make_jaxpr(hidden)(state, make_inputs(), caches, step).eqns)

    num_plain = operations()
    assert operations(taps=(0,)) == num_plain  # the embeddings are there anyway
    assert operations(taps=(1,)) == num_plain + 1  # one addition
    assert operations(taps=(1, 2)) == num_plain + 2


def test_taps_must_be_layers():
    for taps in ((4,), (-1,), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match=r"taps is \(.*\); it must be ascending numbers of layers from 0 to 3"):
            make_model("LlamaForCausalLM", taps=taps)
    assert make_model("LlamaForCausalLM", taps=(1, 3)).config.first_layers(2).taps == (1,)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"])
def test_vectors_replace_embeddings(architecture):
    """Rows of other tokens' embeddings give what those tokens give; the other rows are not looked at."""
    model, inputs = make_model(architecture), make_inputs()
    tokens = inputs.token_ids.at[3:6].set(jnp.array([1, 2, 3]))
    want = model(dataclasses.replace(inputs, token_ids=tokens)).hidden
    scale = jnp.asarray(model.config.embedding_scale, jnp.float32)
    embeds = jnp.full((NUM_TOKENS, 32), jnp.nan).at[3:6].set(model.embed_tokens(tokens[3:6]) * scale)
    mask = jnp.zeros(NUM_TOKENS, bool).at[3:6].set(True)
    got = model(make_inputs(embeds=embeds, embeds_mask=mask)).hidden
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(want) != np.asarray(model(inputs).hidden)).any()


def test_vectors_that_do_not_fit_are_refused():
    model = make_model("LlamaForCausalLM")
    embeds, mask = jnp.zeros((NUM_TOKENS, 32)), jnp.zeros(NUM_TOKENS, bool)
    with pytest.raises(ValueError, match="embeds is given without embeds_mask"):
        make_inputs(embeds=embeds)
    with pytest.raises(ValueError, match="embeds_mask is given without embeds"):
        make_inputs(embeds_mask=mask)
    for fields in ({"embeds": embeds[1:], "embeds_mask": mask}, {"embeds": embeds, "embeds_mask": mask[1:]}):
        with pytest.raises(ValueError, match=r"embeds is .*; they must be \(11, 32\) and \(11,\)"):
            model(make_inputs(**fields))


def test_layers_with_the_same_window_share_pages_and_plan():
    llama, gemma = make_model("LlamaForCausalLM").config, make_model("Gemma2ForCausalLM").config
    assert [group.spec.window for group in llama.cache_layout.groups] == [None]
    assert [group.spec.window for group in gemma.cache_layout.groups] == [4096, None, 4096]
    assert gemma.cache_layout.group_of == (0, 1, 2)  # one array: two would be half empty
    assert [gemma.rotation(layer) for layer in range(3)] == [0, 0, 0]
    assert make_model("GPT2LMHeadModel").config.rotations == ()
