"""Writes a model in the form that loads fastest and onto any mesh: see `orbax_checkpoint`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.orbax_checkpoint import WEIGHTS

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
PIECE_BYTES = 2**29
"""Tensors are handed to Orbax in pieces of about this size, of which the host holds two copies."""
CHUNK_BYTES = 2**24
"""Of a tensor's files, at most: what a device reads of a tensor is rounded up to whole files."""
SUFFIX = ".incomplete"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Beside the weights: the tokenizer, in whatever form, and how to generate. As they are."""
NOT_COPIED = ("config.json", "model.safetensors.index.json")


def convert(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Writes a model to a folder, all of it or nothing.

    What is being written lies beside the folder, under its name and `SUFFIX`, and gets its name when it is complete;
    what an interrupted conversion left there is written over.

    Args:
        checkpoint: The model.
        out: The folder, which is made; it may be there if it is empty.
        dtype: Of all floating-point tensors; "auto" leaves each as it is.
        overwrite: Also write over a converted model.
        progress: Is told how far it is.

    Returns:
        Bytes of the weights.

    Raises:
        ValueError: A wrong dtype or folder, a tensor that cannot be read, or no tokenizer to be written.
        OSError: The folder cannot be written, or the disk is full.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    out = out.absolute()
    _check_out(out, overwrite)
    temporary = out.with_name(out.name + SUFFIX)
    with _reserved(temporary), _explained(out):
        num_bytes = _write_weights(checkpoint, temporary / WEIGHTS, dtype, progress)
        _write_rest(checkpoint, temporary, dtype)
        old = out.with_name(out.name + ".old" + SUFFIX)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return num_bytes


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be made: there is no folder {out.parent}")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder that is not there yet")
    if not any(out.iterdir()):
        return
    if not (out / WEIGHTS).is_dir():
        raise ValueError(f"{out} is not empty, and no converted model: nothing is written over it")
    if not overwrite:
        raise ValueError(f"{out} holds a converted model already: --overwrite replaces it")


@contextlib.contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """An empty folder that no other conversion writes to, and that an error removes.

    Raises:
        ValueError: Another one does.
    """
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the lock goes with the process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being written by another conversion") from error
        _clear(folder)
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # Orbax may still be writing
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on a full disk into an OSError that says so."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            free = shutil.disk_usage(out.parent).free
            raise OSError(f"the disk of {out.parent} is full ({free / 1e9:.1f} GB are free now)") from error
        raise


def _write_weights(checkpoint: Checkpoint, folder: Path, dtype: str, progress: Callable[[str], None]) -> int:
    import orbax.checkpoint.experimental.v1 as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of what is meant, and logs what it raises
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False  # a folder for each tensor: what is damaged has a name
    saving.use_compression = False  # weights hardly shrink, and loading is bound by the processor
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    names = sorted(checkpoint.tensor_names())
    written = 0
    with context:
        piece: dict[str, np.ndarray] = {}
        for number, name in enumerate(names, 1):
            piece[name] = _converted(np.asarray(checkpoint.get(name)), dtype)
            size = sum(tensor.nbytes for tensor in piece.values())
            if size >= PIECE_BYTES or number == len(names):
                if size > shutil.disk_usage(folder.parent).free:  # Orbax would print hundreds of lines first
                    raise OSError(errno.ENOSPC, "No space left")
                ocp.partial.save(str(folder), piece)
                checkpoint.release()
                written, piece = written + size, {}
                progress(f"{number} of {len(names)} tensors, {written / 1e9:.1f} GB written ...")
        ocp.partial.finalize(str(folder))
    return written


def _converted(tensor: np.ndarray, dtype: str) -> np.ndarray:
    is_float = tensor.dtype in DTYPES.values() or tensor.dtype == np.float64
    return tensor.astype(DTYPES[dtype], copy=False) if dtype != "auto" and is_float else tensor


def _write_rest(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Writes the configuration, and the tokenizer; by itself where the source has it in no files."""
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    config["dtype"] = stored if dtype == "auto" else dtype
    _write_json(folder / "config.json", config)
    if checkpoint.path.is_dir():
        files = {path for pattern in COPIED for path in checkpoint.path.glob(pattern) if path.name not in NOT_COPIED}
        for path in files:
            shutil.copyfile(path, folder / path.name)
        templates = checkpoint.path / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, folder / templates.name)
    else:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
        _write_tokenizer(checkpoint.tokenizer(), folder)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a `LightTokenizer` in the form of transformers."""
    from transformers import PreTrainedTokenizerFast

    named = tokenizer.special_tokens_map
    others = [token for token in tokenizer.all_special_tokens if token not in named.values()]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        additional_special_tokens=others,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    ).save_pretrained(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
