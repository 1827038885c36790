"""A server that is attacked, and what is seen of it meanwhile: its health, another client's stream, its memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.server.conftest import KEY, Server
from tests.server.hostile.table import MODEL_LEN, USER

HEALTH_SECONDS, GAP_SECONDS = 0.5, 1.0
"""The bounds: an answer of /health, and two pieces of another client's stream."""
MEMORY_BYTES = 100 * 2**20
"""So much more may be kept after all attacks than before."""
PEAK_BYTES = 4 * 2**30
"""A server that takes so much more than before is ended: this machine is needed for other things too."""
NUM_FILES = 256
SHUTDOWN_SECONDS = 3.0
ANSWER_SECONDS = 40.0
"""How long an attack waits for its answer."""
BEARER = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = list(range(40, 90))
"""Token ids of the tiny model that are letters: each gives a piece of text."""


@dataclass
class Seen:
    """What was seen while an attack was under way.

    Attributes:
        health: Seconds of the slowest answer of /health, or since a question without one.
        health_status: The worst status of one; 0 if there was no answer.
        gap: The longest time between two pieces of the neighbour's stream, in seconds.
        first: The longest time from a neighbour's request to its first piece.
        peak: The most memory of all processes together, in bytes.
        own: The longest time by which a thread of the watcher's own process came late, in seconds.
        errors: What the neighbour was told instead of pieces.
    """

    health: float = 0.0
    health_status: int = 200
    gap: float = 0.0
    first: float = 0.0
    peak: int = 0
    own: float = 0.0
    errors: list[str] = field(default_factory=list)


