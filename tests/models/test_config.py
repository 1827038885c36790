"""Configurations of well-known models in the form of their own files, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.models.config import FULL, SLIDING, ModelConfig, RopeConfig
from jaxengine.models.layers import attention
from jaxengine.models.layers.param import spec_of
from jaxengine.models.layers.rope import inverse_frequencies
from jaxengine.models.registry import MODELS, model_class
from jaxengine.models.step import ModelInputs, StepContext
from jaxengine.models.weights import parameters
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, AttentionSpec, make_cache
from jaxengine.sharding.axes import LOGICAL_AXES
from jaxengine.sharding.mesh import make_mesh
from jaxengine.sharding.rules import RULES, partition_spec


def hf(architecture, dim, ffn_dim, layers, heads, kv_heads, vocab, **more):
    """A config.json of the older form."""
    return {
        "architectures": [architecture],
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


LLAMA_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_8B = hf(
    *("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128256),
    rope_theta=5e5,
    rope_scaling=LLAMA_SCALING,
    max_position_embeddings=131072,
)
GEMMA_3_1B = hf(
    *("Gemma3ForCausalLM", 1152, 6912, 26, 4, 1, 262144), head_dim=256, sliding_window=512, sliding_window_pattern=6
)
PHI_3_MINI = hf("Phi3ForCausalLM", 3072, 8192, 32, 32, 32, 32064, sliding_window=2047)
# Configurations and the number of parameters that their model cards or papers give.
WELL_KNOWN = {
    "SmolLM2-135M": (
        hf("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=100000),
        134_515_008,
    ),
    "Llama-3.1-8B": (LLAMA_3_8B, 8_030_261_248),
    "Mistral-7B-v0.1": (
        hf("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        hf("Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True, use_sliding_window=False),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        hf("Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 151936, tie_word_embeddings=True, head_dim=128),
        596_049_920,
    ),
    "Gemma-2-2B": (hf("Gemma2ForCausalLM", 2304, 9216, 26, 8, 4, 256000, head_dim=256), 2_614_341_888),
    "Gemma-3-1B": (GEMMA_3_1B, 999_885_952),
    "Phi-3-mini": (PHI_3_MINI, 3_821_079_552),
    "OLMo-2-7B": (hf("Olmo2ForCausalLM", 4096, 11008, 32, 32, 32, 100352), 7_298_617_344),
    "SmolLM3-3B": (hf("SmolLM3ForCausalLM", 2048, 11008, 36, 16, 4, 128256), 3_075_098_624),
    "GPT-2": ({"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257}, 124_439_808),
}


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_number_of_parameters(name):
    file, expected = WELL_KNOWN[name]
    config = ModelConfig.from_hf(file)
    family = model_class(config.architecture)
    model = family(config)  # abstract: takes no memory
    params = parameters(model)
    assert sum(math.prod(param.shape) for param in params.values()) == expected
    assert model.weight_map().keys() == params.keys()
    for param in params.values():
        assert len(partition_spec(spec_of(param).axes)) == len(param.shape)
    hash(config)  # modules keep it as a static attribute


def test_every_architecture_is_well_known():
    assert {file["architectures"][0] for file, _ in WELL_KNOWN.values()} == set(MODELS)


def test_forms_of_rope_parameters():
    old = ModelConfig.from_hf(LLAMA_3_8B)
    new = {key: value for key, value in LLAMA_3_8B.items() if not key.startswith("rope")}
    new["rope_parameters"] = {**LLAMA_SCALING, "rope_theta": 5e5}
    assert ModelConfig.from_hf(new) == old
    assert old.rope == RopeConfig(128, 5e5, "llama3", factor=8.0, original_max_position=8192)

    old = ModelConfig.from_hf({**GEMMA_3_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    kinds = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    assert ModelConfig.from_hf({**GEMMA_3_1B, "rope_parameters": kinds}) == old
    for local in ({}, {SLIDING: {"rope_type": "default"}}):  # the local base stands beside, or is the family's own
        assert ModelConfig.from_hf({**GEMMA_3_1B, "rope_parameters": {FULL: kinds[FULL]} | local}) == old
    assert old.layer_types[:7] == (*[SLIDING] * 5, FULL, SLIDING)
    full, local = old.layer_rope(5), old.layer_rope(0)
    assert full is not None
    assert local is not None
    assert (full.theta, full.factor, local.theta, local.factor) == (1e6, 8.0, 1e4, 1.0)
    assert (old.window(5), old.window(0)) == (None, 512)


def test_longrope():
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    file = {**PHI_3_MINI, "max_position_embeddings": 131072, "rope_scaling": factors}
    rope = ModelConfig.from_hf(file).rope
    assert rope is not None
    assert (rope.kind, rope.original_max_position) == ("longrope", 4096)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    np.testing.assert_allclose(inverse_frequencies(rope, 4096), 2 * inverse_frequencies(rope, 4097))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures is \['BertModel'\]; supported: .*LlamaForCausalLM"),
        ({"architectures": None}, r"architectures is \[\]; supported"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers is 0; it must be an integer of at least 1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "num_heads is 32; it must be a multiple of num_kv_heads 3"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'; accepted: silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; accepted: default"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 entries; it must have 64"),
        ({"head_dim": 7}, "rotary_dim is 7; it must be even"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA_3_8B, **change})


def test_refused_by_families():
    with pytest.raises(ValueError, match="layer_types has 1 entries for 26 layers"):
        ModelConfig.from_hf({**GEMMA_3_1B, "layer_types": [FULL]})
    with pytest.raises(ValueError, match="layer_types has 'chunked_attention'; accepted"):
        ModelConfig.from_hf({**GEMMA_3_1B, "layer_types": ["chunked_attention"] * 26})
    with pytest.raises(ValueError, match="sliding_window is 0; sliding layers need at least 1"):
        ModelConfig.from_hf({**PHI_3_MINI, "sliding_window": 0})
    with pytest.raises(ValueError, match="scale_attn_weights is False"):
        ModelConfig.from_hf({**WELL_KNOWN["GPT-2"][0], "scale_attn_weights": False})
    with pytest.raises(ValueError, match="architecture is 'Other'; supported: GPT2LMHeadModel"):
        model_class("Other")


def test_identical_layers_are_traced_once(monkeypatch):
    config = ModelConfig.from_hf({**GEMMA_3_1B, "hidden_size": 40, "head_dim": 8, "intermediate_size": 24})
    config = dataclasses.replace(config, vocab_size=50)
    traces = []
    original = attention.Attention.__call__
    monkeypatch.setattr(
        attention.Attention, "__call__", lambda self, *args: (traces.append(self.window), original(self, *args))[1]
    )
    leaves, treedef = jax.tree.flatten(model_class(config.architecture)(config))
    caches = [
        jax.eval_shape(lambda: make_cache(AttentionSpec(config.num_heads, 1, 8, 8, "float32", "float32"), 4))
    ] * config.cache_layout.num_arrays
    numbers = [jnp.zeros(shape, jnp.int32) for shape in ((2,), (3,), (2, 2), (), (), (11,), (11,))]
    step = StepContext((AttentionMetadata(*numbers[:5]),) * len(config.cache_layout.groups))  # pyright: ignore[reportArgumentType]
    outputs = jax.eval_shape(
        lambda leaves, *args: jax.tree.unflatten(treedef, leaves)(*args),
        *(leaves, ModelInputs(*numbers[5:]), caches, step),
    )
    assert outputs.hidden.shape == (11, 40)
    assert traces == [512, None]  # one for each kind of layer, of 26 layers


def test_sharding_tables():
    assert set(RULES) == set(LOGICAL_AXES)
    with pytest.raises(ValueError, match="logical axis 'nothing' has no rule"):
        partition_spec(["nothing"])
    with pytest.raises(ValueError, match="mesh axis model is 0"):
        make_mesh(model=0)
    with pytest.raises(ValueError, match="needs 4096 devices"):
        make_mesh(data=64, model=64)
