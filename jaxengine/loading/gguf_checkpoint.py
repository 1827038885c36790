"""A GGUF file as a checkpoint in Hugging Face's names, orientation and configuration."""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxengine.loading import gguf_families
from jaxengine.loading.dequantize import dequantize
from jaxengine.loading.files import reading, typed
from jaxengine.loading.gguf_file import GGUFFile, GGUFTensor
from jaxengine.loading.gguf_tokenizer import check_tokens, end_of_generation_ids, gguf_tokenizer
from jaxengine.loading.schemas import ConfigFile

_PLAIN_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class GGUFCheckpoint:
    """The checkpoint of one GGUF file (or of all parts of a split one): see `Checkpoint`.

    Quantised tensors come as bfloat16, rounded to nearest even; F32, F16 and BF16 tensors as they are stored.
    """

    def __init__(self, path: str | Path):
        """Reads the header; no weights.

        Args:
            path: The file, or the first part of a split one.

        Raises:
            ValueError: No GGUF file, a truncated one, an unsupported architecture or tensor.
        """
        self.path = Path(path)
        files = [GGUFFile(part) for part in _parts(self.path)]
        self._metadata = files[0].metadata
        tensors = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
        metadata = gguf_families.Metadata(self._metadata, self.path)
        self._family = gguf_families.family_of(metadata, self.path)
        try:
            shapes = {name: tensor.shape for name, (_, tensor) in tensors.items()}
            self.config = gguf_families.hf_config(metadata, self._family, shapes)
            typed(self.config, ConfigFile, "its metadata")
            self._tensors: dict[str, tuple[GGUFFile, GGUFTensor]] = {}
            for name, place in tensors.items():
                if (hf_name := gguf_families.hf_name(name, self._family)) is not None:
                    self._tensors[hf_name] = place
            if "rope_freqs.weight" in tensors:
                factors = _plain(*tensors["rope_freqs.weight"]).astype(np.float32)
                theta, head_dim = self.config["rope_theta"], self.config["head_dim"]
                self.config["rope_scaling"] = gguf_families.llama3_scaling(factors, theta, head_dim)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        check_tokens(self._metadata, self.path)
        self._add_ids_and_dtype()
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()

    def tensor_names(self) -> set[str]:
        """Returns the names of all tensors, as in a Hugging Face checkpoint."""
        return set(self._tensors)

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(tensor.shape) for _, tensor in self._tensors.values())

    def get(self, name: str) -> np.ndarray:
        """Reads, dequantises and reorders one tensor; see `Checkpoint.get`. Call it from several threads."""
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        file, tensor = self._tensors[name]
        family = self._family
        if family.permuted and re.search(r"\.[qk]_proj\.", name):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            return self._rope_rows(file, tensor, heads)
        if family.norm_offset and name.endswith("norm.weight"):
            return _read(file, tensor).astype(np.float32) - np.float32(family.norm_offset)
        return _read(file, tensor)

    def release(self) -> None:
        """Gives back the memory that the mapped files take up."""
        for file in {id(file): file for file, _ in self._tensors.values()}.values():
            file.release()

    def tokenizer(self) -> Any:
        """Returns the tokenizer of the file's own metadata; the same object each call."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                with reading(f"the tokenizer of {self.path}"):
                    self._tokenizer = gguf_tokenizer(self._metadata, self.path)
            return self._tokenizer

    def _rope_rows(self, file: GGUFFile, tensor: GGUFTensor, heads: int) -> np.ndarray:
        """Reads q or k, whose rows alternate between the two halves of a head, in Hugging Face's order of rows."""
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise ValueError(f"{self.path}: tensor {tensor.name} has {rows} rows, no multiple of 2 x {heads} heads")
        order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
        if len(tensor.shape) == 1:
            return _read(file, tensor)[order]
        # Rows are quantised one by one: it is cheapest to reorder their bytes.
        return _read(file, tensor, file.raw(tensor)[order])

    def _add_ids_and_dtype(self) -> None:
        prefix = "tokenizer.ggml."
        ids = {
            f"{name}_token_id": self._metadata[f"{prefix}{key}_token_id"]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            if f"{prefix}{key}_token_id" in self._metadata
        }
        self.config.update(ids)
        types = {tensor.type_name for _, tensor in self._tensors.values() if len(tensor.shape) > 1}
        self.config["dtype"] = {"F32": "float32", "F16": "float16"}.get(
            types.pop() if len(types) == 1 else "", "bfloat16"
        )
        self.generation_config: dict[str, Any] = dict(ids)
        self.generation_config["eos_token_id"] = end_of_generation_ids(self._metadata)


def _read(file: GGUFFile, tensor: GGUFTensor, raw: np.ndarray | None = None) -> np.ndarray:
    """Returns a tensor's values, from `raw` (its bytes, rows perhaps reordered) where given."""
    if tensor.type_name in _PLAIN_DTYPES:
        return _plain(file, tensor, raw)
    try:
        return dequantize(file.raw(tensor) if raw is None else raw, tensor.type_name, tensor.shape)
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor {tensor.name}: {error}") from error


def _plain(file: GGUFFile, tensor: GGUFTensor, raw: np.ndarray | None = None) -> np.ndarray:
    if tensor.type_name not in _PLAIN_DTYPES:
        raise ValueError(f"{file.path}: tensor {tensor.name} has type {tensor.type_name}, expected F32, F16 or BF16")
    raw = file.raw(tensor) if raw is None else raw
    return raw.view(_PLAIN_DTYPES[tensor.type_name]).reshape(tensor.shape)


def _parts(path: Path) -> list[Path]:
    """Returns all parts of a split file, whose names end in `-00001-of-00003.gguf`.

    Raises:
        ValueError: A part is missing.
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{index:05d}-of-{match[3]}.gguf") for index in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{path} is part of a model of {count} files, of which {part.name} is missing")
    return parts