class HostileServer:
    """A server of the tiny model, with its watchers."""

    def __init__(self, model: Path, *arguments: str):
        self._known: dict[int, str] = {}
        (model / "tools.jinja").write_text(TEMPLATE)
        self.server = Server(
            model,
            *("--warmup", "full", "--api-key", KEY, "--api-key", "another", "--served-model-name", "tiny"),
            *("--trust-request-chat-template", "--chat-template", str(model / "tools.jinja")),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--shutdown-timeout", str(SHUTDOWN_SECONDS), "--response-store-size", str(2**20)),
            *arguments,
        )
        # Long before it has imported what it needs: it finds so few, and cannot have more.
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (NUM_FILES, NUM_FILES))
        address = urlsplit(self.server.url)
        assert address.hostname is not None
        assert address.port is not None
        self.host, self.port = address.hostname, address.port
        self.warm_up()
        self.memory_before = self.settled_memory()

    @property
    def pid(self) -> int:
        return self.server.process.pid

    @property
    def alive(self) -> bool:
        return self.server.process.poll() is None

    def ask(self, path: str, body: Any, timeout: float = 30.0) -> int:
        """Posts a body; returns the status of the answer."""
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=timeout)) as connection:
            connection.request("POST", path, json.dumps(body), BEARER)
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def warm_up(self) -> None:
        """Has everything done once that an attack does: what is loaded and compiled for that stays."""
        short = {"prompt": "Hi", "max_tokens": 3}
        for number in (1, 2, 3, 5, 8, 20):
            assert self.ask("/v1/completions", short | {"n": number, "temperature": 1}) == 200
        for more in (
            {"logprobs": 20, "echo": True, "prompt": "Hello"},
            {"prompt": "a" * 900, "logit_bias": {"5": 1}, "stop": ["x", "yy"], "bad_words": ["zz"]},
            {"structured_outputs": {"regex": "[a-z]+"}},
            {"structured_outputs": {"grammar": 'start: "a"'}},
            {"structured_outputs": {"choice": ["a", "b"]}},
            {"structured_outputs": {"json": {"type": "object"}}, "n": 8, "temperature": 1},
        ):
            assert self.ask("/v1/completions", short | more) == 200
        assert self.ask("/v1/chat/completions", {"messages": USER, "max_tokens": 3}) == 200
        for _ in range(4):  # each of the workers
            assert self.ask("/v1/chat/completions", {"messages": USER, "max_tokens": 3, "chat_template": "x"}) == 200
        assert self.ask("/v1/responses", {"input": "x", "max_output_tokens": 3}) == 200
        assert self.ask("/tokenize", {"prompt": "a" * 20_000}) in (200, 400)

    def processes(self) -> dict[int, str]:
        """It and all that have come of it, with the times when they began: a number may be another process's later."""
        parents: dict[int, list[int]] = {}
        begins: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                    parents.setdefault(int(after_name[1]), []).append(int(entry.name))
                    begins[int(entry.name)] = after_name[19]
        new = [self.pid]
        while new:
            pid = new.pop()
            if pid in begins:
                self._known[pid] = begins[pid]
            new += parents.get(pid, [])
        self._known = {pid: begin for pid, begin in self._known.items() if begins.get(pid) == begin}
        return self._known

    def memory(self) -> int:
        """Bytes in memory of all processes together; what they share counts for each."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        return total

    def settled_memory(self, seconds: float = 8.0) -> int:
        """The least memory within some seconds: it is given back little by little."""
        least = self.memory()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.5)
            least = min(least, self.memory())
        return least

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        """Watches it while the block runs; the neighbour's stream has begun when it starts."""
        seen, stop, begun = Seen(), threading.Event(), threading.Event()
        watchers = [
            threading.Thread(target=self._ask_health, args=(seen, stop)),
            threading.Thread(target=self._neighbour, args=(seen, stop, begun)),
            threading.Thread(target=self._sample, args=(seen, stop)),
        ]
        for watcher in watchers:
            watcher.start()
        begun.wait(20)
        try:
            yield seen
        finally:
            stop.set()
            for watcher in watchers:
                watcher.join()

    def _ask_health(self, seen: Seen, stop: threading.Event) -> None:
        while not stop.is_set():
            start = time.monotonic()
            try:
                with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=5)) as connection:
                    connection.request("GET", "/health")
                    status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                status = 0
            seen.health = max(seen.health, time.monotonic() - start)
            if status != 200:
                seen.health_status = status
                if not self.alive:
                    return
            time.sleep(0.05)

    def _neighbour(self, seen: Seen, stop: threading.Event, begun: threading.Event) -> None:
        """Reads one stream after the other."""
        sampling = {"allowed_token_ids": LETTERS, "ignore_eos": True, "stream": True, "temperature": 1}
        body = json.dumps({"prompt": "Hello", "max_tokens": MODEL_LEN - 10} | sampling)
        while not stop.is_set() and self.alive:
            last = time.monotonic()
            try:
                with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=20)) as connection:
                    connection.request("POST", "/v1/completions", body, BEARER)
                    answer = connection.getresponse()
                    if answer.status != 200:
                        seen.errors.append(f"{answer.status}")
                        time.sleep(0.2)
                        continue
                    is_first = True
                    for line in answer:
                        now = time.monotonic()
                        if line.startswith(b'data: {"error"'):
                            seen.errors.append(line[:200].decode())
                        if not line.startswith(b"data: {"):
                            continue
                        if is_first:
                            seen.first = max(seen.first, now - last)
                        else:
                            seen.gap = max(seen.gap, now - last)
                        is_first, last = False, now
                        begun.set()
                        if stop.is_set():
                            return
            except (OSError, http.client.HTTPException) as error:
                seen.errors.append(type(error).__name__)
                seen.gap = max(seen.gap, time.monotonic() - last)
                time.sleep(0.2)

    def _sample(self, seen: Seen, stop: threading.Event) -> None:
        before = getattr(self, "memory_before", 0)
        while not stop.is_set() and self.alive:
            seen.peak = max(seen.peak, self.memory())
            if seen.peak > before + PEAK_BYTES:
                self.server.process.kill()
            start = time.monotonic()
            time.sleep(0.05)
            seen.own = max(seen.own, time.monotonic() - start - 0.05)

    def close(self) -> None:
        """Ends it, and what it has started and left."""
        self.processes()
        self.server.close()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Attacker:
    """The process that sends attacks (`send.py`), started again when one hangs it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def attack(self, attack_id: str, server: HostileServer) -> dict[str, Any]:
        """Returns status and seconds, see `send.run`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        target = {"host": server.host, "port": server.port, "key": KEY, "timeout": ANSWER_SECONDS}
        self._process.stdin.write(json.dumps({"id": attack_id, "target": target}) + "\n")
        self._process.stdin.flush()
        try:
            return json.loads(self._answers.get(timeout=4 * ANSWER_SECONDS))
        except queue.Empty:
            self.close()
            return {"status": "no answer", "seconds": 4 * ANSWER_SECONDS}

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.server.hostile.send"]
        root = Path(__file__).resolve().parents[3]
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process, self._answers = process, queue.Queue()
        threading.Thread(target=self._read, args=(process, self._answers), daemon=True).start()
        assert json.loads(self._answers.get(timeout=60))["attacks"]

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process = None
