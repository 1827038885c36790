"""How the memory beside the KV cache is found."""

from types import SimpleNamespace

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.runner import model_runner
from jaxengine.runner.lowering import temporary_bytes
from jaxengine.runner.memory import FRACTION, MARGIN, cache_bytes, reserve_device_memory
from jaxengine.runner.programs import ModelStep, Sampler
from jaxengine.sampling.sampler import EVERY_FEATURE
from tests.conftest import SMALL_ENGINE, write_tiny_model


def test_two_layers_tell_what_the_largest_step_needs(tmp_path):
    write_tiny_model(tmp_path, layers=7)
    with LLM(str(tmp_path), dtype="float32", **SMALL_ENGINE) as llm:
        programs = llm.llm_engine.core.runner.programs
        largest = programs.buckets[-1]
        keys = ModelStep(largest), Sampler(largest.num_seqs, EVERY_FEATURE, ())
        compiled = [programs.compile_program(key) for key in keys]
        needed = programs.context.weight_bytes() + sum(map(temporary_bytes, compiled))
        assert 0.99 * needed <= programs.bytes_beside_cache() <= 1.01 * needed


def test_what_steps_have_freed_goes_back_to_the_system_now_and_then(tiny, monkeypatch):
    clock, released = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr(model_runner, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(model_runner, "release_free_memory", lambda: released.append(clock.now))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(str(tiny), dtype="float32", **SMALL_ENGINE) as llm:
        released.clear()  # after loading
        for clock.now in (1001.0, 1003.0, 1004.0, 1005.5):
            llm.generate("abc", params, use_tqdm=False)
    assert released == [1003.0, 1005.5]


def test_the_cache_gets_the_share_of_the_device_that_is_asked_for(monkeypatch):
    """80 GB, of which JAX has taken three quarters by itself, or the share that the engine asks for."""
    left = 1 - MARGIN
    monkeypatch.delenv(FRACTION, raising=False)
    assert cache_bytes(60_000, 0.5, 10_000) == pytest.approx(40_000 * left - 10_000, abs=1)
    assert cache_bytes(60_000, 0.9, 10_000) == pytest.approx(60_000 * left - 10_000, abs=1)  # what JAX has
    reserve_device_memory(0.9)
    assert cache_bytes(72_000, 0.9, 10_000) == pytest.approx(72_000 * left - 10_000, abs=1)
    reserve_device_memory(0.5)  # JAX has begun: the first counts
    assert cache_bytes(72_000, 0.5, 0) == pytest.approx(40_000 * left, abs=1)
