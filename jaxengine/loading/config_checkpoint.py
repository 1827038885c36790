"""A model of which only the configuration is there: for `load_format="dummy"`, which makes the weights up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.loading.safetensors_checkpoint import read_config


class ConfigCheckpoint:
    """A `config.json` without weights: see `Checkpoint`."""

    def __init__(self, path: str | Path):
        """Reads the configuration.

        Args:
            path: A `.json` file in the form of Hugging Face's `config.json`, or a folder with a `config.json`.

        Raises:
            ValueError: There is no such file, or it holds no JSON object.
        """
        self.path = Path(path)
        file = self.path / "config.json" if self.path.is_dir() else self.path
        if not file.is_file():
            raise ValueError(f"{self.path} is not a model: it has no config.json")
        config = read_config(file)
        self.config: dict[str, Any] = config
        self.generation_config: dict[str, Any] = {}
        eos = config.get("eos_token_id")
        if eos is not None:
            self.generation_config["eos_token_id"] = eos if isinstance(eos, list) else [eos]

    def tensor_names(self) -> set[str]:
        """Always empty."""
        return set()

    @property
    def num_elements(self) -> None:
        """None: nobody knows."""

    def get(self, name: str) -> np.ndarray:
        """Always raises ValueError."""
        raise ValueError(f'{self.path} has no tensor {name!r}: it has no weights, only load_format="dummy" works')

    def release(self) -> None:
        """Does nothing: no weights are mapped."""

    def tokenizer(self) -> Any:
        """Returns the tokenizer that lies beside the configuration.

        Raises:
            ValueError: There is none.
        """
        from jaxengine.loading.safetensors_checkpoint import TOKENIZER_FILES, open_tokenizer

        if self.path.is_dir() and any((self.path / name).is_file() for name in TOKENIZER_FILES):
            return open_tokenizer(str(self.path), is_local=True)
        raise ValueError(f"{self.path} has no tokenizer: set skip_tokenizer_init=True, or name a tokenizer")
