"""Grammars, regular expressions and choices that are hard to compile, or to follow."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tests.server.hostile.send import send
from tests.server.hostile.table import Attack, Post, Target, completion, table


def grammar(text: str, **fields: Any) -> Post:
    return completion(structured_outputs={"grammar": text}, **fields)


def regex(text: str, **fields: Any) -> Post:
    return completion(structured_outputs={"regex": text}, **fields)


def words(seed: int, number: int = 40_000) -> str:
    draw = random.Random(seed)
    return "|".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(number))


def lark_chain(length: int) -> str:
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(length)), f'r{length}: "a"'])


def terminal_chain(length: int) -> str:
    return "\n".join(["start: T0", *(f"T{i}: T{i + 1}" for i in range(length)), f'T{length}: "a"'])


def gbnf_chain(length: int) -> str:
    return "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(length)), f'r{length} ::= "a"'])


def doubled(depth: int) -> str:
    """Rules that each name the next one twice: 2**depth ways, or words."""
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(depth)), f'r{depth}: "a"'])


LARK: dict[str, Callable[[], Post]] = {
    **{f"chain_{n}": (lambda n=n: grammar(lark_chain(n))) for n in (1_000, 50_000, 200_000)},
    **{f"terminals_{n}": (lambda n=n: grammar(terminal_chain(n))) for n in (1_000, 50_000)},
    "doubled_30": lambda: grammar(doubled(30)),
    "doubled_1000": lambda: grammar(doubled(1_000)),
    "wide": lambda: grammar("start: " + " | ".join(f'"w{i}"' for i in range(200_000))),
    "left_recursion": lambda: grammar('start: start "a" | start start |'),
    "no_end": lambda: grammar("start: start"),
    "mutual": lambda: grammar("start: a\na: b\nb: a"),
    "ambiguous": lambda: grammar('start: x\nx: x x x | x x | "a" |', max_tokens=200),
    "repeats": lambda: grammar('start: (("a"{1,1000}){1,1000}){1,1000}'),
    "repeat_of_huge": lambda: grammar('start: "a"{1000000000}'),
    "deep_groups": lambda: grammar("start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
    "open_groups": lambda: grammar("start: " + "(" * 1_000_000),
    "long_literal": lambda: grammar(f'start: "{"a" * 8_000_000}"'),
    "bad_terminal": lambda: grammar("start: /(a|b)*a(a|b){30}/", max_tokens=200),
    "terminals_and": lambda: grammar("start: /" + "/ & /".join(f".*{i}.*" for i in range(40)) + "/"),
    "terminals_not": lambda: grammar("start: T\nT: ~/" + ".*a.{25}" + "/", max_tokens=100),
    "json_within": lambda: grammar('start: %json {"$ref": "#"}'),
    "json_bomb_within": lambda: grammar('start: %json {"type": "integer", "multipleOf": 1000003}'),
    "imports": lambda: grammar("%import common.WORD\n%import /etc/passwd\nstart: WORD"),
    "ignores": lambda: grammar("start: A\nA: /a/\n" + "".join(f"%ignore /b{i}*/\n" for i in range(20_000))),
    "missing": lambda: grammar("start: nothing"),
    "surrogate": lambda: grammar('start: "\ud800"'),
    "null_byte": lambda: grammar('start: "\0"'),
    "own_form": lambda: grammar('{"grammars": [{"json_schema": {"type": "integer", "multipleOf": 1000003}}]}'),
    "own_form_deep": lambda: grammar('{"grammars": [{"json_schema": ' + '{"items": ' * 20_000 + "1" + "}" * 20_000),
    "parametric": lambda: grammar('start: r::0xffff\nr::_: "a" r::incr(_) | "b"'),
    "many_lines": lambda: grammar("\n" * 7_000_000),
    "comment": lambda: grammar("start: A\nA: /a/ // " + "x" * 15_000_000),
    "max_tokens": lambda: grammar("start: x[max_tokens=1000000000]\nx: /.*/"),
}
GBNF: dict[str, Callable[[], Post]] = {
    **{f"chain_{n}": (lambda n=n: grammar(gbnf_chain(n))) for n in (1_000, 50_000)},
    "left_recursion": lambda: grammar('root ::= root "a" | root root | ""'),
    "no_end": lambda: grammar("root ::= root"),
    "mutual": lambda: grammar("root ::= a\na ::= b\nb ::= a"),
    "loop_of_nothing": lambda: grammar('root ::= ("" | "")* ("a"?)* ((("b"*)*)*)*', max_tokens=200),
    "repeats": lambda: grammar('root ::= (("a"{1,1000}){1,1000}){1,1000}'),
    "deep_groups": lambda: grammar("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000),
    "wide": lambda: grammar("root ::= " + " | ".join(f'"w{i}"' for i in range(200_000))),
    "classes": lambda: grammar("root ::= [" + "".join(f"\\u{i:04x}" for i in range(0x100, 0x9000)) + "]{1,1000}"),
    "open_class": lambda: grammar("root ::= [a-"),
    "open_text": lambda: grammar('root ::= "' + "a" * 1_000_000),
    "no_root": lambda: grammar('x ::= "a"'),
    "escapes": lambda: grammar('root ::= "\\xZZ\\u12\\UFFFFFFFF"'),
}
REGEXES: dict[str, Callable[[], Post]] = {
    "repeats": lambda: regex("((a{1000}){1000}){1000}"),
    "optional_repeats": lambda: regex("((a?){300}){300}"),
    "any_repeats": lambda: regex("(.{1,1000}){1,1000}"),
    "many_states": lambda: regex("(a|b)*a(a|b){30}", max_tokens=200),
    "many_states_any": lambda: regex(".*a.{40}", max_tokens=200),
    "nested_stars": lambda: regex("((((a*)*)*)*)*b", max_tokens=100),
    "words": lambda: regex(words(0)),
    "words_starred": lambda: regex(f"({words(1)})*", max_tokens=100),
    "long_words": lambda: regex("|".join(f"{i:07d}" * 10 for i in range(20_000))),
    "literal": lambda: regex("a" * 15_000_000),
    "groups_100000": lambda: regex("(" * 100_000 + "a" + ")" * 100_000),
    "open_groups": lambda: regex("(" * 1_000_000),
    "classes": lambda: regex(r"(\p{L}\w[^a]){1,3000}"),
    "class_of_many": lambda: regex("[" + "".join(chr(i) for i in range(0x100, 0xD000, 2)) + "]{1,2000}"),
    "unicode_case": lambda: regex("(?i)(" + "\u017f\u00df\u212a" * 3_000 + ")*"),
    "lookahead": lambda: regex("(?=a)(?!b)(?<=c)\\1"),
    "back_reference": lambda: regex(r"(a)\1"),
    "huge_count": lambda: regex("a{99999999999999999999}"),
    "count_of_10_9": lambda: regex("a{1000000000}"),
    "wrong_range": lambda: regex("a{5,2}"),
    "surrogate": lambda: regex("\ud800"),
    "empty": lambda: regex(""),
    "nothing_fits": lambda: regex("[^\\s\\S]"),
    "lengths": lambda: regex("(a{2}|a{3}|a{5}|a{7}|a{11}|a{13})*" * 20 + "b", max_tokens=100),
}
CHOICES: dict[str, Callable[[], Post]] = {
    **{f"many_{n}": (lambda n=n: _choice([f"c{i}" for i in range(n)])) for n in (10_000, 1_000_000)},
    "the_same": lambda: _choice(["a"] * 1_000_000),
    "long": lambda: _choice(["a" * 5_000_000, "a" * 4_999_999]),
    "prefixes": lambda: _choice(["a" * i for i in range(1, 4_000)]),
    "empty_texts": lambda: _choice([""] * 100_000),
    "empty": lambda: _choice([]),
    "surrogate": lambda: _choice(["\ud800"]),
    "escapes": lambda: _choice(['"', "\\", '" | /.*/ | "', "\n", "\0", "\u2028"]),
    "wrong": lambda: _choice([1] * 1_000_000),
}


def _choice(values: list[Any]) -> Post:
    return completion(structured_outputs={"choice": values})


def at_once(posts: list[Post]) -> Callable[[Target], int | str]:
    """Sends several at once; returns the worst status of all."""

    def act(target: Target) -> int | str:
        found: list[int | str] = []
        threads = [threading.Thread(target=lambda post=post: found.append(send(target, post))) for post in posts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(found, key=lambda status: (isinstance(status, str), status if isinstance(status, int) else 0))

    return act


def _flood(make: Callable[[int], Post], number: int) -> Callable[[Target], int | str]:
    return lambda target: at_once([make(i) for i in range(number)])(target)


FLOODS = {
    "regexes_of_words": _flood(lambda i: regex(words(100 + i)), 59),
    "held_grammars": _flood(lambda i: completion(structured_outputs={"json": {"multipleOf": 1000003 + 2 * i}}), 5),
    "chains": _flood(lambda i: grammar(lark_chain(50_000 + i)), 8),
    "small_grammars": _flood(lambda i: regex(f"[a-z]{{{i + 1}}}"), 100),
}

ATTACKS: list[Attack] = [
    *table("lark", LARK),
    *table("gbnf", GBNF),
    *table("regexes", REGEXES),
    *table("choices", CHOICES),
    *[Attack("floods", name, act=act) for name, act in FLOODS.items()],
]
