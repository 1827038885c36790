"""Reads the container of a GGUF file: its metadata and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` makes several numpy views of
every string and takes seconds for a vocabulary of 49k tokens; this reader takes about 0.1 s.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.loading.files import open_regular

_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_AXES = 4, 8
# Metadata value type -> struct format of one scalar.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Tensor type -> (name, elements in a block, bytes of a block), for the types that most files hold. The others are
# looked up in the `gguf` package, whose import takes 0.3 s.
_COMMON_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies.

    Attributes:
        name: Its name in the file (`blk.0.attn_q.weight`).
        shape: Slowest dimension first, as numpy has it; `[out, in]` for a linear layer.
        type_id: The ggml type, for `gguf.GGMLQuantizationType`.
        type_name: That type's name, such as `"Q4_1"`.
        offset: Bytes from the start of the file.
        num_bytes: Bytes of the stored, perhaps quantised tensor.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    num_bytes: int


class GGUFFile:
    """One memory-mapped GGUF file.

    Attributes:
        path: The file.
        metadata: All key-value pairs; arrays are lists.
        tensors: By name, in the file's order.
    """

    def __init__(self, path: str | Path):
        """Reads the header.

        Args:
            path: The file.

        Raises:
            ValueError: It is not a GGUF file of version 2 or 3, or is cut short (names the first tensor cut).
        """
        self.path = Path(path)
        with open_regular(self.path) as file:
            if os.fstat(file.fileno()).st_size < 24 or file.read(4) != b"GGUF":
                raise ValueError(f"{self.path} is not a GGUF file: it does not start with the bytes 'GGUF'")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        version, num_tensors, num_pairs = struct.unpack_from("<IQQ", self._data, 4)
        if version not in (2, 3):
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"{self.path} has GGUF version {version}{hint}; little-endian versions 2 and 3 are read")
        self.metadata: dict[str, Any] = {}
        try:
            pos = self._read_metadata(24, num_pairs)
            self.tensors = self._read_tensors(pos, num_tensors)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is truncated or damaged: its header cannot be read ({error})") from error

    def raw(self, tensor: GGUFTensor) -> np.ndarray:
        """Returns the stored bytes of a tensor, memory-mapped: `uint8[..., bytes of a row]`, read-only."""
        flat = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        rows = tensor.shape[:-1] or (1,)
        return flat.reshape(*rows, -1) if tensor.num_bytes else flat.reshape(*rows, 0)

    def release(self) -> None:
        """Drops the pages that have been read: a process is charged for them. They can be read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _read_metadata(self, pos: int, num_pairs: int) -> int:
        for _ in range(num_pairs):
            key, pos = self._string(pos)
            (kind,) = struct.unpack_from("<I", self._data, pos)
            if key in self.metadata:
                raise ValueError(f"{self.path}: metadata key {key!r} comes twice")
            self.metadata[key], pos = self._value(kind, pos + 4, key)
        return pos

    def _string(self, pos: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, pos)
        end = pos + 8 + length
        if end > len(self._data):
            raise struct.error(f"a string of {length} bytes at byte {pos}")
        return str(self._data[pos + 8 : end], "utf-8"), end

    def _strings(self, pos: int, count: int) -> tuple[list[str], int]:
        # The hot loop of start-up: hundreds of thousands of tokens and merges.
        data, unpack, size = self._data, struct.Struct("<Q").unpack_from, len(self._data)
        strings = []
        for _ in range(count):
            end = pos + 8 + unpack(data, pos)[0]
            if end > size:
                raise struct.error(f"a string at byte {pos} ends past the file")
            # Vocabularies may hold byte strings that are no valid UTF-8.
            strings.append(str(data[pos + 8 : end], "utf-8", "replace"))
            pos = end
        return strings, pos

    def _value(self, kind: int, pos: int, key: str, depth: int = 0) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(pos)
        if kind == _ARRAY:
            item_kind, count = struct.unpack_from("<IQ", self._data, pos)
            pos += 12
            if item_kind == _STRING:
                return self._strings(pos, count)
            if item_kind in _SCALARS:
                size = struct.calcsize("<" + _SCALARS[item_kind]) * count
                if pos + size > len(self._data):
                    raise struct.error(f"the array {key} of {count} items ends past the file")
                return list(struct.unpack_from(f"<{count}{_SCALARS[item_kind]}", self._data, pos)), pos + size
            if depth >= _MAX_DEPTH:
                raise ValueError(f"{self.path}: metadata key {key!r} is nested more than {_MAX_DEPTH} deep")
            values = []
            for _ in range(count):
                value, pos = self._value(item_kind, pos, key, depth + 1)
                values.append(value)
            return values, pos
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: metadata key {key!r} has unknown value type {kind}")
        layout = struct.Struct("<" + _SCALARS[kind])
        return layout.unpack_from(self._data, pos)[0], pos + layout.size

    def _read_tensors(self, pos: int, num_tensors: int) -> dict[str, GGUFTensor]:
        headers = []
        for _ in range(num_tensors):
            name, pos = self._string(pos)
            (num_dims,) = struct.unpack_from("<I", self._data, pos)
            if num_dims > _MAX_AXES:
                raise ValueError(f"{self.path} is truncated or damaged: tensor {name!r:.100} has {num_dims} axes")
            *dims, type_id, offset = struct.unpack_from(f"<{num_dims}QIQ", self._data, pos + 4)
            headers.append((name, tuple(reversed(dims)), type_id, offset))
            pos += 4 + 8 * num_dims + 12
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}, expected a positive integer")
        start = -(-pos // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in headers:
            if name in tensors:
                raise ValueError(f"{self.path}: tensor {name} comes twice")
            tensors[name] = self._tensor(name, shape, type_id, start + offset)
        position, last = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < position:
                raise ValueError(f"{self.path}: tensor {tensor.name} overlaps {last}")
            position, last = tensor.offset + tensor.num_bytes, f"tensor {tensor.name}"
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        type_name, block, block_bytes = _COMMON_TYPES.get(type_id) or _rare_type(type_id, name, self.path)
        if shape and shape[-1] % block:
            raise ValueError(
                f"{self.path}: tensor {name} has rows of {shape[-1]}, no multiple of {type_name}'s {block}"
            )
        if not shape:
            raise ValueError(f"{self.path}: tensor {name} has no axes")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > len(self._data):
            raise ValueError(
                f"{self.path} is truncated: tensor {name} should end at byte {offset + num_bytes}, but the file has "
                f"{len(self._data)} bytes; fetch it again"
            )
        return GGUFTensor(name, shape, type_id, type_name, offset, num_bytes)


def _rare_type(type_id: int, name: str, path: Path) -> tuple[str, int, int]:
    """Name, elements and bytes of a block of a tensor type outside `_COMMON_TYPES`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError as error:
        known = ", ".join(kind.name for kind in GGMLQuantizationType)
        raise ValueError(f"{path}: tensor {name} has unknown type {type_id}; known are {known}") from error
    return (kind.name, *GGML_QUANT_SIZES[kind])
