"""How a model's files are opened and read: regular files only, of bounded size, and every failure told in a line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from jaxengine.messages import shorten

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 * 2**20
"""Of a configuration, an index, or metadata."""
MAX_MESSAGE = 300
_NO_BLOCK = getattr(os, "O_NONBLOCK", 0)  # a FIFO would wait for a writer


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turns whatever a library raises for what it finds in a file into a ValueError of one line.

    Args:
        what: The file or folder, for the message.

    Raises:
        ValueError: Something could not be read.
    """
    try:
        yield
    except ValueError as error:
        if "\n" in str(error):
            raise ValueError(one_line(error)) from error
        raise
    except BaseException as error:
        # Rust libraries panic with a class of their own, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        logger.debug("%s cannot be read", what, exc_info=True)
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns what an error says, in a line of bounded length."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, MAX_MESSAGE)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        ValueError: It is not there, cannot be read, or is something else than a file, such as a FIFO or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_BLOCK | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # a name may hold what no name may
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{str(path)[:MAX_MESSAGE]} cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def check_folder(path: Path) -> None:
    """Raises ValueError if a model's folder holds what has no end, or nobody writes: devices, FIFOs, sockets."""
    for entry in path.iterdir():
        with contextlib.suppress(OSError):  # a link to nowhere is as good as no file
            mode = entry.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{entry} is no regular file")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Reads a whole file.

    Raises:
        ValueError: See `open_regular`; or it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{path} has {size} bytes; at most {max_bytes} are read")
        return file.read(max_bytes + 1)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: See `read_bytes`; or it holds something else, or no JSON.
    """
    data = read_bytes(path, max_bytes)
    try:
        value = json.loads(data.decode())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def typed[T](value: Any, kind: type[T], where: str | Path) -> T:
    """Reads what JSON gave as a type, a msgspec Struct for example.

    Raises:
        ValueError: It is not of this type: names the field, what it should be, and what it is.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        message, _, place = one_line(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        raise ValueError(f"{where}: {field + ': ' if field else ''}{message[:1].lower()}{message[1:]}") from error
