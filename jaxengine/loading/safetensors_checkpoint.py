"""Hugging Face folders: `config.json`, safetensors files and a tokenizer."""

from __future__ import annotations

import json
import logging
import math
import mmap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json")


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
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= header_size <= min(_MAX_HEADER, size - 8):
                raise ValueError(
                    f"{self.path} is truncated or no safetensors file: it has {size} bytes, and says that its header "
                    f"has {header_size}"
                )
            try:
                header: dict[str, Any] = json.loads(file.read(header_size))
                header.pop("__metadata__", None)
                self._places = {name: self._place(name, entry) for name, entry in header.items()}
            except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
                raise ValueError(f"{self.path} has a damaged header: {error}") from error
            self._start = 8 + header_size
            self._check_offsets(size - self._start)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._places)

    def get(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped and read-only."""
        dtype, shape, start, _ = self._places[name]
        return np.frombuffer(self._data, dtype, math.prod(shape), self._start + start).reshape(shape)

    def release(self) -> None:
        """Drops the pages that have been read: a process is charged for them. They can be read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _place(self, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
        try:
            kind, shape = entry["dtype"], tuple(int(dim) for dim in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the header's entry of tensor {name!r} is damaged: {entry!r}") from error
        if kind not in _DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r} has dtype {kind!r}; known are {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[kind])
        needed = math.prod(shape) * dtype.itemsize
        if any(dim < 0 for dim in shape) or end - start != needed:
            raise ValueError(
                f"{self.path}: tensor {name!r} of shape {shape} and dtype {kind} takes {needed} bytes, but its offsets "
                f"{start} to {end} hold {end - start}"
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
        self.config = read_json(self.path / "config.json")
        self.generation_config = self._generation_config()
        self._shards: dict[str, Any] = {}
        for name, shard in self._open():
            if name in self._shards:
                raise ValueError(f"tensor {name!r} is both in {self._shards[name].path} and in {shard.path}")
            self._shards[name] = shard
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()

    def tensor_names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._shards)

    def get(self, name: str) -> Any:
        """One tensor, memory-mapped and read-only; see `Checkpoint.get`."""
        if name not in self._shards:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self._shards[name].get(name)

    def release(self) -> None:
        """Gives back the memory that the mapped files take up."""
        for file in {id(file): file for file in self._shards.values()}.values():
            file.release()

    def tokenizer(self) -> Any:
        """The folder's tokenizer, by transformers' AutoTokenizer.

        Raises:
            ValueError: The folder has no tokenizer, or one that transformers cannot build.
        """
        with self._tokenizer_lock:
            if self._tokenizer is None:
                if not any((self.path / name).is_file() for name in _TOKENIZER_FILES):
                    raise ValueError(f"{self.path} has no tokenizer: it holds none of {', '.join(_TOKENIZER_FILES)}")
                try:
                    self._tokenizer = auto_tokenizer().from_pretrained(str(self.path), local_files_only=True)
                except (OSError, ImportError, KeyError) as error:
                    raise ValueError(f"the tokenizer of {self.path} cannot be built: {error}") from error
            return self._tokenizer

    def _generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
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
        """Every tensor with the file that holds it."""
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            files = [SafetensorsFile(path) for path in self._files_without_index()]
            return [(name, file) for file in files for name in sorted(file.names())]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        shards: dict[str, SafetensorsFile] = {}
        for tensor, file_name in sorted(weight_map.items()):
            if file_name not in shards:
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


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: It holds something else, or no JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def auto_tokenizer() -> Any:
    """transformers' AutoTokenizer, imported without its advice to install PyTorch, which is not needed here."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(keep)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(keep)
    return AutoTokenizer
