"""A warm start reads lowered programs from the compilation cache, and runs none of the Python that made them."""

import contextlib
import dataclasses
import logging
import os
import time
from signal import Signals
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.engine.build import set_up_compilation_cache
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.resolve import resolve_model
from jaxengine.models.abstract import abstract_model
from jaxengine.runner import lowering_pool, program_store
from jaxengine.runner.lowering_pool import LoweringPool, choose_num_processes
from jaxengine.runner.programs import ModelStep, SetSlot, model_step, prompt_logprobs, sampler
from jaxengine.runner.step_programs import StepPrograms


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

    want = answers(num_lowering_processes=1)
    makers = (model_step, "make_forward"), (sampler, "make_sampler"), (prompt_logprobs, "make_prompt_logprobs")
    for module, name in makers:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: never)
    for name in ("_set_own_slot", "mask_logits"):
        monkeypatch.setattr(sampler, name, never)
    assert answers() == want
    with pytest.raises(AssertionError, match="traced"):
        answers(logits_processors=[lambda logits, state: logits])


def test_a_warm_start_traces_no_step(tiny, cache, monkeypatch, caplog):
    want = answer(tiny)
    files = sorted(cache.iterdir())
    assert files
    monkeypatch.setattr(model_step, "make_forward", lambda *args, **kwargs: never)
    assert answer(tiny) == want
    # What steps are planned, and of which requests, is not in a program.
    assert answer(tiny, async_scheduling=False, enable_prefix_caching=False, num_scheduler_steps=3, seed=1) == want
    assert sorted(cache.iterdir()) == files

    with pytest.raises(AssertionError, match="traced"):
        answer(tiny, num_gpu_blocks_override=21)  # another program
    with pytest.raises(AssertionError, match="traced"):
        answer(tiny, max_num_seqs=3)
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


def test_no_flipped_bit_breaks_a_start(tmp_path, caplog):
    """Wherever it is: the program is lowered again, and the file is whole again."""
    store = program_store.ProgramStore(tmp_path / "lowered", "about", "cpu")
    jitted, key, args = jax.jit(lambda x: jnp.sin(x) * 2), SetSlot(), (jax.ShapeDtypeStruct((3,), jnp.float32),)
    first = store.exported(key, jitted, args)
    assert first is not None
    (file,) = (tmp_path / "lowered").iterdir()
    whole, text = file.read_bytes(), first.mlir_module()
    for place in {*range(0, len(whole), max(len(whole) // 40, 1)), 0, 63, 64, len(whole) - 1}:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        again = store.exported(key, jitted, args)
        assert again is not None
        assert again.mlir_module() == text
        assert store.exported(key, None, args) is not None  # read, not lowered
    assert "checksum" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, cache, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    for place, mode in ((shared, 0o777), (shared, 0o770), (shared / "lowered", 0o722)):
        place.mkdir(exist_ok=True)
        place.chmod(mode)
        caplog.clear()
        set_up_compilation_cache(str(shared))
        assert jax.config.jax_compilation_cache_dir is None
        assert f"can write to {place}" in caplog.text
        place.chmod(0o700)
    set_up_compilation_cache(str(shared))
    assert jax.config.jax_compilation_cache_dir == str(shared)
    new = tmp_path / "new" / "folder"
    set_up_compilation_cache(str(new))
    assert new.stat().st_mode & 0o777 == 0o700
    monkey = tmp_path / "another user's"
    monkey.mkdir()
    if os.getuid() == 0:
        os.chown(monkey, 12345, 0)
        set_up_compilation_cache(str(monkey))
        assert "belongs to another user" in caplog.text


@pytest.mark.parametrize("signal", [Signals.SIGKILL, Signals.SIGSTOP])
def test_other_processes_lower_and_this_one_goes_on_without_them(tiny, cache, monkeypatch, caplog, signal):
    args = EngineArgs(model=str(tiny), dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16)
    config = dataclasses.replace(args.resolve(resolve_model(tiny)), warmup="none", num_pages=20)
    programs = StepPrograms(abstract_model(config.model, config.dtype, config.weight_dtype), config)
    store = program_store.open_store(config, 20)
    assert store is not None
    first, second, third = map(ModelStep, programs.buckets[:3])
    with contextlib.closing(programs), contextlib.closing(LoweringPool(1)) as pool:
        pool.begin(config, 20)
        while store.lacks(first):  # until the process is ready it is this one's turn
            with pool.turn(first):
                time.sleep(0.1)
        with pool.turn(second):
            assert not store.lacks(second)
        assert not caplog.text
        monkeypatch.setattr(model_step, "make_forward", lambda *args, **kwargs: never)
        programs.lower(first)
        with pytest.raises(AssertionError, match="traced"):
            programs.lower(third)
        monkeypatch.setattr(lowering_pool, "MAX_SECONDS", 0.5)
        pool._processes[0]._process.send_signal(signal)
        for _ in range(4):
            with pool.turn(third):
                assert store.lacks(third)
        assert caplog.text.count("has ended") == 1
        assert ("no answer" in caplog.text) == (signal == Signals.SIGSTOP)
    with pool.turn(third):
        assert store.lacks(third)


def test_processes_start_while_memory_is_measured_if_nothing_is_stored(tiny, cache):
    args = EngineArgs(model=str(tiny), dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16)
    config = dataclasses.replace(args.resolve(resolve_model(tiny)), warmup="none", num_pages=20)
    programs = StepPrograms(abstract_model(config.model, config.dtype, config.weight_dtype), config)
    programs.config = dataclasses.replace(config, warmup="full", num_lowering_processes=1)
    with contextlib.closing(programs):
        needed = programs.bytes_beside_cache()
        pool = programs._lowering_pool
        assert pool is not None
        (process,) = pool._processes
        assert process._process.poll() is None
        programs._close_lowering_pool()
        assert process._process.poll() is not None
        assert programs.bytes_beside_cache() == needed
        assert programs._lowering_pool is None


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


def test_as_many_processes_as_are_worth_starting(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    assert [choose_num_processes(number) for number in (0, 3, 4, 30, 300)] == [0, 0, 1, 7, 8]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert choose_num_processes(300) == 1
