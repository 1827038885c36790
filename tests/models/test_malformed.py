"""Damaged models: each is refused in a line, without a hang, and without much memory; or it is none."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxengine import LLM
from jaxengine.cli.main import main
from jaxengine.loading.resolve import resolve_model
from tests.models.malformed.cases import DATA, all_cases, write_model
from tests.models.malformed.watch import SECONDS, run_cases

MAX_MIB = 1024
EVERY = 25
"""One case of so many is a default test."""


def check(results: dict[str, dict[str, Any]]) -> None:
    wrong = [
        result
        for result in results.values()
        if result["outcome"] not in ("ok", "ValueError") or result["seconds"] > SECONDS or result["mib"] > MAX_MIB
    ]
    assert not wrong


@pytest.mark.slow
def test_damaged_models_are_refused():
    names = list(all_cases())
    assert len(names) > 1400
    results = run_cases(names)
    check(results)
    assert sum(result["outcome"] == "ValueError" for result in results.values()) > 1380


def test_some_damaged_models_are_refused():
    check(run_cases(list(all_cases())[::EVERY]))


@pytest.mark.parametrize(
    "name", ["config llama3 num_hidden_layers billion", "fifo for model.safetensors", "gguf llama.block_count deep"]
)
def test_the_command_line_tells_of_damage_in_a_line(name, tmp_path, capsys):
    path = all_cases()[name](tmp_path)
    assert main(["generate", "Hi", "--model", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert str(tmp_path) in error


def test_a_whole_file_goes_before_a_stale_index(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"old": "model-1-of-9.safetensors"}}')
    assert resolve_model(tmp_path).tensor_names() == resolve_model(DATA / "llama3").tensor_names()


def test_weights_that_are_no_numbers_are_told(tmp_path, caplog):
    from safetensors.numpy import load_file, save_file

    write_model(tmp_path, tokenizer=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), max_model_len=32, max_num_seqs=1, num_gpu_blocks_override=8, warmup="none"):
        assert [record for record in caplog.records if name in record.message and "NaN" in record.message]


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_never_run(where, tmp_path, monkeypatch):
    """Neither what `auto_map` names, nor modules beside the model or in the current folder; nobody is asked."""
    write_model(tmp_path, tokenizer=True)
    path = tmp_path / where
    names = {"AutoTokenizer": ["code.Own", None], "AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names, "tokenizer_class": "Own"}))
    for module in ("code", "json", "tokenizers", "modeling_own"):
        (tmp_path / f"{module}.py").write_text(CODE)
    read, write = os.pipe()
    os.write(write, b"y\n" * 9)
    monkeypatch.chdir(tmp_path)
    with os.fdopen(read) as answers:
        monkeypatch.setattr("sys.stdin", answers)
        with contextlib.suppress(ValueError):  # where there is a class of transformers' own, it serves
            resolve_model(tmp_path).tokenizer()
        os.close(write)
        assert answers.read() == "y\n" * 9
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        resolve_model(tmp_path)
    assert not Path("ran").exists()
