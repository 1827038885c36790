"""Models whose layers keep different things answer as they do without any cache.

Run as a script, this file does so on virtual CPU devices, which must be asked for before JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxengine import LLM, SamplingParams
from jaxengine.loading.loader import init_dummy
from jaxengine.models import registry
from jaxengine.models.cache import PagedKV, SlotState
from jaxengine.models.causal_lm import CausalLM, DecoderLayer, make_norm
from jaxengine.models.config import FULL, SLIDING, ModelConfig
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.norm import PendingResidual
from jaxengine.models.layers.param import spec_of
from jaxengine.models.step import ModelInputs
from jaxengine.models.weights import parameters
from jaxengine.sharding import axes

WINDOW, MAX_LEN, PAGE = 24, 1024, 8
ENGINE = {
    "dtype": "float32",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": MAX_LEN,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "block_size": PAGE,
    "warmup": "none",
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": MAX_LEN,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING],
    "tie_word_embeddings": False,
}
TOY = {
    "architectures": ["ToyForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": MAX_LEN,
}
LENGTHS = (330, 9, 300, 330, 41)


class ToyConfig(ModelConfig):
    """Three kinds of layers in turns: full attention, a state, and a window over fewer heads."""

    @property
    def cache_specs(self):
        kinds = (PagedKV(4, 8), SlotState((((32,), "float32"),)), PagedKV(2, 8, WINDOW))
        return tuple(kinds[layer % 3] for layer in range(self.num_layers))


class ToyState(nnx.Module):
    """s = 0.9 s + tanh(W x), which is added to x."""

    def __init__(self, config: ModelConfig, build: LayerBuilder):
        self.norm = make_norm(config, build.at("norm"))
        size = config.hidden_size
        self.proj = Linear(size, size, (axes.EMBED, axes.EMBED), build.at("proj"))

    def __call__(self, x, cache, step):
        x, normed = self.norm.add_and_norm(x, step)
        new = jnp.tanh(self.proj(normed, step))
        rows = jnp.arange(new.shape[0])
        if step.is_differentiable:
            sequence, states = step.segment_ids, jnp.zeros_like(new)
        else:
            sequence = jnp.sum(rows[:, None] >= step.slots.query_starts[1:], axis=1)
            states = jnp.where(step.slots.starts[:, None] == 0, 0, cache[0].at[step.slots.slots].get(mode="fill"))
            states = jnp.pad(states, ((0, 1), (0, 0)))  # of padding

        def advance(states, row):
            state = 0.9 * states[sequence[row]] + new[row]
            return states.at[sequence[row]].set(state), state

        states, out = lax.scan(advance, states, rows)
        if not step.is_differentiable:
            cache = (cache[0].at[step.slots.slots].set(states[:-1], mode="drop"),)
        return PendingResidual(x, out), cache


def toy_layer(config: ModelConfig, layer: int, build: LayerBuilder):
    if layer % 3 == 1:
        return ToyState(config, build)
    if layer % 3 == 2:
        config = dataclasses.replace(config, num_heads=2, num_kv_heads=2)
    return DecoderLayer(config, layer, build)


class ToyForCausalLM(CausalLM):
    layer_class = staticmethod(toy_layer)

    @classmethod
    def read_config(cls, hf):
        fields = dataclasses.asdict(super().read_config(hf)) | {"rope": None, "rope_layers": (False,) * 6}
        kinds = [FULL, FULL, SLIDING] * 2
        return ToyConfig(**fields | {"layer_types": tuple(kinds), "sliding_window": WINDOW, "head_dim": 8})


def register_toy(patch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("jaxengine.models.toy")
    module.ToyForCausalLM = ToyForCausalLM
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(registry.MODELS, "ToyForCausalLM", "toy:ToyForCausalLM")


def make_prompts() -> list[list[int]]:
    """The fourth begins as the first."""
    rng = random.Random(0)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in LENGTHS]
    prompts[3][:290] = prompts[0][:290]
    return prompts


def write_config(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Those of `init_dummy`: over several devices it makes others."""
    from safetensors.numpy import save_file

    model: Any = init_dummy(ModelConfig.from_hf(config), jnp.float32)
    tensors = {}
    for path, spec in model.weight_map().items():
        param = parameters(model)[path]
        ends = np.cumsum([part.size for part in spec_of(param).fused_parts])[:-1] if len(spec.names) > 1 else []
        values = np.split(np.asarray(param[...]), ends)
        tensors |= dict(zip(spec.names, map(np.ascontiguousarray, values), strict=True))
    save_file(tensors, folder / "model.safetensors")


