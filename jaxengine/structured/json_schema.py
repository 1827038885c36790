"""Changes to JSON schemas before they become grammars: https://json-schema.org/draft/2020-12/json-schema-core.

What is a schema within a schema is told by its position. A property may be called `default` or `properties`, and a
default may look like a schema. Nothing here recurses, so a schema may be nested as deep as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]

_ONE = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "not", "if", "then", "else"),
    *("items", "additionalItems", "unevaluatedItems", "contentSchema"),
)
"""Keywords whose value is a schema."""
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
"""Keywords whose value is a list of schemas."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords whose value has schemas by names that users choose."""
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_DATE = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
)
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    "|23:59:60(?:\\.[0-9]+)?(?:[Zz]|[+-]00:00)"
)
# No A-labels (RFC 5890): whether what they stand for is allowed is no regular language.
_LABEL = (
    "[A-Za-z0-9](?:[A-Za-z0-9-]{0,2}[A-Za-z0-9]"
    "|[A-Za-z0-9-](?:[A-Za-z0-9][A-Za-z0-9-]|-[A-Za-z0-9])[A-Za-z0-9-]{0,58}[A-Za-z0-9])?"
)
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"(?:{_DATE})[Tt](?:{_TIME})",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
}
"""RFC 3339 and RFC 1123. Leap seconds come in UTC only, where their minute can be told."""
MAX_HOSTNAME = 253


def rewrite(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """Returns a copy of a schema.

    Args:
        schema: An object, or true or false.
        change: Is called with every schema that is an object, outermost first; what it returns replaces keywords.
    """
    root = [schema]
    waiting: list[tuple[Any, Any]] = [(root, 0)]
    while waiting:
        place, key = waiting.pop()
        if isinstance(found := place[key], dict):
            place[key] = found | change(found)
            waiting += _places(place[key])
    return root[0]


def subschemas(schema: Any) -> Iterator[Schema]:
    """Gives a schema and all schemas within it that are objects."""
    waiting = [schema]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting += [place[key] for place, key in _places(found, copy=False)]


def _places(schema: Schema, *, copy: bool = True) -> list[tuple[Any, Any]]:
    """Containers and keys of the schemas directly within one; the containers are copied, unless told otherwise."""
    places: list[tuple[Any, Any]] = [(schema, keyword) for keyword in _ONE if isinstance(schema.get(keyword), dict)]
    for kind, keywords in ((list, _LIST), (dict, _NAMED)):
        for keyword in keywords:
            if isinstance(inner := schema.get(keyword), kind):
                if copy:
                    inner = schema[keyword] = inner.copy()
                places += [(inner, key) for key in (range(len(inner)) if kind is list else inner)]
    return places


def relocate(schema: Any, pointer: str) -> Any:
    """Returns a schema whose references into itself hold where it stands in another: at a JSON pointer, "/$defs/a"."""

    def change(found: Schema) -> Schema:
        reference = found.get("$ref")
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return {}
        return {"$ref": f"#{pointer}{reference[1:]}"}

    return rewrite(schema, change)


def enforce_formats(schema: Any) -> Any:
    """Returns a schema with patterns for the formats of which the grammar's compiler takes more than they allow."""

    def change(found: Schema) -> Schema:
        name = found.get("format")
        if not isinstance(name, str) or name not in _FORMATS:
            return {}
        pattern = {"pattern": f"^(?:{_FORMATS[name]})$"}
        longest = {"maxLength": MAX_HOSTNAME} if name == "hostname" else {}
        parts = found.get("allOf", [])
        return {"allOf": [*(parts if isinstance(parts, list) else []), pattern | longest]}

    return rewrite(schema, change)


def close(schema: Any) -> Any:
    """Returns a schema whose objects have no properties but those that it names, where it does not say otherwise.

    Schemas that hold of one object together, as under `allOf`, are closed together: what any of them names is allowed.
    """
    schema = rewrite(schema, lambda found: {})  # so that no two places share an object
    together = [found for found in subschemas(schema) if _is_composed(found)]
    open_ones = {id(part) for found in together for part in _of_same_object(schema, found)[1:]}
    for found in subschemas(schema):  # what must not hold, or decides what must, keeps its meaning
        for keyword in ("not", "if"):
            if isinstance(condition := found.get(keyword), dict):
                open_ones |= {id(part) for part in _of_same_object(schema, condition)}
    return rewrite(schema, lambda found: {} if id(found) in open_ones else _closing(schema, found))


def _closing(root: Any, schema: Schema) -> Schema:
    """Returns what closes a schema, to be added to it."""
    parts = _of_same_object(root, schema) if _is_composed(schema) else [schema]
    names: Schema = {}
    patterns: Schema = {}
    for part in parts:
        if "additionalProperties" in part or "unevaluatedProperties" in part:
            return {}
        names |= dict.fromkeys(_mapping(part, "properties"), True)
        patterns |= dict.fromkeys(_mapping(part, "patternProperties"), True)
    if not any("properties" in part or "patternProperties" in part for part in parts):
        return {}
    if len(parts) == 1:
        return {"additionalProperties": False}
    closing: Schema = {"properties": names | _mapping(schema, "properties"), "additionalProperties": False}
    if patterns:
        closing["patternProperties"] = patterns | _mapping(schema, "patternProperties")
    return closing


def _is_composed(schema: Schema) -> bool:
    """Returns whether several schemas hold of the same object here."""
    parts = schema.get("allOf")
    num_parts = sum(word in schema for word in ("anyOf", "oneOf", "$ref", "then", "else", "dependentSchemas"))
    num_parts += len(parts) if isinstance(parts, list) else 0
    num_parts += "properties" in schema or "patternProperties" in schema
    return num_parts > 1


def _of_same_object(root: Any, schema: Schema) -> list[Schema]:
    """Returns a schema, and all that hold of the same object with it, references followed."""
    found: list[Schema] = []
    seen: set[int] = set()
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        found.append(part)
        for keyword in _ALTERNATIVES:
            waiting += part[keyword] if isinstance(part.get(keyword), list) else []
        waiting += [part.get("then"), part.get("else"), *_mapping(part, "dependentSchemas").values()]
        if isinstance(part.get("$ref"), str):
            waiting.append(_resolve(root, part["$ref"]))
    return found


def _resolve(root: Any, reference: str) -> Any:
    """Returns what a reference into the schema itself means; None if there is no such place."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    found = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _mapping(schema: Schema, keyword: str) -> Schema:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}
