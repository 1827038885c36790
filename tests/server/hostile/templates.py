"""Chat templates that requests bring, and what they give to templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.server.hostile.table import Attack, Post, chat, responses, table, tokenize

LOOP = "{% for a in range(99999) %}"
TEMPLATES: dict[str, Callable[[], str]] = {
    "nested_loops": lambda: LOOP * 5 + "x" + "{% endfor %}" * 5,
    "quiet_loops": lambda: LOOP * 8 + "{% endfor %}" * 8,
    "multiplied_text": lambda: "{{ 'a' * 3000000000 }}",
    "multiplied_list": lambda: "{% set a = [0] * 500000000 %}{{ a | length }}",
    "quiet_multiplied": lambda: "{% set a = 'a' * 3000000000 %}x",
    "range": lambda: "{{ range(1000000000) | list | length }}",
    "range_sum": lambda: "{{ range(10 ** 12) | sum }}",
    "power": lambda: "{{ 10 ** 10 ** 9 }}",
    "shift": lambda: "{{ (2 ** 63) ** (2 ** 20) }}",
    "macro_recursion": lambda: "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macro_tree": lambda: "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "call_recursion": lambda: (
        "{% macro f() %}{{ caller() }}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}"
        "{% call f() %}x{% endcall %}"
    ),
    "doubling": lambda: (
        "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | length }}"
    ),
    "doubling_list": lambda: (
        "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | length }}"
    ),
    "percent_width": lambda: "{{ '%3000000000d' % 1 }}",
    "percent_star": lambda: "{{ '%*d' % (2000000000, 1) }}",
    "format_width": lambda: "{{ '{:>3000000000}'.format(1) }}",
    "format_escape": lambda: "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format_map_escape": lambda: "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "center": lambda: "{{ 'x' | center(3000000000) }}",
    "indent": lambda: "{{ 'x\\ny' | indent(2000000000) }}",
    "ljust": lambda: "{{ 'x'.ljust(3000000000) }}",
    "replace": lambda: "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "join": lambda: "{{ (['a'] * 100000) | join('b' * 100000) }}",
    "batch": lambda: "{{ [1] | batch(1000000000, 0) | list | length }}",
    "slice": lambda: "{{ [1] | slice(1000000000) | list | length }}",
    "lipsum": lambda: "{{ lipsum(n=10000000) }}",
    "cycler": lambda: "{% set c = cycler(*range(100000000)) %}{{ c.next() }}",
    "wordwrap": lambda: "{{ ('a ' * 5000000) | wordwrap(1) | length }}",
    "urlize": lambda: "{{ ('http://a.b' * 500000) | urlize | length }}",
    "sort": lambda: "{{ range(99999) | sort | list | length }}" * 500,
    "groupby": lambda: "{{ messages | groupby('__class__') | list }}",
    "striptags": lambda: "{{ ('<' * 1000000) | striptags | length }}",
    "class_escape": lambda: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr_escape": lambda: "{{ messages | attr('__init__') | attr('__globals__') }}",
    "map_escape": lambda: "{{ [messages] | map(attribute='__class__.__base__') | list }}",
    "globals_escape": lambda: "{{ raise_exception.__globals__['os'].getcwd() }}",
    "cycler_escape": lambda: "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "self_escape": lambda: "{{ self._TemplateReference__context.environment.loader }}",
    "exception": lambda: "{{ raise_exception('a' * 100000000) }}",
    "divide": lambda: "{{ 1 / 0 }}{{ [][5] }}",
    "include": lambda: "{% include '/etc/passwd' %}{% import 'os' as os %}{% extends 'x' %}",
    "append_forever": lambda: "{% set l = [1] %}{% for x in l %}{{ l.append(x) }}{% endfor %}",
    "grow_quietly": lambda: "{% set l = [1] %}{% for x in l %}{% set _ = l.append('a' * 1000) %}{% endfor %}",
    "to_itself": lambda: "{% set l = [1] %}{% set _ = l.append(l) %}{{ l | tojson }}{{ l }}",
    "tojson_indent": lambda: "{{ [[1], [2]] | tojson(indent=2000000000) }}",
    "strftime": lambda: "{{ strftime_now('%Y' * 5000000) }}",
    "deep_expression": lambda: "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "deep_not": lambda: "{{ " + "not " * 100_000 + "1 }}",
    "deep_lists": lambda: "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "deep_blocks": lambda: "{% if 1 %}" * 20_000 + "x" + "{% endif %}" * 20_000,
    "deep_loops": lambda: "{% for a in [1] %}" * 300 + "x" + "{% endfor %}" * 300,
    "sum_of_many": lambda: "{{ " + "1 + " * 500_000 + "1 }}",
    "many_filters": lambda: "{{ 1" + "|string" * 200_000 + " }}",
    "many_names": lambda: "".join(f"{{% set a{i} = {i} %}}" for i in range(300_000)),
    "long_text": lambda: "a" * 15_000_000,
    "long_name": lambda: "{{ " + "a" * 10_000_000 + " }}",
    "open": lambda: "{% for",
    "surrogate": lambda: "\ud800{{ '\udfff' }}",
    "wrong_escapes": lambda: "{{ '\\ud800' }}",
    "empty": lambda: "",
    "too_long": lambda: "{{ 'ab ' * 5000000 }}",
}
ENDPOINTS: dict[str, Callable[[str], Post]] = {
    "chat": lambda template: chat(chat_template=template),
    "tokenize": lambda template: tokenize(messages=[{"role": "user", "content": "x"}], chat_template=template),
    "responses": lambda template: responses(chat_template=template),
}


def _deep(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return {"a": value}


VARIABLES: dict[str, Callable[[], Post]] = {
    "deep": lambda: chat(chat_template_kwargs=_deep(900)),
    "many": lambda: chat(chat_template_kwargs={f"v{i}": i for i in range(500_000)}),
    "large": lambda: chat(chat_template_kwargs={"a": "x" * 15_000_000}),
    "names_of_functions": lambda: chat(chat_template_kwargs={"raise_exception": 1, "range": 1, "namespace": []}),
    "reserved": lambda: chat(chat_template_kwargs={"messages": [], "tools": 5, "tokenize": True}),
    "reserved_more": lambda: chat(chat_template_kwargs={"conversation": 1, "self": 1, "return_tensors": "pt"}),
    "wrong_names": lambda: chat(chat_template_kwargs={"": 1, "a b": 2, "\ud800": 3, "\0": 4}),
    "surrogate": lambda: chat(
        chat_template_kwargs={"a": "\ud800"}, chat_template="{{ a }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "wrong_kind": lambda: chat(chat_template_kwargs=[1]),
    "template_within": lambda: chat(chat_template_kwargs={"chat_template": "{{ 'a' * 3000000000 }}"}),
    "responses": lambda: responses(chat_template_kwargs={f"v{i}": [i] for i in range(500_000)}),
}

ATTACKS: list[Attack] = [
    Attack("templates", f"{name}-{endpoint}", lambda make=make, endpoint=endpoint: ENDPOINTS[endpoint](make()))
    for number, (name, make) in enumerate(TEMPLATES.items())
    for endpoint in [list(ENDPOINTS)[number % len(ENDPOINTS)]]
] + table("template_kwargs", VARIABLES)
