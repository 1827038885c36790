"""Sums over devices: plain JAX on CPU devices, what is chosen where, and the GPU kernel compiled without a GPU.

No interpreter runs the kernel: Mosaic GPU's knows neither peers' memory nor semaphores. Run as a script, this file
checks sums on virtual CPU devices, which must be asked for before JAX starts, or compiles the kernel (see `main`).
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.engine_args import EngineArgs
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.norm import RMSNorm
from jaxengine.models.step import StepContext
from jaxengine.pallas_kernels import all_reduce as op
from jaxengine.pallas_kernels.all_reduce import api, mosaic_gpu
from jaxengine.sharding import axes
from jaxengine.sharding.mesh import MODEL, make_mesh


def on_devices(function, *args, size: int):
    """Runs `function` of each device's part of the arguments, and returns what each device made."""
    with jax.set_mesh(make_mesh(model=size)):
        run = jax.shard_map(
            lambda *args: jax.tree.map(lambda out: out[None], function(*(arg[0] for arg in args))),
            in_specs=jax.P(MODEL),
            out_specs=jax.P(MODEL),
            check_vma=False,
        )
        return jax.jit(run)(*args)


def check_residual_and_norm(size: int, unit_offset: bool) -> None:
    """They are those of the models, and all devices have the same bits."""
    rng = np.random.default_rng(size)
    parts, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((size, 3, 256), (256,)))
    residual = jnp.broadcast_to(jnp.asarray(rng.normal(size=(3, 256)), jnp.bfloat16), parts.shape)
    norm = RMSNorm(256, LayerBuilder(jnp.bfloat16, nnx.Rngs(0)), eps=1e-5, unit_offset=unit_offset)
    norm.weight[...] = weight

    def reduce(part, residual):
        options = {"norm_weight": weight, "norm_eps": norm.eps, "norm_offset": norm.offset}
        return op.all_reduce(part, MODEL, residual=residual, **options)

    got, normed = on_devices(reduce, parts, residual, size=size)
    want = np.asarray(parts, np.float64).sum(0) + np.asarray(residual[0], np.float64)
    # Every sum of two is rounded to 8 bits.
    bound = 2.0**-8 * (size * np.abs(np.asarray(parts, np.float64)).sum(0) + np.abs(want))
    for device in range(size):
        assert (np.abs(np.asarray(got[device], np.float64) - want) <= bound).all()
        np.testing.assert_array_equal(np.asarray(got[device]), np.asarray(got[0]))
        want_normed = np.asarray(norm(got[device]), np.float32)
        np.testing.assert_allclose(np.asarray(normed[device], np.float32), want_normed, rtol=2**-7)


def check_sum_alone() -> None:
    parts = jnp.arange(2 * 4 * 8, dtype=jnp.float32).reshape(2, 4, 8)
    got = on_devices(lambda part: op.all_reduce(part, MODEL), parts, size=2)
    np.testing.assert_array_equal(got, np.broadcast_to(np.asarray(parts).sum(0), parts.shape))


def check_plain_sum_where_there_is_no_kernel() -> None:
    parts = jnp.ones((2, 4, 100), jnp.bfloat16)  # 100 columns
    got = on_devices(lambda part: op.all_reduce(part, MODEL, implementation="mosaic_gpu"), parts, size=2)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.full((2, 4, 100), 2, np.float32))


def check_linear(bias: bool) -> None:
    """A layer whose input the devices share gives the same with a workspace, and changes nothing else of it."""
    linear = Linear(64, 24, (axes.EMBED, axes.MLP), LayerBuilder(jnp.float32, nnx.Rngs(0)), bias=bias)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    mesh = make_mesh(model=2)
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(None, MODEL))
        workspace = dataclasses.replace(op.make_workspace(2, 256, "float32", place), implementation="reference")

        @jax.jit
        def apply(x, workspace):
            refs = jax.tree.map(jax.new_ref, workspace)
            return linear(x, StepContext(workspace=refs)), jax.tree.map(jax.freeze, refs)

        compiled = apply.lower(jax.device_put(x, place), workspace).compile()
        text = compiled.as_text()
        assert text is not None
        assert len(re.findall(r" all-reduce\(", text)) == 1
        assert "all-gather" not in text
        out, after = compiled(jax.device_put(x, place), workspace)
    np.testing.assert_allclose(out, linear(x), rtol=1e-5, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, workspace))


