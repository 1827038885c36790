"""A format of several arrays, as a quantised one is: loaded, sharded, stacked and multiplied like the one there is.

Run as a script, this file checks parameters over four virtual CPU devices, which must be asked for before JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxengine.loading.checkpoint import Tensor
from jaxengine.loading.loader import load_model
from jaxengine.loading.parameters import read_parameter
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.dense import Dense
from jaxengine.models.layers.matrix import Formats, LayerBuilder, WeightFormat, matrix_parameters
from jaxengine.models.layers.param import ParameterSpec, make_parameter, spec_of
from jaxengine.models.training import token_log_probs
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.runner.placement import Placement
from jaxengine.runner.steps import FlatModel
from jaxengine.sharding import axes
from jaxengine.sharding.layout import ZEROS, Part
from jaxengine.sharding.mesh import make_mesh
from jaxengine.sharding.rules import named_sharding
from tests.models.test_loader import ArrayCheckpoint

TOKENS = jnp.arange(3, 15)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """Integers, and a scale for each row."""

    weight: jax.Array  # i8[out, in]
    scales: jax.Array  # f32[out, 1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def multiply(self, x: jax.Array, out_dtype: Any = None, *, allow_kernel: bool = False) -> jax.Array:
        product = lax.dot_general(x, self.weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
        return (product * self.scales[:, 0]).astype(out_dtype or x.dtype)

    def multiply_in_parts(self, x: jax.Array) -> None:
        return None

    def multiply_gated(self, x: jax.Array) -> None:
        return None

    def take(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.weight, ids, axis=0, mode="clip") * jnp.take(self.scales, ids, axis=0, mode="clip")


def scales_of(weight: Tensor) -> np.ndarray:
    return np.abs(np.asarray(weight, np.float32)).max(axis=1, keepdims=True) / 127


def quantise(weight: Tensor) -> np.ndarray:
    return np.round(np.asarray(weight, np.float32) / scales_of(weight)).astype(np.int8)


def as_column(scales: Tensor) -> np.ndarray:
    return np.asarray(scales)[:, None]


@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Made while loading, or as a checkpoint has it."""

    is_stored: bool

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParameterSpec]:
        stored: dict[str, Any] = {"tensors": ("weight_scale",), "decode": as_column}
        made: dict[str, Any] = {"tensors": ("weight",), "decode": scales_of}
        scales = ParameterSpec((shape[0], 1), "float32", (axes[0], None), "ones", block=(1, shape[1]))
        return {
            "weight": ParameterSpec(shape, "int8", axes, decode=None if self.is_stored else quantise),
            "scales": dataclasses.replace(scales, **(stored if self.is_stored else made)),
        }

    def matrix(self, arrays: dict[str, Any]) -> ScaledMatrix:
        return ScaledMatrix(**arrays)


def choose(is_stored: bool, excluded: tuple[str, ...]) -> Formats:
    """The format of all layers but some, and the embedding."""

    def format_of(path: str, parts: tuple[Part, ...]) -> WeightFormat:
        return Dense("float32") if path.endswith(excluded) else Int8Rows(is_stored)

    return format_of


def checkpoints(case: str, excluded: tuple[str, ...]) -> tuple[ArrayCheckpoint, ArrayCheckpoint, ArrayCheckpoint]:
    """A checkpoint, the same one with integers and scales, and with what these stand for."""
    plain, stored, meant = (ArrayCheckpoint(case) for _ in range(3))
    for name, tensor in plain.tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and not layer.endswith(excluded):
            stored.tensors[name] = quantise(tensor)
            stored.tensors[f"{layer}.weight_scale"] = scales_of(tensor)[:, 0]
            meant.tensors[name] = quantise(tensor) * scales_of(tensor)
    return plain, stored, meant


