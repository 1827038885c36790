"""Products of few rows, and the addition and norm of their parts: in the interpreter, with races detected, against
float32; and compiled for a Hopper without one.

Run as a script, this file compiles the cases of `COMPILED` ahead of time, where JAX's CUDA plugin is installed.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.mlp import GatedMLP
from jaxengine.models.layers.norm import PendingResidual, RMSNorm
from jaxengine.pallas_kernels.add_norm import add_norm, reference
from jaxengine.pallas_kernels.add_norm import api as add_norm_api
from jaxengine.pallas_kernels.add_norm import mosaic_gpu as add_norm_kernel
from jaxengine.pallas_kernels.skinny_matmul import config as configs
from jaxengine.pallas_kernels.skinny_matmul import gated_skinny_matmul, has_kernel, mosaic_gpu, skinny_matmul
from jaxengine.pallas_kernels.skinny_matmul.config import Config, candidates, choose_config

BOUNDS = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}  # of relative errors; a constant's is 1
H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
MESH = jax.sharding.AbstractMesh((), (), abstract_device=H100)
# Sizes [N, K] of products, and whether they are gated.
SIZES = [
    *[(6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False)],  # Llama-3.1-8B
    *[(3072, 2048, False), (2048, 2048, False), (16384, 2048, True), (2048, 8192, False)],  # Llama-3.2-1B
    *[(4096, 1024, False), (1024, 2048, False), (6144, 1024, True), (1024, 3072, False)],  # Qwen3-0.6B
    *[(24576, 4096, True), (4096, 12288, False)],  # Qwen3-8B
    *[(10240, 5120, False), (5120, 8192, False), (51200, 5120, True), (5120, 25600, False)],  # Qwen3-32B
    *[(128256, 4096, False), (128256, 2048, False), (151936, 1024, False), (151936, 4096, False)],  # heads
]


def error(got, want) -> float:
    """Relative, of the whole."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def draw(seed: int, *shapes: tuple[int, ...], dtype="bfloat16") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def gate(product: np.ndarray) -> np.ndarray:
    x, y = np.split(product, 2, axis=1)
    return x / (1 + np.exp(-x)) * y


@pytest.fixture
def choose(monkeypatch):
    """Lets the op use a certain way to cut its product."""

    def set_config(config: Config) -> None:
        monkeypatch.setattr("jaxengine.pallas_kernels.skinny_matmul.api.choose_config", lambda *_, **__: config)

    return set_config


# Rows of part of a tile, of a tile and a part, of two; more blocks than a ring holds, and fewer.
@pytest.mark.parametrize(
    ("num_rows", "size_n", "size_k", "config"),
    [(8, 64, 1088, Config(64, 2)), (72, 96, 192, Config(48, 3)), (128, 64, 128, Config(32, 2))],
)
def test_parts_add_up_to_the_product(interpret, choose, num_rows, size_n, size_k, config):
    choose(config)
    x, weight = draw(num_rows, (num_rows, size_k), (size_n, size_k))
    parts = interpret(skinny_matmul, x, weight)
    assert parts.shape == (config.splits, num_rows, size_n)
    assert parts.dtype == jnp.float32
    want = wide(x) @ wide(weight).T
    assert error(parts.sum(0), want) < BOUNDS["float32"]
    assert error(parts[:-1].sum(0), want) > 0.3  # a part that is left out is noticed


@pytest.mark.parametrize(
    ("num_rows", "config", "out_dtype"),
    [(16, Config(48), "float16"), (64, Config(96, 2), "float16"), (64, Config(96), "float32")],
)
def test_products_of_a_dtype(interpret, choose, num_rows, config, out_dtype):
    choose(config)
    x, weight = draw(1, (num_rows, 128), (96, 128), dtype="float16")
    product = interpret(functools.partial(skinny_matmul, out_dtype=out_dtype), x, weight)
    assert product.dtype == out_dtype
    assert error(product, wide(x) @ wide(weight).T) < BOUNDS[out_dtype]


@pytest.mark.parametrize(("num_rows", "config"), [(16, Config(48)), (128, Config(96))])
def test_gated_products(interpret, choose, num_rows, config):
    choose(config)
    x, weight = draw(2, (num_rows, 192), (96, 192))
    weight = weight * 0.1
    got = interpret(gated_skinny_matmul, x, weight)
    assert got.dtype == x.dtype
    product = wide(x) @ wide(weight).T
    assert error(got, gate(product)) < BOUNDS["bfloat16"]
    assert error(got, gate(np.roll(product, 48, axis=1))) > 0.3  # the gate taken for the up


def test_a_mutation_of_the_sums_is_noticed(interpret, choose, monkeypatch):
    """The product of x with itself instead."""
    choose(Config(64))
    x, weight = draw(3, (64, 128), (64, 128))
    original = mosaic_gpu.plgpu.wgmma
    monkeypatch.setattr(mosaic_gpu.plgpu, "wgmma", lambda acc, a, b: original(acc, a, a.transpose((1, 0))))
    got = interpret(skinny_matmul, x, weight)[0]
    assert error(got, wide(x) @ wide(weight).T) > 0.3


