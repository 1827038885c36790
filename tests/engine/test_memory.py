"""How the memory beside the KV cache is found."""

from jaxengine import LLM
from jaxengine.runner.programs import SamplerKey, temporary_bytes
from jaxengine.sampling.sampler import EVERY_FEATURE
from tests.conftest import SMALL_ENGINE, write_tiny_model


def test_two_layers_tell_what_the_largest_step_needs(tmp_path):
    write_tiny_model(tmp_path, layers=7)
    with LLM(str(tmp_path), dtype="float32", **SMALL_ENGINE) as llm:
        runner = llm.llm_engine.core.runner
        largest = runner.buckets[-1]
        programs = [runner.compile_program(key) for key in (largest, SamplerKey(largest.num_seqs, EVERY_FEATURE, ()))]
        needed = runner.weight_bytes() + sum(map(temporary_bytes, programs))
        assert 0.99 * needed <= runner._bytes_beside_cache() <= 1.01 * needed