def run(*arguments: str) -> list[dict[str, Any]]:
    """Runs this file as a script; returns the lines of JSON that it prints."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_sums_on_cpu_devices():
    assert run("cpu") == [{"checked": 8}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": jnp.zeros((2, 3, 8))}, r"expected x\[T, D\]"),
        ({"residual": jnp.zeros((4, 9))}, r"residual is float32\(4, 9\)"),
        ({"residual": jnp.zeros((4, 8), "bfloat16")}, "residual is bfloat16"),
        ({"norm_weight": jnp.zeros(4)}, r"norm_weight\(4,\)"),
        ({"implementation": "nccl"}, "implementation='nccl': expected one of reference, mosaic_gpu"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"x": jnp.zeros((4, 8))} | change
    with pytest.raises(ValueError, match=named):
        op.all_reduce(arguments.pop("x"), MODEL, **arguments)


@pytest.mark.parametrize(
    ("num_tokens", "dim", "whole_rows", "width"),
    [
        (1, 4096, False, 1024),  # few tokens: several blocks share a row
        (64, 4096, False, 1024),
        (256, 4096, False, 4096),
        (256, 4096, True, 4096),
        (16, 896, False, 896),
        (1, 576, False, None),  # threads cannot share it evenly
        (265, 4096, False, None),  # more blocks than are resident
        (4, 16384, True, None),  # more than a block's registers hold
        (4, 16384, False, 1024),
    ],
)
def test_blocks(num_tokens, dim, whole_rows, width):
    assert mosaic_gpu.block_width(num_tokens, dim, whole_rows=whole_rows) == width


@pytest.mark.parametrize("dim", range(128, 16385, 128))
def test_blocks_are_resident_and_cover_rows(dim):
    for num_tokens in (1, 2, 17, 64, 200, 264):
        for whole_rows in (False, True):
            width = mosaic_gpu.block_width(num_tokens, dim, whole_rows=whole_rows)
            if width is not None:
                assert dim % width == 0
                assert width % 128 == 0
                assert num_tokens * dim // width <= 264
                assert width <= 8192


@dataclasses.dataclass
class Device:
    id: int
    platform: str = "gpu"
    process_index: int = 0
    compute_capability: str = "9.0"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([Device(0), Device(1)], None),
        ([Device(1), Device(0)], r"devices \[1, 0\] are not the first ones"),
        ([Device(0), Device(1, process_index=1)], "several processes"),
        ([Device(0, compute_capability="8.0"), Device(1)], "older than Hopper"),
        ([Device(i) for i in range(9)], "9 devices"),
        ([Device(0), Device(1), Device(2)], "GPU 0 does not reach the memory of GPU 2"),
    ],
)
def test_what_is_chosen_for_gpus(devices, reason, monkeypatch, caplog):
    api._warn_once.cache_clear()
    monkeypatch.setattr(api, "_reaches", lambda device, peer: 2 not in (device.id, peer.id))
    assert op.choose_implementation(devices) == ("mosaic_gpu" if reason is None else "reference")
    op.choose_implementation(devices)
    assert len(caplog.records) == (reason is not None)  # once
    assert reason is None or re.search(reason, caplog.text)


def test_nothing_is_said_where_there_is_no_choice(caplog):
    assert op.choose_implementation([Device(0)]) == "reference"
    assert op.choose_implementation([Device(0, "cpu"), Device(1, "cpu")]) == "reference"
    assert op.choose_implementation([Device(0, "tpu"), Device(1, "tpu")]) == "reference"
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "platform", "backend"),
    [
        ({}, "gpu", "mosaic_gpu"),
        ({"disable_custom_all_reduce": True}, "gpu", "reference"),
        ({}, "tpu", "reference"),
        ({"tensor_parallel_size": 1}, "gpu", "reference"),
        ({"data_parallel_size": 2}, "gpu", "reference"),
        ({"data_parallel_size": 2}, "cpu", "reference"),
    ],
)
def test_what_a_planned_engine_uses(options, platform, backend, caplog):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    args = EngineArgs(**{"tensor_parallel_size": 2, "num_gpu_blocks_override": 64} | options)
    resolved = args.resolve(SimpleNamespace(config=config, path="here", num_elements=None), platform)  # pyright: ignore[reportArgumentType]
    assert resolved.all_reduce_backend == backend
    is_told = platform == "gpu" and "data_parallel_size" in options
    assert ("data_parallel_size=2: sums over devices" in caplog.text) == is_told


def test_what_has_a_kernel():
    def has(num_tokens=16, dim=4096, dtype="bfloat16", num_devices=2, has_norm=False) -> bool:
        return api.has_kernel(jax.ShapeDtypeStruct((num_tokens, dim), dtype), num_devices, has_norm)

    assert has()
    assert has(num_tokens=256)
    assert has(has_norm=True)
    assert not has(num_tokens=512)
    assert not has(num_devices=1)
    assert not has(dtype="float32")
    assert not has(dim=4097)
    assert not has(dim=16384, has_norm=True)


SHAPES = ((1, 4096), (16, 4096), (64, 896), (256, 4096), (8, 8192))


def compile_sums(num_tokens: int, dim: int, *, is_fused: bool, is_kept: bool) -> dict[str, Any]:
    """Compiles two sums, one after the other, for two H100s."""
    from jaxengine.plan.targets import open_target

    devices, _ = open_target("h100:2")

    def local(x, residual, weight, workspace):
        for _ in range(2):
            norm = {"norm_weight": weight, "norm_eps": 1e-5} if is_fused else {}
            options = {"residual": residual, "workspace": workspace, "implementation": "mosaic_gpu"}
            out = op.all_reduce(x, MODEL, **options, **norm)
            residual, x = out if is_fused else (out, out)
        return residual, x

    def step(x, residual, weight, workspace):
        refs = jax.tree.map(jax.new_ref, workspace)
        specs = *[jax.P()] * 3, jax.P(None, MODEL)
        outs = jax.shard_map(local, in_specs=specs, out_specs=jax.P(), check_vma=False)(x, residual, weight, refs)
        return outs, jax.tree.map(jax.freeze, refs)

    mesh = make_mesh(model=2, devices=devices)
    with jax.set_mesh(mesh):
        place, shared = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P(None, MODEL)))
        workspace = None
        if is_kept:
            workspace = jax.eval_shape(lambda: op.make_workspace(2, dim, "bfloat16", shared))
            workspace = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared), workspace)
        x, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in ((num_tokens, dim), (dim,)))
        traced = jax.jit(step, donate_argnums=3).trace(x, x, weight, workspace)
        lowered = traced.lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    executable = lowered.compile()
    compiled, memory = executable.as_text(), executable.memory_analysis()
    assert compiled is not None
    assert memory is not None
    kept_bytes = sum(int(np.prod(x.shape)) * x.dtype.itemsize // 2 for x in jax.tree.leaves(workspace))
    return {
        "kept_in_place": memory.alias_size_in_bytes >= kept_bytes,
        "waits_for_barrier": "skip_device_barrier = false" in text,
        "devices": sorted(set(re.findall(r'xla_replica_ids = "([^"]*)"', text))),
        "uses_multicast": "symmetric_memory_parameters" in text,
        "kernels": len(re.findall(r'custom_call_target="mosaic_gpu_v2"', compiled)),
        "collectives": len(re.findall(r" all-reduce\(", compiled)),
    }


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin[with-cuda] (no GPU)"
)
def test_compiles_for_two_gpus():
    rows = run("aot")
    assert len(rows) == 4 * len(SHAPES)
    for row in rows:
        is_kept = row.pop("is_kept")
        expected = {"devices": ["0,1"], "uses_multicast": False, "kernels": 2, "collectives": 0}
        assert row == expected | {"kept_in_place": True, "waits_for_barrier": not is_kept}


def main(what: str) -> None:
    if what == "aot":
        for num_tokens, dim in SHAPES:
            for is_fused, is_kept in itertools.product((False, True), repeat=2):
                row = compile_sums(num_tokens, dim, is_fused=is_fused, is_kept=is_kept)
                print(json.dumps(row | {"is_kept": is_kept}), flush=True)
        return
    checks = [functools.partial(check_residual_and_norm, size, offset) for size in (2, 4) for offset in (False, True)]
    checks += [check_sum_alone, check_plain_sum_where_there_is_no_kernel]
    checks += [functools.partial(check_linear, bias) for bias in (False, True)]
    for check in checks:
        check()
    print(json.dumps({"checked": len(checks)}))


if __name__ == "__main__":
    main(sys.argv[1])
