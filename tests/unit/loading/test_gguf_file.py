"""The GGUF container: metadata, tensor places, and what is said of damaged files."""

import struct

import gguf
import numpy as np
import pytest

from jaxengine.loading.gguf_file import GGUFFile


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint32", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.uint64", 1 << 40)
    writer.add_int8("a.int8", -3)
    writer.add_float64("a.float64", 0.1)
    writer.add_array("a.strings", ["ä", "", "▁the"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_tensor("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("vector", np.arange(4, dtype=np.float16))
    quantised = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("rare", quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_read_with_python_types(path):
    metadata = GGUFFile(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert (metadata["a.uint32"], metadata["a.float32"], metadata["a.bool"]) == (7, 0.5, True)
    assert (metadata["a.uint64"], metadata["a.int8"], metadata["a.float64"]) == (1 << 40, -3, 0.1)
    assert metadata["a.strings"] == ["ä", "", "▁the"]
    assert metadata["a.ints"] == [1, -2, 3]
    assert metadata["a.nested"] == [[1, 2], [3]]


def test_tensors_are_found_and_mapped(path):
    file = GGUFFile(path)
    assert list(file.tensors) == ["matrix", "vector", "rare"]
    matrix, vector, rare = file.tensors.values()
    assert (matrix.shape, matrix.type_name) == ((2, 3), "F32")
    np.testing.assert_array_equal(file.raw(matrix).view(np.float32), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(file.raw(vector).view(np.float16), [np.arange(4)])
    assert (rare.shape, rare.type_name, rare.num_bytes) == ((4, 64), "Q5_0", 4 * 44)
    assert not file.raw(rare).flags.writeable


def test_every_truncation_is_reported(path, tmp_path):
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 24, 40, 100, len(data) // 2, len(data) - 40):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf (is not a GGUF file|is truncated)"):
            GGUFFile(cut)
    cut.write_bytes(data[:-40])
    with pytest.raises(ValueError, match="tensor rare should end at byte"):
        GGUFFile(cut)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "4s", b"GGML", "not a GGUF file"),
        (4, "<I", 1, "version 1"),
        (4, ">I", 3, "big-endian"),
        (8, "<Q", 1 << 60, "truncated or damaged"),
        (16, "<Q", 1 << 60, "truncated or damaged"),
    ],
)
def test_damage_is_reported(path, offset, layout, value, message):
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)
