"""Caches of 8 bits: where their scales come from, and what they cost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxengine import LLM, SamplingParams
from jaxengine.models.layers.cache_scale import CACHE_LIMITS

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 64,
    "warmup": "none",
}
PROMPTS = ["The river rose. " * 6, "x = [1, 2, 3]", "Paris, Köln, 東京"]


def scales(llm: LLM) -> np.ndarray:
    """f32[2, L, K]."""
    runner = llm.llm_engine.core.runner
    assert runner._leaves is not None
    assert runner._cache_scales is not None
    return np.stack([np.asarray(runner._leaves[leaf]) for leaf in runner._cache_scales._scales])


def prompt_logprobs(llm: LLM) -> np.ndarray:
    """Of each token of the prompts, whose keys and values are all read from the cache again: chunks are short."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return np.array([next(iter(t.values())).logprob for o in outputs for t in (o.prompt_logprobs or [])[1:] if t])


@pytest.fixture(scope="module")
def exact(tiny) -> np.ndarray:
    with LLM(str(tiny), **ENGINE) as llm:
        return prompt_logprobs(llm)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_what_eight_bits_cost(tiny, exact, dtype):
    with LLM(str(tiny), **ENGINE, kv_cache_dtype=dtype) as llm:
        config = llm.llm_engine.config
        assert config.kv_cache_dtype == {"fp8": "float8_e4m3fn", "int8": "int8"}[dtype]
        difference = np.abs(prompt_logprobs(llm) - exact)
        assert 0 < difference.mean() < {"fp8": 0.3, "int8": 0.06}[dtype]  # of logits that differ by 8
        measured = scales(llm)
        assert measured.shape == (2, 2, 2)
        assert len(np.unique(measured)) == measured.size  # each head has its own
        before = prompt_logprobs(llm)
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            np.testing.assert_array_equal(scales(llm), measured)
        np.testing.assert_array_equal(prompt_logprobs(llm), before)


def with_scales(tiny: Path, folder: Path, tensors: dict[str, np.ndarray]) -> str:
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return str(folder)


def test_scales_of_the_checkpoint(tiny, tmp_path):
    """One number or one for each head, under the names that are in use; what a checkpoint lacks is measured."""
    given = {
        "model.layers.0.self_attn.k_scale": np.array(0.5, np.float32),
        "model.layers.0.self_attn.v_proj.output_scale": np.array([0.25], np.float32),
        "model.layers.1.self_attn.k_proj.k_scale": np.array([0.5, 0.75], np.float32),
    }
    model = with_scales(tiny, tmp_path, given)
    want = np.array([[[0.5, 0.5], [0.5, 0.75]], [[0.25, 0.25], [0, 0]]], np.float32)
    for dtype, factor in (("fp8_e4m3", 1), ("int8", CACHE_LIMITS["float8_e4m3fn"] / CACHE_LIMITS["int8"])):
        with LLM(model, **ENGINE, kv_cache_dtype=dtype) as llm:
            found = scales(llm)
        np.testing.assert_allclose(found[want > 0], want[want > 0] * factor, rtol=1e-6)
        assert (found[want == 0] > 0).all()
    with LLM(model, **ENGINE) as llm:  # without 8 bits they are of no use
        assert len(llm.generate(PROMPTS[:1], SamplingParams(max_tokens=2), use_tqdm=False)) == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.5, 0.5, 0.5], "has 3 numbers; expected 1, or 2"), ([0.0], "a scale of 0"), ([np.nan], "a scale of nan")],
)
def test_wrong_scales_are_refused(tiny, tmp_path, values, text):
    model = with_scales(tiny, tmp_path, {"model.layers.0.self_attn.k_scale": np.array(values, np.float32)})
    with pytest.raises(ValueError, match=text):
        LLM(model, **ENGINE, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("dtype", "text"),
    [("fp8_e5m2", "'fp8' .e4m3. takes as little"), ("int4", "expected one of auto, bfloat16, .*, fp8, fp8_e4m3, int8")],
)
def test_unknown_dtypes_are_refused(tiny, dtype, text):
    with pytest.raises(ValueError, match=text):
        LLM(str(tiny), kv_cache_dtype=dtype)
