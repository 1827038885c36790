"""Sends attacks from a process of its own, which gives way to all others: `python -m tests.server.hostile.send`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import time
from typing import Any

from tests.server.hostile.table import Attack, Post, Target

READ = 2**20


def send(target: Target, post: Post) -> int | str:
    """Returns the status of the answer, that of an error that a stream ends with, or what became of the connection."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=target.timeout)
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"} | dict(post.headers or {})
    try:
        # An answer that comes before the whole request is sent can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(post.method, post.path, post.body, headers)
        answer = connection.getresponse()
        return _status(answer)
    except TimeoutError:
        return "no answer"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def _status(answer: http.client.HTTPResponse) -> int:
    """Reads all of an answer; errors of streams are told within them."""
    if "text/event-stream" not in answer.headers.get("Content-Type", ""):
        while answer.read(READ):
            pass
        return answer.status
    status = answer.status
    for line in answer:
        if line.startswith((b'data: {"error"', b"event: error")) and b"server_error" in line:
            status = 500
    return status


def all_attacks() -> list[Attack]:
    from tests.server.hostile import fields, grammars, schemas, sockets, templates, texts

    return [attack for module in (fields, texts, schemas, grammars, templates, sockets) for attack in module.ATTACKS]


def run(attack: Attack, target: Target) -> dict[str, Any]:
    """What has come of an attack: its status, and how many seconds it took."""
    if attack.act is not None:
        start = time.monotonic()
        status = attack.act(target)
    else:
        assert attack.make is not None
        post = attack.make()
        start = time.monotonic()
        status = send(target, post)
    return {"status": status, "seconds": time.monotonic() - start}


def main() -> None:
    """Answers lines of JSON, `{"id": ..., "target": ...}`, until there are no more."""
    os.nice(19)
    attacks = {attack.id: attack for attack in all_attacks()}
    print(json.dumps({"attacks": len(attacks)}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(run(attacks[wanted["id"]], Target(**wanted["target"]))), flush=True)


if __name__ == "__main__":
    main()