def test_what_is_not_a_number_stays_where_it_is(interpret, choose):
    choose(Config(32, 2))
    x, weight = draw(4, (24, 256), (64, 256))
    x = x.at[5, 200].set(jnp.nan)  # in the second part
    weight = weight.at[40, 10].set(jnp.nan)  # in the first
    is_nan = np.isnan(interpret(skinny_matmul, x, weight))
    want = np.zeros((2, 24, 64), bool)
    want[1, 5], want[0, :, 40] = True, True
    np.testing.assert_array_equal(is_nan, want)


# Rows of several warpgroups, of one, and in parts of four numbers.
@pytest.mark.parametrize(
    ("num_rows", "dim", "num_parts", "offset"), [(4, 2048, 4, 0.0), (3, 1024, 1, 1.0), (2, 1536, 2, 1.0)]
)
def test_add_norm(interpret, num_rows, dim, num_parts, offset):
    residual, weight = draw(5, (num_rows, dim), (dim,))
    (parts,) = draw(6, (num_parts, num_rows, dim), dtype="float32")
    kernel, call = (functools.partial(f, eps=0.1, offset=offset) for f in (add_norm_kernel.add_norm, add_norm))
    got_sum, got = interpret(kernel, residual, parts, weight)
    want_sum = wide(residual) + wide(parts).sum(0)
    want = want_sum / np.sqrt((want_sum**2).mean(1, keepdims=True) + 0.1) * (wide(weight) + offset)
    assert (got_sum.dtype, got.dtype) == (residual.dtype,) * 2
    assert error(got_sum, want_sum) < BOUNDS["bfloat16"]
    assert error(got, want) < BOUNDS["bfloat16"]
    plain_sum, plain = reference.add_norm(residual, parts, weight, eps=0.1, offset=offset)
    assert error(plain_sum, want_sum) < BOUNDS["bfloat16"]
    assert error(plain, want) < BOUNDS["bfloat16"]
    assert error(call(residual, parts, weight)[1], plain) < 1e-6  # on a CPU that is the reference
    if num_parts == 1:
        narrow = parts[0].astype(residual.dtype)
        assert error(interpret(kernel, residual, narrow[None], weight)[1], want) < 2 * BOUNDS["bfloat16"]


def test_a_norm_of_part_of_a_row_is_noticed(interpret, monkeypatch):
    residual, weight = draw(7, (2, 2048), (2048,))
    residual = residual * jnp.where(jnp.arange(2048) < 1024, 1, 4).astype(residual.dtype)
    want = add_norm(residual, residual, weight, eps=0.1)[1]
    kernel = functools.partial(add_norm_kernel.add_norm, eps=0.1, offset=0.0)
    original = jnp.sum
    monkeypatch.setattr(add_norm_kernel.jnp, "sum", lambda x: original(x) * (jax.lax.axis_index("wg") > 0))
    assert error(interpret(kernel, residual, residual[None], weight)[1], want) > 0.02


def test_what_has_a_kernel():
    shapes = (64, 4096), (6144, 4096)
    assert not has_kernel(*shapes, "bfloat16")  # a CPU
    with jax.sharding.use_abstract_mesh(MESH):
        assert has_kernel(*shapes, "bfloat16")
        assert has_kernel(*shapes, "float16", gated=True)
        assert not has_kernel(*shapes, "float32")
        assert not any(has_kernel((rows, 4096), shapes[1], "bfloat16") for rows in (1, 4, 12, 264))
        assert not has_kernel((64, 4000), (6144, 4000), "bfloat16")
        assert not has_kernel((64, 4096), (100, 4096), "bfloat16")
        # Small weights are left to XLA where few rows leave the host as what a step waits for.
        small = [has_kernel((rows, 1024), (6144, 1024), "bfloat16", gated=True) for rows in (32, 48, 64, 128)]
        assert small == [False, False, True, True]
        assert not has_kernel((2, 64, 4096), shapes[1], "bfloat16")
    for device, has in (
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
    ):
        device = dataclasses.replace(H100, device_kind=device)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            assert has_kernel(*shapes, "bfloat16") == has
    for size, kind, has in ((1, "Auto", True), (2, "Auto", False), (2, "Manual", True)):
        kinds = (getattr(jax.sharding.AxisType, kind),)
        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((size,), ("model",), kinds, abstract_device=H100)
        ):
            assert has_kernel(*shapes, "bfloat16") == has


@pytest.mark.parametrize(("size_n", "size_k", "gated"), SIZES)
def test_products_of_models_are_cut(size_n, size_k, gated):
    with jax.sharding.use_abstract_mesh(MESH):
        for num_rows in (8, 16, 32, 48, *range(64, 257, 16)):
            config = choose_config(num_rows, size_n, size_k, gated=gated)
            if config is None:  # XLA's product was measured to be faster
                assert num_rows > 128 or (size_n, size_k, num_rows) == (3072, 2048, 16)
                continue
            assert config.is_possible(num_rows, size_n, size_k, gated=gated)
            # Most multiprocessors read.
            assert size_n // config.tile_n * config.splits >= 64


