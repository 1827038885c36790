"""How bodies ask for structured output: OpenAI's `response_format` and `text.format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.server import bounds
from jaxengine.server.bounds import Strict, at_most
from jaxengine.server.errors import APIError


class JsonSchema(Strict):
    """A named JSON schema. It is enforced whether it is called strict or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of chat completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"] = "text"

    def as_params(self) -> StructuredOutputsParams | None:
        """Returns what this asks for; None for any text."""
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class SchemaFormat(JsonSchema):
    """The form of /v1/responses, which is flatter than that of chat completions."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def as_params(self) -> StructuredOutputsParams:
        """Returns what this asks for."""
        return StructuredOutputsParams(json=self.schema_)


TextFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's form: the fields of `StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], at_most(bounds.MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


def structured_outputs(
    response_format: ResponseFormat | None, options: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """Returns what the two fields of a body ask for; None for any text.

    Raises:
        APIError: They do not fit together, or `json_schema` is missing.
        ValueError: See `StructuredOutputsParams`.
    """
    wanted = None if options is None else StructuredOutputsParams(**options.model_dump(by_alias=True))
    if response_format is None or response_format.type == "text":
        return wanted
    if wanted is not None:
        raise APIError(400, "response_format and structured_outputs exclude each other", param="response_format")
    if response_format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    schema = response_format.json_schema and response_format.json_schema.schema_
    if schema is None:
        message = 'response_format: type "json_schema" needs json_schema with a schema'
        raise APIError(400, message, param="response_format")
    return StructuredOutputsParams(json=schema)


@contextmanager
def form_from(field: str) -> Iterator[None]:
    """Names the field that asked for a form where the engine refuses it, which knows it by its own name.

    Raises:
        APIError: The form is wrong.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        place, own, reason = message.partition("structured_outputs: ")
        if not own:
            raise
        raise APIError(400, f"{place}{field}: {reason}", param=field) from error