def load(checkpoint: ArrayCheckpoint, formats: Formats | None = None, mesh: Any = None, dtype: Any = "float32") -> Any:
    config = ModelConfig.from_hf(checkpoint.config)
    config = dataclasses.replace(config, tensor_parallel_size=1 if mesh is None else mesh.shape["model"])
    return load_model(checkpoint, config, dtype, mesh, formats=formats)


def log_probs(model: CausalLM) -> np.ndarray:
    return np.asarray(nnx.jit(token_log_probs)(model, TOKENS))


EXCLUDED = ("embed_tokens", "lm_head", "layers.1.mlp.down_proj")


def test_made_while_loading_or_stored_it_multiplies_alike():
    plain, stored, meant = checkpoints("llama3", EXCLUDED)
    want = log_probs(load(meant))
    for checkpoint, is_stored in ((plain, False), (stored, True)):
        got = log_probs(load(checkpoint, choose(is_stored, EXCLUDED)))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(log_probs(load(plain)) - want).max() > 1e-4


def test_the_format_decides_each_arrays_dtype_and_place():
    plain, _, _ = checkpoints("llama3", EXCLUDED)
    model = load(plain, choose(False, EXCLUDED), dtype="bfloat16")
    params = parameters(model)
    found = {path: param.dtype.name for path, param in params.items()}
    assert found["layers.0.self_attn.qkv_proj.weight"] == "int8"
    assert found["layers.0.self_attn.qkv_proj.scales"] == "float32"
    assert found["layers.0.input_layernorm.weight"] == "bfloat16"
    assert found["layers.1.mlp.down_proj.weight"] == "float32"
    assert "layers.1.mlp.down_proj.scales" not in found
    flat = FlatModel(model)
    places = Placement(make_mesh()).parameters(flat.state)
    assert len(places) == len(flat.leaves) == len(params)


def test_layers_of_one_format_are_stacked_and_others_are_not():
    excluded = ("embed_tokens", "lm_head")
    plain, _, _ = checkpoints("llama3", excluded)
    model = load(plain, choose(False, excluded))
    want = log_probs(model)
    assert model.stack_layers()
    np.testing.assert_allclose(log_probs(model), want, rtol=0, atol=1e-5)
    mixed = load(plain, choose(False, EXCLUDED))
    want = log_probs(mixed)
    assert not mixed.stack_layers()
    np.testing.assert_array_equal(log_probs(mixed), want)