def generate(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in make_prompts()], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_answers(config: dict[str, Any], answers: list[list[int]]) -> None:
    """Each token is the most likely one after those before it, as the model computes it at once, without caches."""
    model = init_dummy(dataclasses.replace(ModelConfig.from_hf(config), max_model_len=MAX_LEN), jnp.float32)

    @nnx.jit
    def most_likely(model, token_ids):
        hidden = model(ModelInputs(token_ids, jnp.arange(token_ids.shape[0]))).hidden
        return model.compute_logits(hidden)

    for prompt, answer in zip(make_prompts(), answers, strict=True):
        tokens = np.array(prompt + answer)
        logits = np.asarray(most_likely(model, jnp.asarray(np.pad(tokens, (0, 360 - len(tokens))))))
        rows = logits[len(prompt) - 1 : len(tokens) - 1]
        behind = rows.max(axis=1) - rows[np.arange(len(answer)), answer]
        assert behind.max() < 1e-4  # rounding decides between tokens that are as likely
        assert len(set(answer)) > 2


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name == f"jaxengine:{name}")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    with LLM(write_config(tmp_path_factory.mktemp("gemma"), GEMMA), **ENGINE, num_gpu_blocks_override=900) as llm:
        yield llm


def test_layers_with_windows(gemma):
    groups = gemma.llm_engine.config.model.cache_layout.groups
    windows = [(group.spec.window, group.layers) for group in groups]
    assert windows == [(WINDOW, (0, 1)), (None, (2, 5)), (WINDOW, (3, 4)), (WINDOW, (6,))]
    answers = [generate(gemma), generate(gemma)]
    assert answers[0] == answers[1]  # the second time from the prefix cache
    kv = gemma.llm_engine.core.scheduler.shards[0].kv_cache
    assert kv.num_free_pages == kv.num_pages
    assert kv.prefix_hits > 1000
    check_answers(GEMMA, answers[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu_blocks_override": 112, "num_scheduler_steps": 4},
        {"num_gpu_blocks_override": 112, "enable_prefix_caching": False},
        {"num_gpu_blocks_override": 112, "scheduling_policy": "priority"},
        {"num_gpu_blocks_override": 300, "max_num_batched_tokens": 512, "enable_chunked_prefill": False},
    ],
    ids=str,
)
def test_layers_with_windows_and_few_pages(tmp_path, options):
    with LLM(write_config(tmp_path, GEMMA), **ENGINE | {"max_model_len": 512} | options) as llm:
        answers = generate(llm)
        assert (metric(llm, "num_preemptions") > 0) == (options["num_gpu_blocks_override"] == 112)
        kv = llm.llm_engine.core.scheduler.shards[0].kv_cache
        assert kv.num_free_pages == kv.num_pages
    check_answers(GEMMA, answers)


def test_pages_that_windows_have_passed_are_free(gemma):
    engine, kv = gemma.llm_engine, gemma.llm_engine.core.scheduler.shards[0].kv_cache
    params = SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False, temperature=0)
    engine.add_request("0", {"prompt_token_ids": make_prompts()[0]}, params)
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, kv.num_pages - kv.num_free_pages)
    assert 338 // PAGE <= most <= -(-339 // PAGE) + 3 * (-(-(WINDOW + 32) // PAGE) + 1)


def test_layers_with_states_and_other_heads(tmp_path, monkeypatch):
    register_toy(monkeypatch)
    with LLM(write_config(tmp_path, TOY), **ENGINE, num_gpu_blocks_override=93) as llm:
        layout = llm.llm_engine.config.model.cache_layout
        assert layout.cache_of == (0, 2, 0, 1, 3, 1)
        assert [group.blocks_per_page for group in layout.groups] == [1, 2]
        answers = generate(llm)
        assert metric(llm, "num_preemptions") > 0
        assert not llm.llm_engine.config.enable_prefix_caching
    check_answers(TOY, answers)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (TOY, {"tensor_parallel_size": 2}),
        pytest.param(TOY, {"data_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(GEMMA, {"data_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_over_two_devices(tmp_path, monkeypatch, config, sizes):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    register_toy(monkeypatch)
    options = dict(sizes)
    if "tensor_parallel_size" in sizes:
        write_weights(tmp_path, config)
        options["load_format"] = "auto"
    command = [sys.executable, __file__, write_config(tmp_path, config), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    check_answers(config, result["answers"])
    assert result["devices"] == 2


def main(model: str, options: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        register_toy(patch)
        patch.setattr("jaxengine.engine_args.check_size", lambda *_: None)  # which takes all layers to be alike
        with LLM(model, **ENGINE | options, num_gpu_blocks_override=180) as llm:
            devices = {d for x in jax.tree.leaves(llm.llm_engine.core.runner._caches) for d in x.sharding.device_set}
            print(json.dumps({"answers": generate(llm), "devices": len(devices)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
