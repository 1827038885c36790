"""A warm start reads lowered programs from the compilation cache, and runs none of the Python that made them."""

import logging
from typing import Any

import jax
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.runner import lowering, program_store


@pytest.fixture
def cache(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "lowered"
    jax.config.update("jax_compilation_cache_dir", before)


def answer(tiny, **options) -> list[int]:
    args = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16, "warmup": "none"}
    with LLM(str(tiny), **(args | {"num_gpu_blocks_override": 20} | options)) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
        return list(output.outputs[0].token_ids)


def never(*args, **kwargs):
    raise AssertionError("a step was traced")


def test_a_warm_start_with_everything_traces_nothing(tiny, cache, monkeypatch):
    def answers(**options):
        args = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
        with LLM(str(tiny), **args, warmup="full", num_gpu_blocks_override=20, **options) as llm:
            params = [
                SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True),
                SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, top_p=0.8),
                SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, top_k=3),
                SamplingParams(max_tokens=6, repetition_penalty=1.5, logprobs=2, prompt_logprobs=1, ignore_eos=True),
            ]
            prompts: Any = [{"prompt_token_ids": [5, 6, 7]}] * len(params)
            return [(o.prompt_logprobs, o.outputs[0]) for o in llm.generate(prompts, params, use_tqdm=False)]

    want = answers()
    for name in ("make_forward", "make_sampler", "make_prompt_logprobs"):
        monkeypatch.setattr(lowering, name, lambda *args, **kwargs: never)
    for name in ("_set_own_slot", "mask_logits"):
        monkeypatch.setattr(lowering, name, never)
    assert answers() == want
    with pytest.raises(AssertionError, match="traced"):
        answers(logits_processors=[lambda logits, state: logits])


def test_a_warm_start_traces_no_step(tiny, cache, monkeypatch, caplog):
    want = answer(tiny)
    files = sorted(cache.iterdir())
    assert files
    monkeypatch.setattr(lowering, "make_forward", lambda *args, **kwargs: never)
    assert answer(tiny) == want
    assert sorted(cache.iterdir()) == files

    with pytest.raises(AssertionError, match="traced"):
        answer(tiny, num_gpu_blocks_override=21)  # another program
    monkeypatch.setattr(program_store, "_hash_of_sources", lambda: "changed")
    with pytest.raises(AssertionError, match="traced"):
        answer(tiny)
    monkeypatch.undo()

    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert answer(tiny) == want
    assert "cannot be read" in caplog.text
    assert all(file.stat().st_size > 1000 for file in files)


def test_where_nothing_can_be_written_it_runs_all_the_same(tiny, cache, caplog):
    cache.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert len(answer(tiny)) == 6
    assert "cannot be written" in caplog.text


def test_the_sources_are_the_models_and_the_kernels_too():
    found = program_store._sources()
    tuning = [name for name in found if name.startswith("pallas_kernels/") and name.endswith(".json")]
    assert {"engine/core.py", "models/llama.py", "pallas_kernels/skinny_matmul/config.py", "sharding/mesh.py"} <= {
        *found
    }
    assert tuning
