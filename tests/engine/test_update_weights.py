"""New weights in a running engine: it answers as one that has loaded them, and what is wrong changes nothing.

Run as a script, this file does so over two virtual CPU devices, which must be asked for before JAX starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxengine import LLM, SamplingParams
from jaxengine.loading.loader import load_model, named_weights
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.models.config import ModelConfig
from jaxengine.sharding.mesh import make_mesh
from tests.conftest import write_tiny_model

MODELS = Path(__file__).parents[1] / "models" / "data"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 24,
    "warmup": "none",
    "skip_tokenizer_init": True,
}
PROMPT: Any = {"prompt_token_ids": list(range(5, 40))}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False, logprobs=1)


def answer(llm: LLM) -> tuple[list[int], list[float]]:
    """Tokens, and the log probability of each."""
    (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    steps = zip(completion.logprobs, completion.token_ids, strict=True)
    return list(completion.token_ids), [step[token].logprob for step, token in steps]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = HFCheckpoint(folder)
    return {name: np.asarray(checkpoint.get(name)) for name in checkpoint.tensor_names()}


def write_model(folder: Path, seed: int) -> Path:
    """The tiny model with embeddings so small that it is not certain of what it says."""
    write_tiny_model(folder, seed=seed)
    tensors = tensors_of(folder)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: 0.1 * tensors[name]}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("first"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same model with other weights."""
    return write_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def llm(first) -> Iterator[LLM]:
    with LLM(str(first), **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(llm, first, other) -> dict[str, Any]:
    """Of both models, each loaded from its files."""
    with LLM(str(other), **ENGINE) as fresh:
        return {"first": answer(llm), "other": answer(fresh)}


@pytest.fixture(autouse=True)
def restored(request) -> Iterator[None]:
    """Leaves the engine with its own weights."""
    yield
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").update_weights(tensors_of(request.getfixturevalue("first")).items())


@pytest.mark.parametrize("kind", ["numpy", "jax", "mixed", "bare", "tied head too", "as on accelerators"])
def test_answers_as_an_engine_that_has_loaded_them(llm, other, answers, kind, monkeypatch):
    tensors: dict[str, Any] = tensors_of(other)
    if kind == "as on accelerators":  # whose memory may not hold a parameter twice
        monkeypatch.setattr(llm.llm_engine.core.runner._updater, "_frees_first", True)
        before = weights(llm)[:]
    if kind == "jax":
        tensors = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    if kind == "mixed":
        tensors = {name: jnp.asarray(x) if i % 2 else x for i, (name, x) in enumerate(sorted(tensors.items()))}
    if kind == "bare":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if kind == "tied head too":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    llm.update_weights((name, tensor) for name, tensor in tensors.items())
    assert answer(llm) == answers["other"] != answers["first"]
    assert kind != "as on accelerators" or all(leaf.is_deleted() for leaf in before)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    "part", ["k_proj", "layers.1.mlp.up_proj", "layers.0.", "norm", "embed_tokens", "self_attn.q_proj.weight"]
)
def test_what_is_not_named_stays(llm, first, other, tmp_path, part, as_array):
    new = {name: tensor for name, tensor in tensors_of(other).items() if part in name}
    mixed = tensors_of(first) | new
    llm.update_weights((name, as_array(tensor)) for name, tensor in new.items())
    leaves = {path: np.asarray(x) for path, x in zip(paths(llm), weights(llm), strict=True)}
    llm.update_weights(mixed.items())
    for path, leaf in zip(paths(llm), weights(llm), strict=True):
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    (name,) = [name for name in mixed if name.endswith("layers.1.self_attn.k_proj.weight")]
    np.testing.assert_array_equal(leaves["layers.layer.self_attn.qkv_proj.weight"][1, 64:96], mixed[name])


def paths(llm: LLM) -> list[str]:
    return llm.llm_engine.core.runner.programs.context.model.paths()


def weights(llm: LLM) -> list[jax.Array]:
    leaves = llm.llm_engine.core.runner._leaves
    assert leaves is not None
    return leaves


def test_nothing_is_compiled_again_and_cached_prefixes_are_forgotten(llm, other, answers):
    engine, tensors = llm.llm_engine, tensors_of(other)
    on_device = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    llm.update_weights(on_device.items())  # compiles what writes a parameter of each kind
    answer(llm)
    before, num_hits = engine.compilations.count, engine.core.scheduler.prefix_hits
    llm.update_weights(tensors.items())
    assert answer(llm) == answers["other"]
    llm.update_weights(on_device.items())
    assert answer(llm) == answers["other"]
    assert engine.compilations.count == before
    assert engine.core.scheduler.prefix_hits == num_hits
    assert answer(llm) == answers["other"]
    assert engine.core.scheduler.prefix_hits > num_hits  # as ever


