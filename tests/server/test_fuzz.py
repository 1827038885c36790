"""Bodies drawn from the server's own OpenAPI schema: whatever they say, it is never the server's fault."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.conftest import BEARER

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: uv sync")

REPAIRS: dict[str, Any] = {"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
LENGTHS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
"""Fields that say how long answers may be, where there are any."""
LONGEST = 3
COMMON: Any = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=BEARER)


def shortened(body: Any, path: str) -> Any:
    """The same, but no answer takes long."""
    if not isinstance(body, dict):
        return body
    lengths = {}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        value = body.get(name, LONGEST if name == LENGTHS.get(path) else None)
        if isinstance(value, int) and not isinstance(value, bool) and value > LONGEST:
            value = LONGEST
        lengths |= {} if value is None else {name: value}
    return body | lengths


def check(case: Any) -> None:
    """Sends a case, and the same with what makes a body complete: most that are drawn are refused early."""
    bodies = [case.body]
    if isinstance(case.body, dict):
        bodies.append(case.body | {name: REPAIRS[name] for name in REPAIRS if name in case.body})
    for body in bodies:
        case.body = shortened(body, case.path) if case.method == "POST" else body
        answer = case.call(timeout=60)
        assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]


def fuzz(api: Any, max_examples: int) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:
        # A path without arguments has one case only.
        count = max_examples if operation.method == "post" else min(3, max_examples)
        settings(max_examples=count, **COMMON)(given(operation.as_strategy())(check))()


def test_nothing_that_is_asked_breaks_the_server(api):
    fuzz(api, 6)


@pytest.mark.slow
def test_nothing_of_much_more_breaks_it(api):
    fuzz(api, 300)
