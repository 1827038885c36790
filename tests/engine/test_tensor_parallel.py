"""A model over several devices answers as on one, and moves little between them.

Run as a script, this file does so on virtual CPU devices, which must be asked for before JAX starts (see `main`).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import save_file

from jaxengine import LLM, SamplingParams, StructuredOutputsParams
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers import attention
from jaxengine.models.layers.param import spec_of
from jaxengine.models.layers.rope import apply_rope
from jaxengine.models.registry import model_class
from jaxengine.models.weights import parameters
from jaxengine.pallas_kernels import ragged_paged_attention as op
from jaxengine.pallas_kernels.ragged_paged_attention import reference
from jaxengine.sampling import filters
from jaxengine.sharding.mesh import columns_in_place, make_mesh
from tests.conftest import write_byte_tokenizer

MODELS = Path(__file__).parents[1] / "models" / "data"
NUM_DEVICES = 4
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 24,
    "warmup": "none",
}
# A plain MLP with biases, and heads of zeros; norms of heads, and keys held twice.
DEFAULT = ("gpt2", "qwen3")
COLLECTIVE = re.compile(
    r"= (\S[^=\n]*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
ROTATED = "+rope_and_write"
NUM_TOP = 5
LARGEST_GATHERED = 32 * NUM_DEVICES * NUM_TOP
"""The best tokens of every device, for as many rows as have their log probabilities computed at once."""


def run(case: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Runs this file as a script; returns the lines of JSON that it prints, one for each size."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(NUM_DEVICES), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, case, *map(str, sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        pytest.param(path.name, [1, 2, 4], marks=pytest.mark.slow)
        for path in sorted(MODELS.iterdir())
        if path.name not in DEFAULT
    ]
    + [(case, [1, 2]) for case in DEFAULT]
    + [pytest.param("smollm2", [1, 2, 3, 4], marks=pytest.mark.slow)],
)
def test_answers_as_on_one_device(case, sizes):
    one, *others = run(case, sizes)
    for other in others:
        assert other["token_ids"] == one["token_ids"]


def test_each_device_may_rotate_and_write_its_heads_in_a_kernel():
    """As on GPUs, whose kernel has no form for CPUs: here in plain JAX, on what each device is given."""
    one, two = run("qwen3" + ROTATED, [1, 2])
    assert one["num_rotated"] is None
    assert two["num_rotated"] == [2, 1]  # heads of queries, of keys (which both hold)
    assert two["token_ids"] == one["token_ids"]


def test_the_sampler_answers_as_on_one_device_and_little_moves(tmp_path):
    write_random_checkpoint(tmp_path)
    one, four = run(str(tmp_path), [1, 4])
    assert four["token_ids"] == one["token_ids"]
    assert one["collectives"] == []
    assert len(one["token_ids"][1]) == 13  # letters and the end
    gathered = [count for kind, count in four["collectives"] if kind != "all-reduce"]
    assert 0 < max(gathered) <= LARGEST_GATHERED < CONFIG["hidden_size"] ** 2
    assert "all-reduce" in {kind for kind, _ in four["collectives"]}
    assert four["thresholds"] == one["thresholds"]


def write_random_checkpoint(folder: Path) -> None:
    config, rng = ModelConfig.from_hf(CONFIG), np.random.default_rng(0)
    model = model_class(config.architecture)(config)
    tensors, sources = {}, model.weight_map()
    for path, param in parameters(model).items():
        for name, shape in zip(sources[path].names, spec_of(param).part_shapes(), strict=True):
            tensors[name] = np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(size=shape, scale=0.1)
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_byte_tokenizer(folder)  # most of the vocabulary belongs to no token


@pytest.mark.parametrize(("size", "text"), [(0, "tensor_parallel_size=0"), (64, "needs 64 devices: there")])
def test_wrong_sizes_are_refused(tiny, size, text):
    with pytest.raises(ValueError, match=text):
        LLM(str(tiny), tensor_parallel_size=size)


def collectives(llm: Any) -> list[tuple[str, int]]:
    """Kind of every collective in the compiled steps, and elements of the largest array that it makes."""
    found = []
    for text in llm.llm_engine.core.runner.programs.compiled_programs():
        for shapes, kind in COLLECTIVE.findall(re.sub(r"/\*.*?\*/", "", text)):
            sizes = [map(int, filter(None, shape.split(","))) for shape in re.findall(r"\[([\d,]*)\]", shapes)]
            found.append((kind, max(map(math.prod, sizes))))
    return found


def replace_kernel() -> list[int]:
    """Puts plain JAX where a GPU runs `rope_and_write`; returns a list of the heads that it was last given."""
    given = [0, 0]

    def rotate(qkv, cos, sin, cache, meta, norm_weights, *, norm_offset, norm_eps):
        num_kv_heads, head_dim = cache[0].shape[1], cache[0].shape[3]
        heads = qkv.reshape(qkv.shape[0], -1, head_dim)
        given[:] = heads.shape[1] - 2 * num_kv_heads, num_kv_heads
        q, k, v = jnp.split(heads, [given[0], sum(given)], axis=1)
        q, k = (
            apply_rope(x * lax.rsqrt((x * x).mean(-1, keepdims=True) + norm_eps) * (weight + norm_offset), (cos, sin))
            for x, weight in zip((q, k), norm_weights, strict=True)
        )
        return q, reference.write(k, v, cache, meta.plan.page, meta.plan.offset, None, None)

    def attend(q, k, v, cache, meta, **options):
        assert k is None
        assert v is None
        k, v = (pages[meta.plan.page, :, meta.plan.offset] for pages in cache)
        return op.ragged_paged_attention(q, k, v, cache, meta, **options)

    attention.has_kernel = lambda *args: True
    attention.rope_and_write, attention.ragged_paged_attention = rotate, attend
    return given


def thresholds(size: int) -> list[list[int]]:
    """What top-k and top-p find on accelerators, with the logits' columns on so many devices."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1024)) * 3, jnp.float32)
    keys, k = filters._sortable(logits), jnp.asarray([1, 40, 1024], jnp.float32)
    with jax.set_mesh(make_mesh(1, size)):
        place, search = columns_in_place, filters._several_bits_at_a_time
        find = jax.jit(lambda keys, weights, target: search(place(keys), place(weights), target))
        # Numbers of tokens, and powers of two: sums that are exact in any order.
        found = [find(keys, jnp.ones_like(logits), k), find(keys, 2.0 ** jnp.round(logits), 16.0 * k)]
    return [x.tolist() for x in found]


