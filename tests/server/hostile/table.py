"""What an attack is, and the table of them that the modules of kinds fill."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BODY_LIMIT = 16 * 2**20
"""The server's default; no body is larger."""
USER: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
MODEL_LEN = 1000


@dataclass(frozen=True)
class Target:
    """Where to send it.

    Attributes:
        host: A name or an address.
        port: Of TCP.
        key: A valid API key.
        timeout: Seconds to wait for an answer.
    """

    host: str
    port: int
    key: str
    timeout: float


@dataclass(frozen=True)
class Post:
    """A request of HTTP that is formed as it should be, whatever its body says."""

    path: str
    body: bytes
    headers: Mapping[str, str] | None = None
    method: str = "POST"


@dataclass(frozen=True)
class Attack:
    """One hostile request, or some that only together are one.

    Attributes:
        kind: What it is an example of.
        name: Which example.
        make: Makes the request, which may be large, where it is sent from.
        act: Does something else with sockets instead; returns the status, or what has become of the connection.
    """

    kind: str
    name: str
    make: Callable[[], Post] | None = None
    act: Callable[[Target], int | str] | None = None

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"


def body(fields: Any) -> bytes:
    """JSON of a body: NaN, infinities and lone surrogates are written as Python's and JavaScript's libraries do."""
    return json.dumps(fields).encode()


def completion(**fields: Any) -> Post:
    """A short completion but for these fields."""
    return Post("/v1/completions", body({"prompt": "Hi", "max_tokens": 2} | fields))


def chat(**fields: Any) -> Post:
    """A short chat completion but for these fields."""
    return Post("/v1/chat/completions", body({"messages": USER, "max_tokens": 2} | fields))


def responses(**fields: Any) -> Post:
    """A short response but for these fields."""
    return Post("/v1/responses", body({"input": "x", "max_output_tokens": 2} | fields))


def tokenize(**fields: Any) -> Post:
    return Post("/tokenize", body(fields))


def detokenize(**fields: Any) -> Post:
    return Post("/detokenize", body(fields))


def table(kind: str, members: Mapping[str, Callable[[], Post]]) -> list[Attack]:
    """The attacks of a kind."""
    return [Attack(kind, name, make) for name, make in members.items()]


# Ways to ask for a form, by the name of the endpoint or field.


def by_response_format(schema: Any) -> Post:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def by_structured_outputs(schema: Any) -> Post:
    return completion(structured_outputs={"json": schema})


def by_json_text(schema: Any) -> Post:
    return completion(structured_outputs={"json": json.dumps(schema)})


def by_forced_tool(schema: Any) -> Post:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return chat(tools=[tool], tool_choice="required")


def by_text_format(schema: Any) -> Post:
    return responses(text={"format": {"type": "json_schema", "name": "x", "schema": schema}})


def by_response_tool(schema: Any) -> Post:
    return responses(tools=[{"type": "function", "name": "f", "parameters": schema}], tool_choice="required")


WAYS: dict[str, Callable[[Any], Post]] = {
    "format": by_response_format,
    "outputs": by_structured_outputs,
    "text": by_json_text,
    "tool": by_forced_tool,
    "response": by_text_format,
    "response_tool": by_response_tool,
}
"""Of asking for JSON of a schema."""


def in_turn(kind: str, schemas: Mapping[str, Callable[[], Any]], *, ways: int = 1) -> list[Attack]:
    """Attacks with schemas, each in so many ways; the next schema begins with the next way."""
    names = list(WAYS)
    attacks = []
    for number, (name, make) in enumerate(schemas.items()):
        for step in range(ways):
            way = names[(number + step) % len(names)]
            attacks.append(Attack(kind, f"{name}-{way}", lambda make=make, way=way: WAYS[way](make())))
    return attacks