def test_a_tensor_that_a_format_does_not_read_is_an_error():
    _, stored, _ = checkpoints("llama3", EXCLUDED)
    with pytest.raises(ValueError, match=r"tensors of .* are not part of LlamaForCausalLM: .*weight_scale"):
        load(stored, choose(False, EXCLUDED))
    stored.tensors = {n: tensor for n, tensor in stored.tensors.items() if not n.endswith("_scale")}
    with pytest.raises(ValueError, match=r"_proj\.weight' of .* has dtype int8; layers.* holds float32"):
        load(stored)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One scale for a square of numbers."""

    block: int

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParameterSpec]:
        scaled = (*shape[:-2], *(-(-size // self.block) for size in shape[-2:]))
        block = (1,) * (len(shape) - 2) + (self.block,) * 2
        return {
            "weight": ParameterSpec(shape, "int8", axes),
            "scales": ParameterSpec(scaled, "float32", axes, block=block),
        }

    def matrix(self, arrays: dict[str, Any]) -> Any:
        raise NotImplementedError


def specs_of_blocks(block: int, num_devices: int, rows: tuple[Part, ...]) -> dict[str, ParameterSpec]:
    build = LayerBuilder("float32", num_devices=num_devices, path="layers.0.mlp.gate_up_proj")
    return matrix_parameters(Blocks(block), rows, (Part("", 64),), (axes.MLP, axes.EMBED), build)


def test_scales_of_blocks_lie_as_the_blocks_do():
    parts = Part("gate_proj", 32), Part("up_proj", 32)
    specs = specs_of_blocks(8, 2, parts)
    assert specs["weight"].runs == (((0, 16), (32, 16), (16, 16), (48, 16)), ())
    assert specs["scales"].runs == (((0, 2), (4, 2), (2, 2), (6, 2)), ())
    assert specs["scales"].part_shapes() == [(4, 8), (4, 8)]
    heads = (Part("q_proj", 32, 8, (0, 1, 2, 3, ZEROS, ZEROS)), Part("k_proj", 16, 8, (0, 0, 1, 1)))
    assert specs_of_blocks(4, 2, heads)["scales"].runs == (
        ((0, 6), (8, 2), (8, 2), (6, 2), (-1, 4), (10, 2), (10, 2)),
        (),
    )
    assert specs_of_blocks(48, 1, (Part("down_proj", 100),))["scales"].shape == (3, 2)  # the last block is cut short


@pytest.mark.parametrize(("block", "num_devices"), [(32, 2), (12, 1), (64, 1)])
def test_devices_and_parts_do_not_share_a_block(block, num_devices):
    with pytest.raises(
        ValueError, match=rf"gate_up_proj\.scales: gate_proj is cut every .*, but {block} numbers share"
    ):
        specs_of_blocks(block, num_devices, (Part("gate_proj", 32), Part("up_proj", 32)))


class Recorded:
    """A stored tensor that notes the parts of it that are read."""

    def __init__(self, name: str, values: np.ndarray, reads: list[tuple[str, int]]):
        self.name, self.values, self.reads = name, values, reads

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> Recorded:
        return Recorded(self.name, self.values.T, self.reads)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Recorded:
        return Recorded(self.name, self.values[index], self.reads)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise AssertionError("all of a tensor is read")

    def read_into(self, out: np.ndarray) -> None:
        self.reads.append((self.name, self.values.size))
        out[...] = self.values


EXPERTS, DIM, FFN = 4, 6, 8


def expert_parameter(rows: tuple[Part, ...], columns: int, logical: tuple[str, ...], size: int) -> nnx.Param:
    build = LayerBuilder("float32", num_devices=size)
    specs = matrix_parameters(Dense("float32"), rows, (Part("", columns),), logical, build, leading=(EXPERTS,))
    return make_parameter(specs["weight"], None)


@pytest.mark.parametrize("transpose", [False, True])
def test_experts_are_stacked(transpose):
    """On one device; over the devices of both axes in a process that has them."""
    check_experts(make_mesh(), transpose=transpose)


def check_experts(mesh: Any, *, transpose: bool = False) -> None:
    """Of each expert gate and up fused, and down: each device reads its rows, or columns, of its experts alone."""
    rng, reads = np.random.default_rng(0), []
    size, num_devices = mesh.shape["model"], mesh.shape["model"] * mesh.shape["expert"]
    tensors = {
        f"experts.{i}.{part}": rng.normal(size=(DIM, FFN) if part == "down" else (FFN, DIM)).astype(np.float32)
        for i in range(EXPERTS)
        for part in ("gate", "up", "down")
    }

    def get(name: str) -> Recorded:
        values = tensors[name]
        return Recorded(name, values.T.copy() if transpose else values, reads)

    def read(param: nnx.Param, *parts: str) -> np.ndarray:
        names = tuple(f"experts.{i}.{part}" for i in range(EXPERTS) for part in parts)
        place = named_sharding(mesh, spec_of(param).axes, param.shape)
        found = read_parameter(param, WeightSpec(names, transpose=transpose, stack=True), get, place)
        assert {math.prod(shard.data.shape) for shard in found.addressable_shards} == {found.size // num_devices}
        assert sum(count for _, count in reads) == found.size  # every number once
        reads.clear()
        return np.asarray(found)

    fused = read(
        expert_parameter((Part("gate", FFN), Part("up", FFN)), DIM, (axes.EXPERT, axes.MLP, axes.EMBED), size),
        "gate",
        "up",
    )
    share = FFN // size
    for i in range(EXPERTS):
        gate, up = tensors[f"experts.{i}.gate"], tensors[f"experts.{i}.up"]
        want = [part[d * share : (d + 1) * share] for d in range(size) for part in (gate, up)]
        np.testing.assert_array_equal(fused[i], np.concatenate(want))
    down = read(expert_parameter((Part("", DIM),), FFN, (axes.EXPERT, axes.EMBED, axes.MLP), size), "down")
    np.testing.assert_array_equal(down, np.stack([tensors[f"experts.{i}.down"] for i in range(EXPERTS)]))


def test_experts_that_are_stored_as_one_tensor():
    stored = np.random.default_rng(0).normal(size=(EXPERTS, 2 * FFN, DIM)).astype(np.float32)
    param = expert_parameter((Part("gate", FFN), Part("up", FFN)), DIM, (axes.EXPERT, axes.MLP, axes.EMBED), 1)
    found = read_parameter(param, WeightSpec(("experts",)), lambda name: stored, None)
    np.testing.assert_array_equal(found, stored)
    swapped = np.swapaxes(stored, 1, 2)
    found = read_parameter(param, WeightSpec(("experts",), transpose=True), lambda name: swapped, None)
    np.testing.assert_array_equal(found, stored)
    # Gate and up row by row in turns, as gpt-oss has them.
    turns = np.stack([stored[:, :FFN], stored[:, FFN:]], axis=2).reshape(EXPERTS, -1, DIM)

    def untangle(tensor: np.ndarray) -> np.ndarray:
        return np.concatenate([tensor[:, ::2], tensor[:, 1::2]], axis=1)

    found = read_parameter(param, WeightSpec(("experts",), decode=untangle), lambda name: turns, None)
    np.testing.assert_array_equal(found, stored)


def test_tensors_that_do_not_fit_are_refused():
    param = expert_parameter((Part("gate", FFN), Part("up", FFN)), DIM, (axes.EXPERT, axes.MLP, axes.EMBED), 1)
    names = tuple(f"experts.{i}.{part}" for i in range(EXPERTS) for part in ("gate", "up"))
    right = np.zeros((FFN, DIM), np.float32)
    with pytest.raises(ValueError, match=r"'experts\.2\.up' of .* has shape \(7, 6\); .* wants \(8, 6\)"):
        read_parameter(
            param, WeightSpec(names, stack=True), lambda n: right[1:] if n == "experts.2.up" else right, None
        )
    with pytest.raises(ValueError, match="is made of 8 tensors, not 7"):
        read_parameter(param, WeightSpec(names[:-1], stack=True), lambda n: right, None)
    with pytest.raises(ValueError, match=r"'experts\.0\.gate' of .* has dtype complex64; a parameter holds float32"):
        read_parameter(param, WeightSpec(names, stack=True), lambda n: right.astype(np.complex64), None)


def test_over_several_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"checked": 5}


def main() -> None:
    check_experts(make_mesh(model=2, expert=2))
    check_experts(make_mesh(model=4), transpose=True)
    check_experts(make_mesh(expert=4))
    # Keys held by both devices, and heads of zeros: of the matrix and its scales alike.
    for case in ("llama3", "llama_odd_heads"):
        plain, _, _ = checkpoints(case, EXCLUDED)
        want = log_probs(load(plain, choose(False, EXCLUDED)))
        mesh = make_mesh(model=2)
        model = load(plain, choose(False, EXCLUDED), mesh)
        layer = model.layers[0].self_attn.qkv_proj
        for array in (layer.weight[...], layer.scales[...]):
            assert {shard.data.shape[0] for shard in array.addressable_shards} == {array.shape[0] // 2}
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(log_probs(model), want, rtol=0, atol=1e-4)  # sums in another order
    print(json.dumps({"checked": 5}))


if __name__ == "__main__":
    main()
