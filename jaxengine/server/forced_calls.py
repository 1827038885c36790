"""The form of answers that must be calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxengine.messages import quote
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.server.errors import APIError
from jaxengine.structured.json_schema import relocate

if TYPE_CHECKING:
    from jaxengine.server.protocol import Tool

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a function without parameters takes: `{}`, and nothing else."""


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