def test_the_callers_arrays_stay_its_own(llm, other, answers, monkeypatch):
    """The engine has copies; those of device arrays are made there."""
    on_host = tensors_of(other)
    on_host = {name: np.array(tensor) for name, tensor in on_host.items()}
    on_device = {name: jnp.asarray(tensor) for name, tensor in on_host.items()}

    def refuse(array: Any) -> Any:
        raise AssertionError(f"{array.shape} is copied to the host")

    llm.update_weights(on_device.items())
    value = jax._src.array.ArrayImpl._value.fget  # pyright: ignore[reportAttributeAccessIssue]
    with monkeypatch.context() as patch:
        array_class = jax._src.array.ArrayImpl  # pyright: ignore[reportAttributeAccessIssue]
        patch.setattr(array_class, "_value", property(lambda x: value(x) if x.size == 1 else refuse(x)))
        patch.setattr(array_class, "__array__", refuse)
        llm.update_weights(on_device.items())
    for array in on_device.values():
        assert not array.is_deleted()
        array.delete()
    assert answer(llm) == answers["other"]
    llm.update_weights(on_host.items())
    for array in on_host.values():
        array[...] = np.nan
    assert answer(llm) == answers["other"]


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("model.layers.2.mlp.up_proj.weight", np.zeros((128, 64))), r"1 of the names .*: model\.layers\.2\.mlp"),
        (("model.layers.0.self_attn.qkv_proj.weight", np.zeros((128, 64))), "1 of the names are not part of the model"),
        ((Q, np.zeros((64, 32))), r"q_proj\.weight' of the new weights has shape \(64, 32\); .* wants \(64, 64\)"),
        ((Q, np.zeros((64, 64), np.int8)), r"q_proj\.weight' .* has dtype int8; layers\.0.* holds float32"),
        ((Q, np.zeros((64, 64), bool)), "has dtype bool"),
        ((Q, np.zeros((64, 64), "U1")), "has dtype <U1"),
        ((Q, jnp.zeros((64, 64), complex)), "has dtype complex64"),
        ((Q, [[0.0]]), f"'{Q}' is list; expected an array of NumPy or JAX"),
        (("model.norm.weight", np.ones(64, np.float32)), "'model.norm.weight' comes twice"),
        (("norm.weight", np.ones(64, np.float32)), "'norm.weight' comes twice"),
        ((Q,), "weights gave tuple; expected pairs of a name and an array"),
        ((3, np.ones(3)), "expected pairs of a name and an array"),
    ],
)
def test_what_is_wrong_changes_nothing(llm, other, answers, wrong, message):
    before = weights(llm)[:]
    assert answer(llm) == answers["first"]
    num_hits = llm.llm_engine.core.scheduler.prefix_hits
    new = tensors_of(other)
    new.pop(Q)
    with pytest.raises(ValueError, match=message):
        llm.update_weights([*new.items(), wrong])
    assert all(one is another for one, another in zip(before, weights(llm), strict=True))
    assert answer(llm) == answers["first"]
    assert llm.llm_engine.core.scheduler.prefix_hits > num_hits


def test_an_array_that_is_gone_is_named(llm):
    array = jnp.ones(64)
    array.delete()
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has been deleted"):
        llm.update_weights([("model.norm.weight", array)])


def test_not_while_requests_run_or_the_engine_sleeps(llm, first, other, answers):
    new = tensors_of(other)
    llm.llm_engine.add_request("a", PROMPT, GREEDY)
    llm.llm_engine.step()
    with pytest.raises(RuntimeError, match="requests are running"):
        llm.update_weights(new.items())
    llm.llm_engine.abort_request("a")
    llm.update_weights(new.items())  # with a step in flight whose request has ended
    assert answer(llm) == answers["other"]
    llm.sleep(2)
    with pytest.raises(RuntimeError, match=r"no weights while it sleeps: wake_up\(\)"):
        llm.update_weights(new.items())
    llm.wake_up()
    assert answer(llm) == answers["first"]
    llm.update_weights(new.items())
    llm.sleep(1)
    llm.wake_up()
    assert answer(llm) == answers["other"]
    llm.update_weights((name, jnp.asarray(tensor)) for name, tensor in tensors_of(first).items())
    assert answer(llm) == answers["first"]


