"""The body of /v1/responses and the items that conversations are made of there.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, field_validator

from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.server import bounds
from jaxengine.server.bounds import Strict, at_most, first_wrong
from jaxengine.server.protocol import SamplingBody
from jaxengine.server.structured import PlainFormat, TextFormat
from jaxengine.server.tools import FunctionName, NamedTool, Tool, ToolChoice


class TextPart(Strict):
    """A part of a message: text is all there is so far."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


# Text alone stands for one part of it.
TextParts = Annotated[list[TextPart], at_most(bounds.MAX_ITEMS), BeforeValidator(_as_parts)]


class ReasoningPart(Strict):
    """A part of what the model thought."""

    type: Literal["reasoning_text"]
    text: str


class Item(Strict):
    """What all items may have."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: TextParts
    phase: str | None = None


class FunctionCallItem(Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Item):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: TextParts


class ReasoningItem(Item):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: list[Any] = Field(default_factory=list)
    content: Annotated[list[ReasoningPart], at_most(bounds.MAX_ITEMS)] | None = None
    encrypted_content: None = None


def _type_of(value: Any) -> str:
    """Messages may come without a type."""
    found = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return found if isinstance(found, str) else "message"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
]
ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[AnyItem])


class ResponseTool(Strict):
    """A function, flatter than in chat completions."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_tool(self) -> Tool:
        """Returns the same, as chat completions and chat templates have it."""
        return Tool.model_validate(
            {"type": "function", "function": self.model_dump(exclude_unset=True, exclude={"type"})}
        )


class ResponseNamedTool(Strict):
    """A function that is to be called."""

    type: Literal["function"]
    name: str


class TextOptions(Strict):
    """Options of the text of an answer."""

    format: TextFormat = Field(default_factory=PlainFormat)
    verbosity: Literal["medium"] = "medium"


Metadata = Annotated[dict[str, str], Field(max_length=bounds.MAX_METADATA), BeforeValidator(first_wrong((str,)))]


class ResponsesBody(SamplingBody):
    """Body of /v1/responses."""

    input: Annotated[list[AnyItem], at_most(bounds.MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    tools: Annotated[list[ResponseTool], at_most(bounds.MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    previous_response_id: str | None = None
    store: bool = True
    metadata: Metadata = Field(default_factory=dict)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_items(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @property
    def form_field(self) -> str:
        """The field that asks for a form of the text, for messages."""
        return "text.format.schema" if self.text.format.type == "json_schema" else "text.format"

    def form(self) -> StructuredOutputsParams | None:
        """Returns the form that the text must have; None for any."""
        return self.text.format.as_params()

    def chat_tool_choice(self) -> ToolChoice:
        """Returns `tool_choice` as chat completions have it."""
        if isinstance(self.tool_choice, ResponseNamedTool):
            return NamedTool(type="function", function=FunctionName(name=self.tool_choice.name))
        return self.tool_choice


def chat_messages(instructions: str | None, items: list[AnyItem]) -> list[dict[str, Any]]:
    """Items as messages for a chat template: what the model wrote in a row becomes one message."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        match item:
            case FunctionCallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case MessageItem(role="assistant"):
                _assistant(messages, "content", "tool_calls")["content"] = _content(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _content(item.content)})
            case ReasoningItem():
                text = "".join(part.text for part in item.content or [])
                _assistant(messages, "reasoning_content", "content", "tool_calls")["reasoning_content"] = text
            case FunctionCallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _assistant(messages).setdefault("tool_calls", []).append(call)
    return messages


def _assistant(messages: list[dict[str, Any]], *taken: str) -> dict[str, Any]:
    """Returns the message that the model is writing, if it has none of some fields yet; a new one otherwise."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in taken):
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(parts: list[TextPart]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part.text} for part in parts]
