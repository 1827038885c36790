"""Command-line flags made from the fields of dataclasses, so that flags and fields cannot drift apart."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxengine.engine_args import EngineArgs
from jaxengine.sampling_params import SamplingParams

SET_BY_COMMAND = ("output_kind",)
"""Fields of `SamplingParams` that a command decides."""


def add_engine_flags(parser: argparse.ArgumentParser, notes: Mapping[str, str] | None = None, skip: str = "") -> None:
    """Adds a flag for every field of `EngineArgs` that a shell can express.

    Args:
        parser: Gains a group of flags.
        notes: What to say about a field's default where a command has its own.
        skip: A field that another group has already (`seed` belongs to the sampling flags too).
    """
    group = parser.add_argument_group("engine", "The fields of EngineArgs, as for LLM(...) in Python.")
    add_flags(group, EngineArgs, notes or {}, {skip})


def add_sampling_flags(parser: argparse.ArgumentParser, notes: Mapping[str, str]) -> None:
    """Adds a flag for every field of `SamplingParams` that a shell can express."""
    group = parser.add_argument_group("sampling", "The fields of SamplingParams.")
    add_flags(group, SamplingParams, notes, SET_BY_COMMAND)


def engine_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `EngineArgs` that were given."""
    return _given(args, EngineArgs)


def sampling_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `SamplingParams` that were given."""
    return _given(args, SamplingParams)


def add_flags(group: Any, cls: type, notes: Mapping[str, str], skip: Collection[str]) -> None:
    """Adds `--field-name` for every field of a dataclass whose type a shell can express.

    Flags have no defaults: a namespace holds what was given, and the dataclass knows its defaults. Lists are given by
    repeating the flag, `None` by the word "none".

    Args:
        group: A parser, or a group of one.
        cls: The dataclass; the help texts are the "Attributes:" of its docstring.
        notes: By field: what to say of the default instead of the field's own.
        skip: Fields without a flag.
    """
    hints = typing.get_type_hints(cls)
    docs = attribute_docs(cls)
    for field in dataclasses.fields(cls):
        options = _options(hints[field.name]) if field.init and field.name not in skip else None
        if options is None:
            continue
        default = notes.get(field.name) or ("none" if field.default is None else str(field.default))
        text = f"{docs.get(field.name, '')} (default: {default})".replace("%", "%%").strip()
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **options)


def attribute_docs(cls: type) -> dict[str, str]:
    """Returns the texts of the "Attributes:" section of a class's docstring, by name, each on one line."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]  # the next section is not indented
    entries = re.split(r"\n {4}(?=\S)", "\n" + section)[1:]
    parts = (entry.partition(":") for entry in entries)
    return {name.strip(): " ".join(text.split()) for name, _, text in parts}


def _options(hint: Any) -> dict[str, Any] | None:
    """Returns what argparse needs for a field of this type; None for types that a shell cannot express."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_optional = type(None) in choices
    for choice in choices:
        if typing.get_origin(choice) is list and typing.get_args(choice)[0] in (int, str):
            element = typing.get_args(choice)[0]
            return {"action": "append", "type": element, "metavar": _metavar(element)}
    for choice in choices:
        if choice in (int, float, str):
            return {"type": _optional(choice) if is_optional else choice, "metavar": _metavar(choice)}
    if bool in choices:
        return {"action": argparse.BooleanOptionalAction}
    return None


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _optional(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def _given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(cls))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
