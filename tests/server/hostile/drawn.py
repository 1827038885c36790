"""Bodies drawn from the server's own schema (OpenAPI), in which some values are hostile."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
WHOLE: dict[str, Schema] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [70]},
}
"""What makes a body complete; a drawn field takes its place."""
INSTEAD = {"/tokenize": {"messages": "prompt"}}
"""Fields that exclude others."""
NUMBERS = [math.nan, math.inf, -math.inf, 10**400, -(10**400), 2**63, -(2**31) - 1, 2**31 - 1, 1e308, 5e-324, -0.0, -1]
TEXTS = ["", "\ud800", "a\udfffb", "\0", "\u2028\x1b[31m", "NaN", "(", "{{ 'a' * 3000000000 }}", "#/$defs/a", "5"]
MAX_DEPTH = 6
"""Of what is drawn by the schema; its own recursion ends there."""


def hostile(size: int) -> st.SearchStrategy[Any]:
    """Values that fit nowhere, or hardly.

    Args:
        size: Of the largest, in characters or values.
    """

    def nested(depth: int, as_object: bool) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = {"a": value} if as_object else [value]
        return value

    small = st.sampled_from([*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"": None}, {"\ud800": 1}])
    return st.one_of(
        small,
        st.builds(nested, st.sampled_from([20, 130, 600]), st.booleans()),
        st.builds(lambda value, part: [value] * (size // part), small, st.sampled_from([200, 20])),
        st.builds(lambda char, part: char * (size // part), st.sampled_from("a \0\u4e2d"), st.sampled_from([100, 7])),
        st.builds(lambda value: {f"k{i}": value for i in range(size // 40)}, small),
    )


def drawn_value(schema: Schema, known: dict[str, Schema], size: int, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a schema, of which some, or parts of them, are hostile instead."""
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    anything = hostile(size)
    if depth >= MAX_DEPTH:
        return anything
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")])) | anything
    if found := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*[st.deferred(lambda one=one: drawn_value(one, known, size, depth + 1)) for one in found])
    match schema.get("type"):
        case "object" if "properties" in schema:
            properties, required = schema["properties"], schema.get("required", [])
            fields = {
                name: st.deferred(lambda one=one: drawn_value(one, known, size, depth + 1))
                for name, one in properties.items()
            }
            needed = {name: fields.pop(name) for name in required}
            return st.fixed_dictionaries(needed, optional=fields) | anything
        case "object":
            return st.dictionaries(st.sampled_from([*TEXTS, "type", "$ref", "a"]), anything, max_size=3) | anything
        case "array":
            items = schema.get("items", {})
            return st.lists(st.deferred(lambda: drawn_value(items, known, size, depth + 1)), max_size=3) | anything
        case "string":
            return st.text(max_size=20) | anything
        case "integer":
            return st.integers(-2, 5) | anything
        case "number":
            return st.floats(-2, 2) | anything
        case "boolean":
            return st.booleans() | anything
        case _:
            return anything


def drawn_bodies(openapi: dict[str, Any], path: str, size: int) -> st.SearchStrategy[bytes]:
    """Bodies of an endpoint, whole but for one to four fields that are drawn."""
    known = openapi["components"]["schemas"]
    content = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = known[content["schema"]["$ref"].rpartition("/")[2]]
    values = {name: drawn_value(one, known, size) for name, one in schema["properties"].items()}

    def whole(fields: dict[str, Any]) -> bytes:
        base = {k: v for k, v in WHOLE[path].items() if k not in [INSTEAD.get(path, {}).get(name) for name in fields]}
        return json.dumps(base | fields).encode()

    names = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen})).map(whole)