def test_tuning_files_replace_the_heuristic(monkeypatch):
    want = Config(48, 2, 2)
    tuning = {"configs": {"6144x4096": {"64": dataclasses.asdict(want), "80": None}}}
    monkeypatch.setattr(configs, "_tuning", lambda kind: tuning if "H100" in kind else {})
    configs._choose_config.cache_clear()
    try:
        with jax.sharding.use_abstract_mesh(MESH):
            assert choose_config(64, 6144, 4096, gated=False) == want
            assert choose_config(32, 6144, 4096, gated=False) == want  # nearest above
            assert choose_config(80, 6144, 4096, gated=False) is None  # XLA's is faster
            assert choose_config(128, 6144, 4096, gated=False) == candidates(128, 6144, 4096, 132, gated=False)[0]
    finally:
        configs._choose_config.cache_clear()


def test_layers_use_the_kernels(interpret, monkeypatch):
    """A gated MLP between two norms: as in plain JAX, with kernels on a Hopper and none elsewhere."""
    monkeypatch.setattr("jaxengine.pallas_kernels.skinny_matmul.api.MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr(add_norm_api, "MIN_COLUMNS", 0)
    config = ModelConfig.from_hf(
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
    )
    build = LayerBuilder(jnp.bfloat16, nnx.Rngs(0))
    mlp, norm = GatedMLP(config, build), RMSNorm(512, build, eps=1e-5)
    graphdef, state = nnx.split((mlp, norm))
    x, attended = draw(9, (16, 512), (16, 512))

    def run(state, x, attended):
        mlp, norm = nnx.merge(graphdef, state)
        x, normed = norm.add_and_norm(PendingResidual(x, attended))
        return norm.add_and_norm(PendingResidual(x, mlp(normed, allow_partial=True)))

    def num_kernels() -> int:
        return str(jax.make_jaxpr(run)(state, x, attended)).count("mpmd_map[")

    assert num_kernels() == 0
    with jax.sharding.use_abstract_mesh(MESH):
        assert num_kernels() == 4  # add_norm, gated product, product, add_norm
    plain, kernels = run(state, x, attended), interpret(run, state, x, attended)
    for got, want in zip(kernels, plain, strict=True):
        assert error(got, want) < BOUNDS["bfloat16"]


def test_bad_shapes_are_refused():
    (x, weight) = draw(8, (8, 128), (64, 128))
    with pytest.raises(ValueError, match="of one dtype"):
        skinny_matmul(x, weight.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"expected x\[T, K\]"):
        gated_skinny_matmul(x[:, :64], weight)
    with pytest.raises(ValueError, match="no way to cut"):
        skinny_matmul(x, weight[:50])
    with pytest.raises(ValueError, match=r"expected residual\[T, D\]"):
        add_norm(x, x[:, :64], weight[0], eps=1e-5)


# Rows, sizes, gated: each with another number of warpgroups, or another way to store.
COMPILED = [
    *[(8, 6144, 4096, False), (64, 4096, 14336, False), (80, 28672, 4096, True), (128, 16384, 2048, True)],
    *[(192, 2048, 8192, False), (256, 28672, 4096, True), (256, 128256, 4096, False)],
]


def main() -> None:
    """Compiles for an H100; prints a line of JSON for each case."""
    sys.path[:0] = [os.path.dirname(__file__)]
    from jax.experimental import topologies
    from test_mosaic_gpu import TARGET  # ty: ignore

    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=TARGET)
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(topology.devices), ("x",)), jax.P())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    with jax.sharding.use_abstract_mesh(MESH):
        for num_rows, size_n, size_k, gated in COMPILED:
            function = gated_skinny_matmul if gated else skinny_matmul
            args = [shape(s, jnp.bfloat16) for s in ((num_rows, size_k), (size_n, size_k))]
            text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()
            case = [num_rows, size_n, size_k, gated]
            print(json.dumps({"case": case, "calls": (text or "").count("custom-call(")}), flush=True)
        for num_parts, dim in ((4, 4096), (1, 2048), (3, 2560), (2, 8192)):
            args = shape((64, dim), jnp.bfloat16), shape((num_parts, 64, dim), jnp.float32), shape((dim,), jnp.bfloat16)
            call = functools.partial(add_norm, eps=1e-5)
            text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()
            case = [num_parts, dim]
            print(json.dumps({"case": case, "calls": (text or "").count("custom-call(")}), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin[with-cuda] (no GPU)"
)
def test_compiles_for_a_gpu():
    settings = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(COMPILED) + 4
    assert all(row["calls"] == 1 for row in rows), rows  # the kernel, and nothing beside it


if __name__ == "__main__":
    main()
