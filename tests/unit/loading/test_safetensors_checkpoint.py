"""Hugging Face folders: reading safetensors, and what is said of damaged or incomplete folders."""

import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint, SafetensorsFile

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "c.weight": np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(7, np.int64),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "eos_token_id": 3, "bos_token_id": 1}))
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def write_raw(path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shard(folder) -> None:
    """Splits the folder's tensors over two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = list(TENSORS)
    parts = {"m-1-of-2.safetensors": names[:2], "m-2-of-2.safetensors": names[2:]}
    for file, part in parts.items():
        save_file({name: TENSORS[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_reads_all(checkpoint) -> None:
    assert checkpoint.tensor_names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.get(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(read, tensor)
        assert not read.flags.writeable


def test_reads_a_single_file(folder):
    checkpoint = HFCheckpoint(folder)
    assert isinstance(checkpoint, Checkpoint)
    assert_reads_all(checkpoint)
    with pytest.raises(ValueError, match="has no tensor 'nothing'"):
        checkpoint.get("nothing")


def test_reads_shards(folder):
    shard(folder)
    assert_reads_all(HFCheckpoint(folder))


def test_missing_shard_and_missing_tensor(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"d.weight": "m-2-of-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"m-2-of-2\.safetensors lacks tensor 'd\.weight'"):
        HFCheckpoint(folder)
    (folder / "m-2-of-2.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"m-2-of-2\.safetensors is missing: .*index.json says that it holds tensor 'c"
    ):
        HFCheckpoint(folder)
    index.unlink()
    with pytest.raises(
        ValueError, match=r"shards such as m-1-of-2\.safetensors, but no model\.safetensors\.index\.json"
    ):
        HFCheckpoint(folder)


def test_every_truncation_is_reported(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 4, 8, 50, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
            HFCheckpoint(folder)
    with pytest.raises(ValueError, match=r"tensor '.*' should end at byte \d+, but the file has \d+ bytes"):
        HFCheckpoint(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}},
            "'a' of shape .2,. and dtype F32 takes 8 bytes",
        ),
        ({"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}, "'a' has dtype 'Q9'; known are"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry of tensor 'a' is damaged"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            "'a' at offset 4 leaves a gap after the header",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "tensor 'b' at offset 4 overlaps tensor 'a', which ends at 8",
        ),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(12))
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


def test_header_that_is_no_json(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"\xff{}{" + bytes(8))
    with pytest.raises(ValueError, match="damaged header"):
        SafetensorsFile(path)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model: it has no config\.json"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights"):
        HFCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"convert pytorch_model\.bin to safetensors"):
        HFCheckpoint(tmp_path)


def test_ends_of_generation(folder):
    assert HFCheckpoint(folder).generation_config == {"eos_token_id": [3], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5], "temperature": 0.6}))
    generation = HFCheckpoint(folder).generation_config
    assert generation == {"eos_token_id": [3, 5], "bos_token_id": 1, "temperature": 0.6}


def test_a_folder_without_tokenizer(folder):
    with pytest.raises(ValueError, match="has no tokenizer"):
        HFCheckpoint(folder).tokenizer()


def test_tokenizer_and_chat_template_without_advice_to_install_pytorch(folder):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "hello": 1, "world": 2, "</s>": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} world")
    code = (
        "import sys; from jaxengine.loading.safetensors_checkpoint import HFCheckpoint; c = HFCheckpoint(sys.argv[1]);"
        "t = c.tokenizer(); assert t is c.tokenizer();"
        "print(t.encode('hello you'), t.eos_token_id, t.apply_chat_template([{'content': 'hello'}], tokenize=False))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[1, 0] 3 hello world"
    assert "PyTorch" not in out.stderr
