"""Tools of a request: which there are, which may be called, and the form of answers that must be calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from jaxengine.messages import quote
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.server.bounds import Strict
from jaxengine.server.errors import APIError
from jaxengine.structured.json_schema import relocate

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a function without parameters takes: `{}`, and nothing else."""


class Function(Strict):
    """A function that the model may call; what its parameters are is a JSON schema."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """Returns what the model is shown of it, as the client has given it."""
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class FunctionName(Strict):
    """Which function."""

    name: str


class NamedTool(Strict):
    """A tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class ToolUse:
    """What tools mean for an answer.

    Attributes:
        tools: Those that the model is told of, and may call.
        form: What the answer must look like where calls are forced: a list of them in JSON; None where they are not.
    """

    tools: list[Tool]
    form: StructuredOutputsParams | None = None


def tool_use(tools: list[Tool], choice: ToolChoice | None, *, parallel: bool, auto: bool) -> ToolUse:
    """Returns what a request makes of its tools.

    Args:
        tools: Those of the request.
        choice: Its `tool_choice`; by default "auto" if there are tools.
        parallel: Whether an answer may have several calls.
        auto: Whether the server can find calls in what the model writes.

    Raises:
        APIError: The choice does not fit.
    """
    choice = choice or ("auto" if tools else "none")
    if isinstance(choice, NamedTool):
        called = [tool for tool in tools if tool.function.name == choice.function.name]
        if not called:
            raise APIError(400, f"tool_choice: {quote(choice.function.name)} is none of the tools", param="tool_choice")
        return ToolUse(tools, forced_calls(called, max_calls=1))
    if choice == "required":
        if not tools:
            raise APIError(400, "tool_choice: 'required' needs tools", param="tool_choice")
        return ToolUse(tools, forced_calls(tools, max_calls=None if parallel else 1))
    if choice == "none" or not tools:
        return ToolUse([])
    if not auto:
        message = "tools: this server was started without --enable-auto-tool-choice and --tool-call-parser"
        raise APIError(400, message, param="tools", code="unsupported_field")
    return ToolUse(tools)


def forced_calls(tools: Sequence[Tool], max_calls: int | None) -> StructuredOutputsParams:
    """Makes the form of a JSON list of at least one call of these tools, as their schemas have it.

    Each tool's schema stands in a place of its own, and its references hold there: two tools may call different things
    by one name.

    Args:
        tools: What may be called.
        max_calls: Calls at most; None: there is no limit.

    Raises:
        APIError: `$defs` of a schema is no object.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for place, tool in enumerate(tools):
        given = tool.function.parameters or NOTHING
        if not isinstance(own := given.get("$defs", {}), dict):
            raise APIError(400, f"tools: $defs must be an object, got {quote(own)}", param="tools")
        name = f"tool_{place}"
        definitions[name] = relocate({"type": "object"} | given, f"/$defs/{name}")
        fields = {"name": {"const": tool.function.name}, "parameters": {"$ref": f"#/$defs/{name}"}}
        calls.append({"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False})
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    whole |= {"maxItems": max_calls} if max_calls is not None else {}
    return StructuredOutputsParams(json=whole, disable_any_whitespace=True)
