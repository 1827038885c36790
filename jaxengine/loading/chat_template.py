"""Renders chat templates as transformers does, without importing it (3 s)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

# Marks where the final message ends in the rendered text. Its last space tells whether the template strips messages.
_END_MARK = "\ue000END_OF_FINAL_MESSAGE\ue000 "


def render_template(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Renders one conversation.

    Args:
        template: The Jinja template.
        messages: Each with at least "role", mostly with "content".
        tools: JSON schemas of functions, or Python functions with type hints and docstrings.
        documents: For templates that support retrieval.
        add_generation_prompt: End with the opening of the assistant's message.
        continue_final_message: End within the last message, for the model to go on with it.
        variables: Further variables of the template, `bos_token` among them.

    Raises:
        ValueError: The template rejects the messages, is invalid, or drops the final message that is to be continued.
    """
    from jinja2 import TemplateError

    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt are both set; at most one may be")
        messages = _mark_end(messages)
    try:
        text = _compile(template).render(
            messages=messages,
            tools=None if tools is None else [_schema(tool) for tool in tools],
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not accept these messages: {error}") from error
    return _cut_at_mark(text) if continue_final_message else text


def read_template(path: str) -> str:
    """Reads a template from a file.

    Raises:
        ValueError: It cannot be read, or is no Jinja.
    """
    from jinja2 import TemplateError

    try:
        template = Path(path).read_text(encoding="utf-8")
        _compile(template)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise ValueError(f"chat_template={path!r}: {error}") from error
    return template


def _mark_end(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a copy of the messages with the mark at the end of the last text of the last message."""
    if not messages:
        raise ValueError("continue_final_message is set, but messages is empty")
    messages = copy.deepcopy(list(messages))
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _END_MARK
        return messages
    for block in reversed(content or []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            block["text"] += _END_MARK
            return messages
    raise ValueError("continue_final_message is set, but the last message has no text content")


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_END_MARK.rstrip())
    if end < 0:
        raise ValueError("continue_final_message is set, but the chat template drops the last message")
    if text.startswith(_END_MARK, end):
        return text[:end]
    # The template strips messages, so it would have stripped what stands before the mark too.
    return text[:end].rstrip()


def _schema(tool: dict[str, Any] | Callable[..., Any]) -> dict[str, Any]:
    if isinstance(tool, dict):
        return tool
    if not callable(tool):
        raise ValueError(f"tools holds {tool!r}; accepted are JSON schemas (dict) and functions")
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(tool)


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """Returns the compiled template, in the sandbox and with the helpers that templates on the hub expect."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only passes them through."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)