def main(case: str, sizes: list[int]) -> None:
    case, is_rotated = case.removesuffix(ROTATED), case.endswith(ROTATED)
    models: dict[str, dict[str, Any]] = {"smollm2": {}}
    if os.path.isabs(case):
        models[case] = {"model": case, "max_logprobs": NUM_TOP, "skip_tokenizer_init": False}
    prompts: Any = [{"prompt_token_ids": list(range(3, 3 + count))} for count in (9, 20)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    if os.path.isabs(case):
        params = SamplingParams(
            temperature=0.8,
            top_p=0.9,
            top_k=20,
            seed=1,
            repetition_penalty=1.1,
            max_tokens=12,
            logprobs=2,
            prompt_logprobs=2,
            ignore_eos=True,
            detokenize=False,
        )
        of_letters = StructuredOutputsParams(regex="[a-z]{12}")
        params = [params, SamplingParams(temperature=0, max_tokens=14, structured_outputs=of_letters)]
    for size in sizes:
        num_rotated = replace_kernel() if is_rotated and size > 1 else None
        options = ENGINE | models.get(case, {"model": str(MODELS / case)})
        with LLM(**options, tensor_parallel_size=size) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answer: dict[str, Any] = {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
            if os.path.isabs(case):
                answer["thresholds"] = thresholds(size)
            answer |= {"collectives": collectives(llm), "num_rotated": num_rotated}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:]])
