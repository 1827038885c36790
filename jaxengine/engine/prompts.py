"""Every form that a prompt may have, made one: `Prompt`."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from jaxengine.messages import quote


class PromptDict(TypedDict, total=False):
    """A prompt as a dict: "prompt" or "prompt_token_ids", or both (then the text is only kept for the output)."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: The text; None if only token ids are given.
        token_ids: The token ids; None if the text is to be tokenised.
        cache_salt: Cached pages are shared only with requests of the same salt.
        add_special_tokens: Whether tokenising adds BOS and the like (a rendered chat has them in its text).
    """

    text: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None
    add_special_tokens: bool = True


PromptInput = str | Sequence[int] | PromptDict | Prompt


def normalize_prompts(prompts: PromptInput | Sequence[PromptInput]) -> list[Prompt]:
    """Turns one prompt or many, each text, token ids or a dict, into a list.

    A list of integers is one prompt of token ids; any other list (or tuple) is several prompts.

    Raises:
        ValueError: Something in it is no prompt.
    """
    if isinstance(prompts, (str, Mapping, Prompt)) or _is_token_list(prompts):
        return [normalize_prompt(prompts)]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray)):
        raise ValueError(f"prompt must be {_ACCEPTED}, or a list of these, got {quote(prompts)}")
    return [at(f"prompts[{i}]", normalize_prompt, prompt) for i, prompt in enumerate(prompts)]


_ACCEPTED = 'a string, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


def _is_token_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], numbers.Integral)


def normalize_prompt(prompt: Any) -> Prompt:
    """Returns a prompt of any form as a `Prompt`; raises ValueError for what is none."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, Mapping):
        return _normalize_dict(prompt)
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return Prompt(token_ids=_checked_token_ids(prompt))
    raise ValueError(f"prompt must be {_ACCEPTED}, got {quote(prompt)}")


def _normalize_dict(prompt: Mapping[str, Any]) -> Prompt:
    unknown = [key for key in prompt if key not in ("prompt", "prompt_token_ids", "cache_salt")]
    if unknown:
        raise ValueError(
            f'a prompt dict may hold "prompt", "prompt_token_ids" and "cache_salt", got key {quote(unknown[0])}'
        )
    text, token_ids, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if text is None and token_ids is None:
        raise ValueError(f'a prompt dict must hold "prompt" or "prompt_token_ids", got {quote(dict(prompt))}')
    if text is not None and not isinstance(text, str):
        raise ValueError(f'"prompt" must be a string, got {quote(text)}')
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f'"cache_salt" must be a string that is not empty, got {quote(salt)}')
    return Prompt(text, None if token_ids is None else _checked_token_ids(token_ids), salt)


def _checked_token_ids(values: Any) -> list[int]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {quote(values)}")
    token_ids = list(values)
    # Prompts are long: one look at all the types, and at each value only if there is any but int.
    if set(map(type, token_ids)) <= {int}:
        return token_ids
    for value in token_ids:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
            raise ValueError(f"prompt_token_ids must be a list of integers, got {quote(value)} in it")
    return [int(value) for value in token_ids]


def at[**P, R](where: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function; a ValueError's message then begins with the place it is about."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
