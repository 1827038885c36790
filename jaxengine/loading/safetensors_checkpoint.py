"""Hugging Face folders: `config.json`, safetensors files and a tokenizer."""

from __future__ import annotations

import logging
import math
import mmap
import os
import re
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from jaxengine.loading.files import check_folder, one_line, open_regular, read_bytes, read_json, reading, typed
from jaxengine.loading.schemas import ConfigFile, GenerationFile, IndexFile, TensorEntry, TokenizerFile

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_TENSORS = 200_000
_MAX_AXES = 8
_MAX_TOKENIZER_BYTES = 256 * 2**20
_FILE_NAME = re.compile(r"[^/\\\0]{1,250}\.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json")


class SafetensorsFile:
    """One memory-mapped safetensors file (https://huggingface.co/docs/safetensors).

    Attributes:
        path: The file.
    """

    def __init__(self, path: str | Path):
        """Reads and checks the header.

        Args:
            path: The file.

        Raises:
            ValueError: The file is cut short or damaged (names the first tensor that is affected).
        """
        self.path = Path(path)
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= header_size <= min(_MAX_HEADER, size - 8):
                raise ValueError(
                    f"{self.path} is truncated or no safetensors file: it has {size} bytes, and says that its header "
                    f"has {header_size}"
                )
            self._places = self._read_header(file.read(header_size))
            self._start = 8 + header_size
            self._check_offsets(size - self._start)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for _, shape, _, _ in self._places.values())

    def names(self) -> set[str]:
        """Returns all tensors."""
        return set(self._places)

    def get(self, name: str) -> np.ndarray:
        """Returns one tensor, memory-mapped and read-only."""
        dtype, shape, start, _ = self._places[name]
        return np.frombuffer(self._data, dtype, math.prod(shape), self._start + start).reshape(shape)

    def release(self) -> None:
        """Drops the pages that have been read: a process is charged for them. They can be read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _read_header(self, text: bytes) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
        """Dtype, shape, and first and last offset of each tensor."""
        try:
            header = msgspec.json.decode(text.rstrip(b" "), type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path} has a damaged header: {one_line(error)}") from error
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"{self.path} has {len(header)} tensors; at most {_MAX_TENSORS} are read")
        decode = msgspec.json.Decoder(TensorEntry).decode
        places = {}
        for name, data in header.items():
            try:
                places[name] = self._place(name, decode(data))
            except (msgspec.DecodeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: the header's entry of tensor {name!r} is damaged: {one_line(error)}"
                ) from error
        return places

    def _place(self, name: str, entry: TensorEntry) -> tuple[np.dtype, tuple[int, ...], int, int]:
        shape, (start, end) = tuple(entry.shape), entry.data_offsets
        if len(shape) > _MAX_AXES:
            raise ValueError(f"{self.path}: tensor {name!r} has {len(shape)} axes; at most {_MAX_AXES} are read")
        if entry.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ValueError(f"{self.path}: tensor {name!r} has dtype {entry.dtype[:40]!r}; known are {known}")
        dtype = np.dtype(_DTYPES[entry.dtype])
        needed = math.prod(shape) * dtype.itemsize
        if end - start != needed:
            raise ValueError(
                f"{self.path}: tensor {name!r} of shape {shape} and dtype {entry.dtype} takes {needed} bytes, but its "
                f"offsets {start} to {end} hold {end - start}"
            )
        return dtype, shape, start, end

    def _check_offsets(self, available: int) -> None:
        """Tensors must follow each other without gap or overlap, up to the end of the file."""
        position, last = 0, "the header"
        for name, (_, _, start, end) in sorted(self._places.items(), key=lambda item: item[1][2:]):
            if start != position:
                fault = "overlaps" if start < position else "leaves a gap after"
                raise ValueError(
                    f"{self.path}: tensor {name!r} at offset {start} {fault} {last}, which ends at {position}"
                )
            position, last = end, f"tensor {name!r}"
            if end > available:
                raise ValueError(
                    f"{self.path} is truncated: tensor {name!r} should end at byte {self._start + end}, but the file "
                    f"has {self._start + available} bytes; fetch it again"
                )
        if position != available:
            raise ValueError(f"{self.path} has {available - position} bytes after its last tensor: it is damaged")


class HFCheckpoint:
    """The checkpoint of a Hugging Face folder, in one file or in shards: see `Checkpoint`."""

    def __init__(self, path: str | Path):
        """Reads the configuration and the headers of all shards; no weights.

        Args:
            path: The folder.

        Raises:
            ValueError: The folder holds no model, or a damaged or incomplete one.
        """
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{self.path} is not a model: it has no config.json")
        check_folder(self.path)
        self.config = read_config(self.path / "config.json")
        self.generation_config = self._generation_config()
        self._shards: dict[str, Any] = {}
        for name, shard in self._open():
            if name in self._shards:
                raise ValueError(f"tensor {name!r} is both in {self._shards[name].path} and in {shard.path}")
            self._shards[name] = shard
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()

    def tensor_names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._shards)

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(file.num_elements for file in {id(file): file for file in self._shards.values()}.values())

    def get(self, name: str) -> Any:
        """Returns one tensor, memory-mapped and read-only; see `Checkpoint.get`."""
        if name not in self._shards:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self._shards[name].get(name)

    def release(self) -> None:
        """Gives back the memory that the mapped files take up."""
        for file in {id(file): file for file in self._shards.values()}.values():
            file.release()

    def tokenizer(self) -> Any:
        """Returns the folder's tokenizer, by transformers' AutoTokenizer.

        Raises:
            ValueError: The folder has no tokenizer, or one that transformers cannot build.
        """
        with self._tokenizer_lock:
            if self._tokenizer is None:
                if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
                    raise ValueError(f"{self.path} has no tokenizer: it holds none of {', '.join(TOKENIZER_FILES)}")
                self._tokenizer = open_tokenizer(str(self.path), is_local=True)
            return self._tokenizer

    def _generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        typed(generation, GenerationFile, path)
        # Multimodal models keep the language model's configuration one level down.
        configs = (generation, self.config, self.config.get("text_config") or {})
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = next((config[key] for config in configs if config.get(key) is not None), None)
            if value is not None:
                generation[key] = value
        if "eos_token_id" in generation:
            eos = generation["eos_token_id"]
            generation["eos_token_id"] = eos if isinstance(eos, list) else [eos]
        return generation

    def _open(self) -> list[tuple[str, Any]]:
        """Returns every tensor with the file that holds it."""
        index = self.path / "model.safetensors.index.json"
        # A whole file goes before an index, as in transformers: the index is a leftover then.
        if not index.is_file() or (self.path / "model.safetensors").is_file():
            files = [SafetensorsFile(path) for path in self._files_without_index()]
            return [(name, file) for file in files for name in sorted(file.names())]
        weight_map = typed(read_json(index), IndexFile, index).weight_map
        if not weight_map:
            raise ValueError(f"{index} has no weight_map")
        shards: dict[str, SafetensorsFile] = {}
        for tensor, file_name in sorted(weight_map.items()):
            if file_name not in shards:
                if not _FILE_NAME.fullmatch(file_name):
                    raise ValueError(f"{index}: {file_name[:200]!r} is no name of a file beside it")
                path = self.path / file_name
                if not path.is_file():
                    raise ValueError(f"{path} is missing: {index.name} says that it holds tensor {tensor!r}")
                shards[file_name] = SafetensorsFile(path)
            if tensor not in shards[file_name].names():
                raise ValueError(f"{shards[file_name].path} lacks tensor {tensor!r}, which {index.name} says it holds")
        return [(tensor, shards[file_name]) for tensor, file_name in weight_map.items()]

    def _files_without_index(self) -> list[Path]:
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        # Mistral's own format and adapters lie beside the model, under other tensor names.
        skipped = ("consolidated", "adapter_")
        files = sorted(path for path in self.path.glob("*.safetensors") if not path.name.startswith(skipped))
        for path in files:
            if "-of-" in path.name:
                raise ValueError(f"{self.path} has shards such as {path.name}, but no model.safetensors.index.json")
        if not files:
            others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.path.glob(pattern))
            hint = f"; convert {others[0]} to safetensors" if others else ""
            raise ValueError(f"{self.path} has a config.json, but no weights (*.safetensors){hint}")
        return files


def read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`.

    Raises:
        ValueError: It is none, or a field that we use has a wrong type or is out of bounds.
    """
    config = read_json(path)
    typed(config, ConfigFile, path)
    return config


def open_tokenizer(name: str, *, is_local: bool = False) -> Any:
    """Opens a tokenizer by transformers' AutoTokenizer. Code that comes with it is never run.

    Args:
        name: A folder or a hub id.
        is_local: Fetch nothing.

    Raises:
        ValueError: There is none, or one that cannot be built, or that needs code of its own.
    """
    folder = Path(name)
    if folder.is_dir():
        for path in folder.glob("*.json"):
            if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab")):
                read_bytes(path, _MAX_TOKENIZER_BYTES)
        if (about := folder / "tokenizer_config.json").exists():
            typed(read_json(about), TokenizerFile, about)
    with reading(f"the tokenizer of {name}"):
        return _auto_tokenizer().from_pretrained(name, local_files_only=is_local, trust_remote_code=False)


def _auto_tokenizer() -> Any:
    """Returns AutoTokenizer, imported without transformers' advice to install PyTorch, which is not needed here."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(keep)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(keep)
    return AutoTokenizer
