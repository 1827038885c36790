"""Converted models: a folder with `config.json`, a tokenizer, and the weights as an Orbax checkpoint in `orbax/`.

The checkpoint is a flat tree of Hugging Face's tensors, under their names and in their orientation, so nothing in it
depends on a mesh: the loader reads of each tensor what a device holds. Each tensor is a folder of plain Zarr 3
(https://orbax.readthedocs.io, "Checkpoint format"); TensorStore, which Orbax itself reads with, reads parts of it, and
is imported in a tenth of the time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.loading.files import read_json, typed
from jaxengine.loading.safetensors_checkpoint import HFCheckpoint
from jaxengine.loading.schemas import ArrayFile, TreeFile

WEIGHTS = "orbax"
"""The checkpoint's folder in a converted model's."""
STATE = "state"
"""Orbax's name for the folder of a checkpoint's tree."""
_NAME = re.compile(r"[\w][\w.-]*")
NUM_OPENERS = 16
"""Tensors that are opened at once: files may be far away."""


@dataclasses.dataclass(frozen=True)
class ZarrTensor:
    """A tensor, or a part of one: see `StoredTensor`.

    Attributes:
        folder: Of the tensor.
        store: What TensorStore opened.
    """

    folder: Path
    store: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self.store.shape

    @property
    def T(self) -> ZarrTensor:
        """The tensor with its axes in reverse order."""
        return ZarrTensor(self.folder, self.store.T)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ZarrTensor:
        # TensorStore counts on from where a part begins; NumPy, and we, from zero.
        return ZarrTensor(self.folder, self.store[index].translate_to[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values; raises as `read_into`."""
        out = np.empty(self.shape, dtype or self.store.dtype.numpy_dtype)
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray) -> None:
        """Reads the values into an array, in its dtype.

        Raises:
            ValueError: A file is missing or damaged (names the tensor and, in TensorStore's words, the file).
        """
        import tensorstore

        values = tensorstore.cast(self.store, out.dtype.name)
        try:
            tensorstore.array(out).write(values).result()
        except Exception as error:  # whatever TensorStore raises for what it finds
            raise ValueError(
                f"tensor {self.folder.name!r} of {self.folder.parents[1]} cannot be read: {_reason(error)}"
            ) from error


class ZarrTensors:
    """All tensors of an Orbax checkpoint, opened; the part of `SafetensorsFile` in a folder."""

    def __init__(self, path: Path):
        """Opens every tensor, and reads none.

        Args:
            path: The checkpoint's folder.

        Raises:
            ValueError: It is no checkpoint, or an incomplete one.
        """
        self.path = path
        for name in ("_CHECKPOINT_METADATA", f"{STATE}/_METADATA"):
            if not (path / name).is_file():
                raise ValueError(f"{path} is no complete Orbax checkpoint: it has no {name}; convert the model again")
        tree = path / STATE / "_METADATA"
        entries = typed(read_json(tree), TreeFile, tree).tree_metadata.values()
        names = [".".join(part.key for part in entry.key_metadata) for entry in entries]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{tree}: {name[:200]!r} is no name of a tensor")
        with ThreadPoolExecutor(NUM_OPENERS) as pool:
            self._tensors = dict(zip(names, pool.map(self._open, names), strict=True))

    def names(self) -> set[str]:
        """Returns all tensors."""
        return set(self._tensors)

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(tensor.shape) for tensor in self._tensors.values())

    def get(self, name: str) -> Any:
        """Returns one tensor, of which parts can be taken before anything is read."""
        return self._tensors[name]

    def release(self) -> None:
        """Does nothing: nothing is mapped."""

    def _open(self, name: str) -> ZarrTensor:
        import tensorstore

        folder = self.path / STATE / name
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "fill_missing_data_reads": False,  # or parts whose file is missing would be zeros
            "context": {"file_io_mode": {"mode": "memmap"}},  # saves a copy
        }
        try:
            _check_array(folder / "zarr.json")
            return ZarrTensor(folder, tensorstore.open(spec, read=True).result())
        except Exception as error:  # whatever TensorStore raises for what it finds
            raise ValueError(f"tensor {name!r} of {self.path} cannot be opened: {_reason(error)}") from error


class OrbaxCheckpoint(HFCheckpoint):
    """The checkpoint of a converted model: see `Checkpoint`. Tensors are read part by part, by `ZarrTensor`."""

    def _open(self) -> list[tuple[str, Any]]:
        tensors = ZarrTensors(self.path / WEIGHTS)
        return [(name, tensors) for name in sorted(tensors.names())]


def _check_array(path: Path) -> None:
    """Raises ValueError if chunks of an array are larger than it: TensorStore allocates what they say."""
    array = typed(read_json(path), ArrayFile, path)
    parts = [array.chunk_grid, *array.codecs]
    while parts:
        part = parts.pop().configuration
        if part is None:
            continue
        parts += part.codecs or []
        if part.chunk_shape is not None and (
            len(part.chunk_shape) != len(array.shape)
            or any(chunk > size for chunk, size in zip(part.chunk_shape, array.shape, strict=True))
        ):
            raise ValueError(f"{path}: chunks of {part.chunk_shape} do not fit an array of {array.shape}")


def _reason(error: Exception) -> str:
    """Returns the first line of TensorStore's message, without the places in its source."""
    return str(error).split(" [source locations=")[0].split(" [tensorstore_spec=")[0].splitlines()[0]
