"""Damaged converted models: Orbax's metadata, and that of its arrays."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.models.malformed.cases import CONTENTS, VALUES, put, write_model

ARRAY = "orbax/state/model.embed_tokens.weight/zarr.json"


@functools.cache
def _converted() -> Path:
    from jaxengine.loading.convert import convert
    from jaxengine.loading.resolve import resolve_model

    folder = Path(tempfile.mkdtemp(prefix="converted-"))
    (folder / "source").mkdir()
    write_model(folder / "source", tokenizer=True)
    convert(resolve_model(folder / "source"), folder / "out")
    return folder / "out"


def copy_converted(folder: Path) -> None:
    """Copies a whole converted model into an empty folder."""
    shutil.copytree(_converted(), folder, dirs_exist_ok=True)


TREE = "orbax/state/_METADATA"
HUGE = {"10^12": "[1000000000000, 1000000000000]", "minus": "[-1, -1]", "zero": "[0, 0]", "one": "[1]", "text": '["a"]'}
ORBAX: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    **{f"tree {name}": (TREE, lambda data, content=content: content) for name, content in CONTENTS.items()},
    **{f"array {name}": (ARRAY, lambda data, content=content: content) for name, content in CONTENTS.items()},
    **{f"tree_metadata {v}": (TREE, put("tree_metadata", VALUES[v])) for v in VALUES},
    **{f"key_metadata {v}": (TREE, put("key_metadata", VALUES[v])) for v in VALUES},
    "key above": (TREE, put("key", '"../../x"')),
    "key absolute": (TREE, put("key", '"/etc"')),
    **{f"chunk_shape {name}": (ARRAY, put("chunk_shape", value)) for name, value in HUGE.items()},
    **{f"shape {name}": (ARRAY, put("shape", value)) for name, value in HUGE.items()},
    **{f"data_type {v}": (ARRAY, put("data_type", VALUES[v])) for v in VALUES},
    **{f"codecs {v}": (ARRAY, put("codecs", VALUES[v])) for v in VALUES},
    "chunk of noise": ("orbax/state/model.embed_tokens.weight/c/*/*", lambda data: bytes(range(256)) * 40),
    "empty chunk": ("orbax/state/model.embed_tokens.weight/c/*/*", lambda data: b""),
}
