"""Worker processes: what hostile grammars and templates cost, which is their own request and nothing else."""

import time
from pathlib import Path
from typing import Any

import pytest

from jaxengine.loading.resolve import resolve_model
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.grammar import tokenizer_setup
from jaxengine.workers import pool as pool_module
from jaxengine.workers.grammars import MAX_CHARACTERS, GrammarChecker
from jaxengine.workers.pool import WorkerError, WorkerPool

JOB_SECONDS = 3
SMALL = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(scope="module")
def pool():
    tokenizer = resolve_model(None).tokenizer()
    pool = WorkerPool(lambda: {"tokens": tokenizer_setup(tokenizer, 49152, [2, 0])}, job_seconds=JOB_SECONDS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def checker(pool) -> GrammarChecker:
    return GrammarChecker(pool)


def chain(length: int) -> dict[str, Any]:
    """Definitions each of which is the next one."""
    links: dict[str, Any] = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": links | {str(length): {"type": "string"}}}


def doubling(depth: int) -> dict[str, Any]:
    """Two rows of definitions, each of which is the next one of both."""
    parts: dict[str, Any] = {
        f"{row}{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/b{i + 1}"}]}
        for i in range(depth)
        for row in "ab"
    }
    ends = {f"{row}{depth}": {"type": "string", "pattern": row} for row in "ab"}
    return {"$ref": "#/$defs/a0", "$defs": parts | ends}


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


LETTERS = "abcdefghijklmnopqrstuvwxyz"
HARD: dict[str, dict[str, Any]] = {
    "a chain of references": {"json": chain(5000)},
    "a chain of rules": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(50_000)) + 'r50000: "a"'
    },
    "doubling under allOf": {"json": doubling(30)},
    "patterns under allOf": {"json": {"allOf": [{"type": "string", "pattern": f"{c}.*{c}.*{c}"} for c in LETTERS]}},
    "counts under allOf": {"json": {"allOf": [{"type": "string", "pattern": f"({c}|[0-9]){{3,9}}"} for c in LETTERS]}},
    "many properties": {"json": {"type": "object", "properties": {f"p{i}": True for i in range(50_000)}}},
    "a multiple of a large prime": {"json": {"type": "integer", "multipleOf": 1_000_003}},
    "deep nesting": {"json": nested(100)},
    "deep brackets": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "counted repetitions": {"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    "a rule of itself": {"grammar": 'start: start start | "a"'},
    "rules in a circle": {"grammar": "start: a\na: b\nb: a"},
    "GBNF in a circle": {"grammar": "root ::= a\na ::= b\nb ::= a"},
    "deep GBNF": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
}


@pytest.mark.parametrize("name", HARD)
def test_a_hard_grammar_costs_its_own_request(checker, name):
    """It is refused, or harmless; another one is looked at meanwhile, and does not wait for it."""
    started, ended = time.monotonic(), []
    looking = checker.begin(StructuredOutputsParams(**HARD[name]))
    if looking is not None:
        looking.add_done_callback(lambda _: ended.append(time.monotonic() - started))
    easy = StructuredOutputsParams(regex=f"a{{{len(name)}}}")
    assert checker.grammar(easy).num_bytes > 0
    assert not ended or ended[0] < JOB_SECONDS
    if looking is not None:
        error = looking.exception()
        assert error is None or (isinstance(error, ValueError) and str(error))
    assert checker.begin(StructuredOutputsParams(**HARD[name])) is None  # the answer is kept


REFUSED = ("a chain of references", "doubling under allOf", "counts under allOf", "many properties")


@pytest.mark.parametrize("name", [*REFUSED, "a multiple of a large prime"])
def test_what_would_end_or_hold_up_a_process_is_refused(checker, name):
    with pytest.raises(ValueError, match=r"^it (takes|is) "):
        checker.grammar(StructuredOutputsParams(**HARD[name]))


def test_answers_are_kept(checker, monkeypatch):
    params = StructuredOutputsParams(json=SMALL)
    first = checker.grammar(params)
    monkeypatch.setattr(checker._pool, "submit", lambda **job: pytest.fail("asked again"))
    assert checker.begin(params) is None
    assert checker.grammar(StructuredOutputsParams(json=dict(SMALL))) == first
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS}"):
        checker.grammar(StructuredOutputsParams(regex="a" * MAX_CHARACTERS))


TEMPLATES = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 3000000000 }}",
    "many texts": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "an attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no Jinja": "{% if %}",
    "a division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_costs_its_own_request(pool, name):
    job = {"kind": "template", "messages": [], "options": {}, "max_characters": 1000}
    hostile = pool.submit(template=TEMPLATES[name], **job)
    assert pool.submit(template="{{ 1 + 1 }}", **job).result(timeout=60) == "2"
    error = hostile.exception(timeout=60)
    assert error is None or isinstance(error, ValueError)
    assert error is not None or hostile.result() == ""  # what a sandbox makes of it


def test_a_worker_that_is_killed_is_replaced(pool):
    job = {"kind": "template", "template": "x", "messages": [], "options": {}, "max_characters": 1000}
    assert pool.submit(**job).result(timeout=60) == "x"
    for worker in list(pool._workers):
        worker._process.kill()
    results = [pool.submit(**job) for _ in range(6)]
    texts = [future.exception(timeout=60) or future.result() for future in results]
    assert texts.count("x") >= 4  # one for each worker may meet the dead
    assert all(text == "x" or isinstance(text, ValueError | WorkerError) for text in texts)
    pool.check()


def test_jobs_without_workers_fail(monkeypatch):
    monkeypatch.setattr(pool_module.sys, "executable", "/nowhere/python")
    pool = WorkerPool(lambda: {"no_tokens": "none"})
    for _ in range(4):
        with pytest.raises(WorkerError, match="cannot be started"):
            pool.submit(kind="template", template="x", messages=[], options={}, max_characters=9).result(timeout=10)
    with pytest.raises(WorkerError, match="cannot be started"):
        pool.check()
    pool.close()
    with pytest.raises(WorkerError):
        pool.submit(kind="template", template="x", messages=[], options={}, max_characters=9)


def test_workers_end_with_their_parent():
    pool = WorkerPool(lambda: {"no_tokens": "none"})
    assert (
        pool.submit(kind="template", template="x", messages=[], options={}, max_characters=9).result(timeout=20) == "x"
    )
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    for pid in pids:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
