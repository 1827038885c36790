"""Calls that a model writes in Python, with the literals of JSON where it forgets which language it writes."""

from __future__ import annotations

import ast
import io
import itertools
import json
import keyword
import tokenize
import warnings
from typing import Any

_JSON_LITERALS = {"true": True, "false": False, "null": None}
_PREFIX = "_keyword_"


def python_calls(code: str) -> list[tuple[str, str]]:
    """Returns the names of calls, and their arguments in JSON.

    Arguments and functions may have names that are keywords of Python (`from`, `class`), and values may be JSON's
    `true`, `false` and `null`.

    Raises:
        ValueError: There is anything else than calls with named arguments that are literals.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what is odd about a model's Python interests nobody
            statements = ast.parse(_without_keywords(code.strip())).body
        calls = []
        for statement in statements:
            value = statement.value if isinstance(statement, ast.Expr) else None
            calls += [_python_call(node) for node in (value.elts if isinstance(value, ast.List) else [value])]
        return calls
    except (SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"no calls in Python: {error}") from error


def _without_keywords(code: str) -> str:
    """Puts a prefix before keywords that stand where only a name can: before `=` and before `(`."""
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    lines = code.splitlines(keepends=True)
    for token, following in reversed(list(itertools.pairwise(tokens))):
        if token.type == tokenize.NAME and keyword.iskeyword(token.string) and following.string in ("=", "("):
            row, column = token.start
            line = lines[row - 1]
            lines[row - 1] = line[:column] + _PREFIX + line[column:]
    return "".join(lines)


class _JsonLiterals(ast.NodeTransformer):
    """Makes JSON's literals Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_LITERALS[node.id]) if node.id in _JSON_LITERALS else node


def _python_call(node: ast.expr | None) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute) or node.args:
        raise ValueError("something else than a call with named arguments")
    arguments: dict[Any, Any] = {}
    for word in node.keywords:
        if word.arg is None:
            raise ValueError("**: no name")
        arguments[word.arg.removeprefix(_PREFIX)] = ast.literal_eval(_JsonLiterals().visit(word.value))
    name = ast.unparse(node.func).replace(_PREFIX, "")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + text).encode()  # half a surrogate pair, from an escape, could not be sent
    return name, text