def test_an_engine_that_cannot_put_all_in_place_sleeps(llm, other, answers, monkeypatch):
    runner = llm.llm_engine.core.runner
    assert answer(llm) == answers["first"]
    read, left = runner._updater._read, [3]

    def fail(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return read(*args)

    monkeypatch.setattr(runner._updater, "_read", fail)
    with pytest.raises(RuntimeError, match=r"could not all be put in place, so the engine sleeps: wake_up\(\)"):
        llm.update_weights(tensors_of(other).items())
    monkeypatch.undo()
    assert runner.is_sleeping
    llm.wake_up()
    assert answer(llm) == answers["first"]


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_nan_is_warned_of(llm, other, caplog, as_array):
    array = np.full(64, np.nan, np.float32)
    with caplog.at_level("WARNING", "jaxengine"):
        llm.update_weights([("model.layers.1.input_layernorm.weight", as_array(array))])
    assert "model.layers.1.input_layernorm.weight of the new weights has NaN or infinity" in caplog.text


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_numbers_are_converted(llm, other, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(other).items()}
    llm.update_weights(tensors.items())
    got = dict(zip(paths(llm), weights(llm), strict=True))["layers.layer.mlp.down_proj.weight"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[1], tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float32))


@pytest.mark.parametrize(
    "case", ["gpt2", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gemma2", "phi3", "olmo2", "qwen2_window"))]
)
def test_every_kind_of_layer(case):
    """Transposed, fused in the checkpoint, layers that are not stacked: every leaf as it was loaded."""
    check_case(case, {}, np.asarray, jnp.asarray)


def check_case(case: str, devices: dict[str, int], *kinds: Any, answers: bool = True) -> None:
    """Weights that were zeroed come back as they were loaded, in arrays of each kind."""
    tensors = tensors_of(MODELS / case)
    with LLM(str(MODELS / case), **ENGINE, **devices) as llm:
        loaded, places = list(map(np.asarray, weights(llm))), [x.sharding for x in weights(llm)]
        want = answer(llm) if answers else None
        for as_array in kinds:
            llm.update_weights((name, np.zeros_like(tensor)) for name, tensor in tensors.items())
            assert not any(np.asarray(leaf).any() for leaf in weights(llm))
            llm.update_weights((name, as_array(tensor)) for name, tensor in tensors.items())
            for path, leaf, values, place in zip(paths(llm), weights(llm), loaded, places, strict=True):
                np.testing.assert_array_equal(leaf, values, err_msg=path)
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert not answers or answer(llm) == want


def test_a_trained_model_gives_its_weights(llm, first, other, answers):
    checkpoint = HFCheckpoint(other)
    model = load_model(checkpoint, ModelConfig.from_hf(checkpoint.config), jnp.float32)
    llm.update_weights(named_weights(model))
    assert answer(llm) == answers["other"]
    assert model.stack_layers()
    llm.update_weights(tensors_of(first).items())
    llm.update_weights(named_weights(model))
    assert answer(llm) == answers["other"]
    assert all(not param.is_deleted() for param in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("options", [(), pytest.param(("all",), marks=pytest.mark.slow)])
def test_over_two_devices(options):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"checked": 2 if options else 1}


def main(answers: bool) -> None:
    mesh = make_mesh(model=2)

    def sharded(tensor: np.ndarray) -> jax.Array:
        """As a trainer may have it: over the same devices, the last axis cut."""
        entry = "model" if tensor.shape[-1] % 2 == 0 else None
        return jax.device_put(tensor, NamedSharding(mesh, PartitionSpec(*(None,) * (tensor.ndim - 1), entry)))

    def elsewhere(tensor: np.ndarray) -> jax.Array:
        return jax.device_put(tensor, jax.devices()[1])

    # Heads of zeros, and keys that both devices hold.
    cases = ("llama_odd_heads", "qwen3") if answers else ("llama_odd_heads",)
    for case in cases:
        check_case(case, {"tensor_parallel_size": 2}, sharded, elsewhere, np.asarray, answers=answers)
    if answers:
        check_case("qwen3", {"data_parallel_size": 2}, sharded, elsewhere, np.asarray)
    print(json.dumps({"checked": len(cases)}))


if __name__ == "__main__":
    main("all" in sys.argv)
