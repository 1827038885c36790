"""Loading: files of every float dtype, several shards, dummy weights, meshes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxengine.loading.loader import init_dummy, load_model, named_weights
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.param import spec_of
from jaxengine.models.weights import parameters
from jaxengine.sharding.mesh import make_mesh

DATA = Path(__file__).parent / "data"


class ArrayCheckpoint:
    """A checkpoint in memory."""

    def __init__(self, case: str):
        source = HFCheckpoint(DATA / case)
        self.path, self.config, self.generation_config = source.path, source.config, {}
        self.tensors: dict[str, np.ndarray] = {name: source.get(name) for name in source.tensor_names()}

    def tensor_names(self) -> set[str]:
        return set(self.tensors)

    @property
    def num_elements(self) -> None:
        return None

    def get(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def release(self) -> None:
        pass

    def tokenizer(self) -> Any:
        raise NotImplementedError

    def load(self, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None) -> CausalLM:
        return load_model(self, ModelConfig.from_hf(self.config), dtype, mesh)


def arrays(model: CausalLM) -> dict[str, np.ndarray]:
    return {path: np.asarray(param[...]) for path, param in parameters(model).items()}


def assert_same(first: CausalLM, second: CausalLM) -> None:
    expected = arrays(second)
    assert arrays(first).keys() == expected.keys()
    for path, array in arrays(first).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_fused_and_transposed_weights_are_in_place():
    checkpoint = ArrayCheckpoint("llama3")
    loaded = arrays(checkpoint.load())
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    expected = np.concatenate([checkpoint.tensors[name] for name in names]).astype(np.float32)
    np.testing.assert_array_equal(loaded["layers.1.self_attn.qkv_proj.weight"], expected)
    checkpoint = ArrayCheckpoint("gpt2")
    expected = checkpoint.tensors["transformer.h.0.mlp.c_fc.weight"].T
    np.testing.assert_array_equal(arrays(checkpoint.load())["layers.0.mlp.up_proj.weight"], expected)


@pytest.mark.parametrize("file_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_of_files(file_dtype, tmp_path):
    case = DATA / "qwen2"
    source = HFCheckpoint(case)
    tensors = {name: np.asarray(source.get(name)).astype(file_dtype) for name in source.tensor_names()}
    shutil.copy(case / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = HFCheckpoint(tmp_path)
    config = ModelConfig.from_hf(checkpoint.config)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        loaded = arrays(load_model(checkpoint, config, dtype))
        embedding = loaded["embed_tokens.weight"]
        assert embedding.dtype == dtype
        np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"].astype(dtype))


def test_sharded_files(tmp_path):
    case = DATA / "llama2"
    source = HFCheckpoint(case)
    shutil.copy(case / "config.json", tmp_path)
    names = sorted(source.tensor_names())
    weight_map = {name: f"model-{1 + index % 3:05}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        shard = {name: np.array(source.get(name)) for name in names if weight_map[name] == file}
        save_file(shard, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = ModelConfig.from_hf(source.config)
    assert_same(load_model(HFCheckpoint(tmp_path), config, jnp.float32), load_model(source, config, jnp.float32))


@pytest.mark.parametrize("case", ["gpt2", "llama3"])
def test_checkpoint_of_the_bare_model_has_no_prefix(case):
    expected = ArrayCheckpoint(case).load()
    bare = ArrayCheckpoint(case)
    bare.tensors = {name.split(".", 1)[1]: tensor for name, tensor in bare.tensors.items()}
    assert_same(bare.load(), expected)


def test_tensors_that_nothing_needs_are_ignored():
    checkpoint = ArrayCheckpoint("gpt2")
    checkpoint.tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["transformer.wte.weight"]
    checkpoint.load()


def test_missing_tensor():
    checkpoint = ArrayCheckpoint("llama2")
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing in .*llama2"):
        checkpoint.load()


def test_tensor_of_another_shape():
    checkpoint = ArrayCheckpoint("llama2")
    checkpoint.tensors["model.norm.weight"] = np.ones(31, np.float32)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of .*llama2 has shape \(31,\); .* \(32,\)"):
        checkpoint.load()


def test_swapped_parts_of_a_fused_weight_do_not_pass():
    checkpoint = ArrayCheckpoint("llama3")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    tensors = [checkpoint.tensors[name] for name in names]
    checkpoint.tensors.update(zip(names, reversed(tensors), strict=True))
    with pytest.raises(ValueError, match=r"q_proj\.weight' of .* has shape \(32, 32\)"):
        checkpoint.load()


def test_tensor_that_is_not_part_of_the_model():
    checkpoint = ArrayCheckpoint("llama2")
    checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    with pytest.raises(ValueError, match=r"1 tensors of .* not part of LlamaForCausalLM: .*q_proj\.bias"):
        checkpoint.load()


def test_dummy_weights():
    config = ModelConfig.from_hf(HFCheckpoint(DATA / "gemma3").config)
    first, again, other = (init_dummy(config, jnp.bfloat16, make_mesh(), seed) for seed in (0, 0, 1))
    assert_same(first, again)
    for path, array in arrays(first).items():
        assert array.dtype == jnp.bfloat16
        assert "norm" in path or not np.array_equal(array, arrays(other)[path])


def test_parameters_on_a_mesh():
    mesh = make_mesh()
    checkpoint = ArrayCheckpoint("gpt2")
    model = checkpoint.load(mesh=mesh)
    assert_same(model, checkpoint.load())
    for path, param in parameters(model).items():
        assert param[...].sharding.mesh == mesh, path
        assert len(spec_of(param).axes) == param.ndim, path


@pytest.mark.parametrize("case", ["gpt2", "llama_odd_heads", "llama3", "olmo2", "phi3", "qwen3"])
@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_named_as_they_were(case, size):
    """Transposed, fused, stacked, and as so many devices hold them: with copies and heads of zeros."""
    checkpoint = ArrayCheckpoint(case)
    config = dataclasses.replace(ModelConfig.from_hf(checkpoint.config), tensor_parallel_size=size)
    model = load_model(checkpoint, config, jnp.float32)
    for _ in range(1 + model.config.has_equal_layers):
        found = dict(named_weights(model))
        assert found.keys() == checkpoint.tensors.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, checkpoint.tensors[name], err_msg=name)
        model.stack_layers()
