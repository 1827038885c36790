"""Chat messages to the text that the model's chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jaxengine import bounded_json
from jaxengine.messages import quote, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Message = Mapping[str, Any]


def normalize_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """Turns one conversation (a list of messages) or many into a list.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages like {_EXAMPLE}, got {quote(messages)}")
    if not messages:
        raise ValueError("messages must hold at least one message, got []")
    if isinstance(messages[0], Mapping):
        return [list(messages)]  # pyright: ignore[reportReturnType]
    for conversation in messages:
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"messages must be a list of messages like {_EXAMPLE}, got {quote(conversation)} in it")
    return [list(conversation) for conversation in messages]  # pyright: ignore[reportReturnType]


# What else `apply_chat_template` takes by name: variables of these names would change what it does.
_RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
}
_EXAMPLE = '{"role": "user", "content": "Hello"}'


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Renders one conversation. The text holds the template's special tokens: tokenise it without adding any.

    Args:
        tokenizer: Has the model's own template.
        messages: Dicts with "role" and "content": a string, or OpenAI's list of parts, of type "text".
        chat_template: A Jinja template to use instead of the model's.
        add_generation_prompt: End with the beginning of the assistant's answer.
        continue_final_message: Leave the last message open, for the model to go on with.
        tools: Functions the model may call, as JSON schemas in OpenAI's form.
        chat_template_kwargs: More variables for the template.

    Raises:
        ValueError: No template; no messages; a message of a wrong form or role; the template refused them.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model has no chat template: give chat_template (Jinja), or use generate with a prompt")
    normal = _normalize_messages(messages, tools, chat_template or str(tokenizer.chat_template))
    _check_options(normal, add_generation_prompt, continue_final_message, chat_template_kwargs)
    try:
        text = tokenizer.apply_chat_template(
            normal,
            tools=None if not tools else list(tools),  # pyright: ignore[reportArgumentType]
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(chat_template_kwargs or {}),
        )
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        # A template is a program: what it does with unforeseen messages may fail in any of these ways.
        raise ValueError(f"the chat template refused the messages: {shorten(str(error))}") from error
    assert isinstance(text, str)
    return text


def template_job(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    chat_template: str,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes the job of a worker that renders a conversation with a template that nobody vouches for.

    Args: as of `render_chat`.

    Raises:
        ValueError: No messages; a message of a wrong form or role.
    """
    normal = _normalize_messages(messages, tools, chat_template)
    _check_options(normal, add_generation_prompt, continue_final_message, chat_template_kwargs)
    options = {
        "tools": None if not tools else list(tools),
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    variables = dict(tokenizer.special_tokens_map) | dict(chat_template_kwargs or {})
    return {"kind": "template", "template": chat_template, "messages": normal, "options": options | variables}


def _check_options(
    normal: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool, variables: Any
) -> None:
    reserved = [name for name in variables or () if name in _RESERVED]
    if reserved:
        raise ValueError(f"chat_template_kwargs: {quote(reserved[0])} is no variable of a template's own")
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "add_generation_prompt=True begins a new message: it must be False with continue_final_message=True"
        )
    if continue_final_message and not normal[-1].get("content"):
        raise ValueError("continue_final_message=True needs a last message with content to go on with")


def _normalize_messages(messages: Sequence[Message], tools: Any, template: str) -> list[dict[str, Any]]:
    """Returns messages as templates want them; raises ValueError if they or the tools have another form."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages like {_EXAMPLE}, got {quote(messages)}")
    if not messages:
        raise ValueError("messages must hold at least one message, got []")
    _check_tools(tools, template)
    return [_normalize_message(i, message, template) for i, message in enumerate(messages)]


def _check_tools(tools: Any, template: str) -> None:
    if tools is None:
        return
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of JSON schemas (dicts) or None, got {quote(tools)}")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools must hold JSON schemas (dicts), got {quote(tool)}")
    if tools and "tools" not in template:
        raise ValueError("tools: the chat template has no place for them; give one that does (--chat-template)")


def _normalize_message(index: int, message: Any, known_roles: str) -> dict[str, Any]:
    """Returns a copy of a message with its content as one string; raises ValueError if its form is wrong."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict like {_EXAMPLE}, got {quote(message)}")
    role = message.get("role")
    # Some models have roles of their own: the template then names them.
    if not isinstance(role, str) or not role or (role not in ROLES and role not in known_roles):
        raise ValueError(
            f"{where}: role must be one of {', '.join(ROLES)}, or named in the template, got {quote(role)}"
        )
    # Clients send back what they were answered, with null for what was not there: templates ask whether a key exists.
    result = {key: value for key, value in message.items() if value is not None}
    if "reasoning" in result:  # vLLM's newer name for what templates know as
        result.setdefault("reasoning_content", result["reasoning"])
    calls = result.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}: tool_calls must be a list, got {quote(calls)}")
    if calls:
        result["tool_calls"] = [_normalize_call(where, call) for call in calls]
    if "content" not in result:
        if not (calls or "function_call" in result or "reasoning_content" in result):
            raise ValueError(
                f"{where} must have content: a string, or a list of parts of type text; got {quote(message)}"
            )
        result["content"] = ""
    else:
        result["content"] = _content_text(where, result["content"])
    return result


def _content_text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: content must be a string or a list of parts, got {quote(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f'{where}: a part of content must be {{"type": "text", "text": "..."}}, got {quote(part)}')
    return "\n".join(texts)


def _normalize_call(where: str, call: Any) -> Any:
    """Templates want a call's arguments as a dict; OpenAI's messages carry them as a JSON string."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: tool_calls must hold dicts, got {quote(call)}")
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments") or {}
    try:
        parsed = bounded_json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the arguments of a tool call must be JSON, got {quote(arguments)}") from error
    if not isinstance(parsed, Mapping):
        raise ValueError(f"{where}: the arguments of a tool call must be a JSON object, got {quote(arguments)}")
    return {**call, "function": {**function, "arguments": parsed}}
