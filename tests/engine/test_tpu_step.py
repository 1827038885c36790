"""A whole step of the engine, compiled for a TPU that is not there.

Run as a script, this file compiles (see `main`): libtpu reads its settings before jax starts.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxengine.kv_cache import PageGroup
from jaxengine.loading.shapes import model_configs
from jaxengine.models.abstract import abstract_model
from jaxengine.models.config import ModelConfig
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionSpec, cache_shapes
from jaxengine.runner.buckets import Bucket
from jaxengine.runner.input_batch import PackedLayout
from jaxengine.runner.page_tables import PageTables
from jaxengine.runner.steps import FlatModel, StepCaches, make_forward

CONFIG = model_configs()["llama-3.2-1b"]
BUCKETS = (Bucket(16, 16, decode_only=True), Bucket(256, 16))  # decodes; and with chunks of prompts
PAGE_SIZE, NUM_PAGES, TABLE_WIDTH = 16, 4096, 128


def compile_step(bucket: Bucket, topology: str) -> dict[str, Any]:
    """Compiles a step of a Llama 3.2 1B with two of its layers; returns what the compiler says of memory."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    config = ModelConfig.from_hf(json.loads(CONFIG.read_text()) | {"num_hidden_layers": 2})
    config = dataclasses.replace(config, max_model_len=TABLE_WIDTH * PAGE_SIZE)
    flat = FlatModel(abstract_model(config, "bfloat16"))
    layout = PackedLayout(bucket, PageTables([PageGroup(PAGE_SIZE)], TABLE_WIDTH * PAGE_SIZE), "mosaic_tpu")
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE, "bfloat16", "bfloat16")
    shapes = cache_shapes(spec, NUM_PAGES, "mosaic_tpu")
    layer: Any = tuple(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    caches = StepCaches([layer] * config.num_layers)
    last_token, packed = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (bucket.num_seqs, layout.size))
    arguments = (list(flat.leaves), caches, last_token, packed)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    forward = jax.jit(make_forward(flat, layout), donate_argnums=(1, 2))
    memory = forward.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return {
        "tokens": bucket.num_tokens,
        "cache_bytes": sum(c.size * c.dtype.itemsize for c in jax.tree.leaves(caches)),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def main(topology: str) -> None:
    for bucket in BUCKETS:
        print(json.dumps(compile_step(bucket, topology)), flush=True)


@pytest.mark.parametrize("topology", ["v6e:2x2", pytest.param("tpu7x:2x2x1", marks=pytest.mark.slow)])
def test_compiles_for_a_tpu_in_place(topology, compile_for_tpu, record_property):
    rows = compile_for_tpu(__file__, topology)
    assert [row["tokens"] for row in rows] == [bucket.num_tokens for bucket in BUCKETS]
    for row in rows:
        record_property(f"{topology} {row['tokens']}", row)
        assert row["alias_bytes"] >= row["cache_bytes"]  # the caches
        assert row["temp_bytes"] < row["cache_bytes"] / 2


if __name__ == "__main__":
    main(sys.argv[1])
