"""What a checkpoint offers to the model loader, whatever its file format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


class StoredTensor(Protocol):
    """A tensor that stays where it is stored until it is known which part of it is wanted, and where."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def T(self) -> StoredTensor: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> StoredTensor: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...
    def read_into(self, out: np.ndarray) -> None:
        """Reads the values into an array of the same shape, in its dtype.

        Raises:
            ValueError: They cannot be read (names the tensor and the file).
        """
        ...


Tensor = np.ndarray | StoredTensor


@runtime_checkable
class Checkpoint(Protocol):
    """Weights, configuration and tokenizer of one model, in Hugging Face's names and orientation.

    Attributes:
        path: The folder or file that the checkpoint is read from, for error messages.
        config: The model configuration in the form of Hugging Face's `config.json`.
        generation_config: The form of `generation_config.json`; `eos_token_id` is a list where present.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def tensor_names(self) -> set[str]:
        """Names of all tensors, as in a Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`)."""
        ...

    def get(self, name: str) -> Tensor:
        """Reads one tensor; linear weights are `[out, in]`.

        Args:
            name: One of `tensor_names()`.

        Returns:
            The tensor as float32, float16 or `ml_dtypes.bfloat16`, read-only and memory-mapped where the file allows,
            or left where it is stored. Safe to call from several threads at once.

        Raises:
            ValueError: The checkpoint has no such tensor (names the tensor and the file).
        """
        ...

    def release(self) -> None:
        """Gives back the memory that the mapped files take up; tensors can be read again."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer: a transformers fast tokenizer, or an object with the same methods; the same one each call."""
        ...
