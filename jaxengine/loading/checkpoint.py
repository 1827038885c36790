"""What a checkpoint offers to the model loader, whatever its file format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from jaxengine.models.config import ModelConfig


class StoredTensor(Protocol):
    """A tensor that stays where it is stored until it is known which part of it is wanted, and where."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        ...

    @property
    def T(self) -> StoredTensor:
        """The tensor with its axes in reverse order."""
        ...

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


def check_size(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Checks that a configuration describes no more than the files hold, before anything is allocated for it.

    Raises:
        ValueError: The matrices of its layers alone have more numbers than all tensors together.
    """
    held = checkpoint.num_elements
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    needed = config.num_layers * config.hidden_size * (heads + 2 * config.intermediate_size)
    if held is not None and needed > held:
        raise ValueError(
            f"the configuration of {checkpoint.path} describes layers of {needed} parameters; its files hold {held}"
        )


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
        """Returns names of all tensors, as in a Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`)."""
        ...

    @property
    def num_elements(self) -> int | None:
        """Numbers in all tensors together; None if there are none to be counted."""
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
        """Returns the tokenizer.

        It is a transformers fast tokenizer, or an object with the same methods; the same one each call.
        """
        ...
