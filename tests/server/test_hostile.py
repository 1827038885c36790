"""Hostile requests: whatever is sent, the server lives, answers others in time, and gives its memory back.

One kind: `pytest -m slow -n 0 tests/server/test_hostile.py -k stops`. A table of what was seen is printed at the end
and written to `hostile.tsv` in the session's folder.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.hostile.send import all_attacks
from tests.server.hostile.table import BODY_LIMIT, Attack
from tests.server.hostile.watch import (
    GAP_SECONDS,
    HEALTH_SECONDS,
    MEMORY_BYTES,
    PEAK_BYTES,
    SHUTDOWN_SECONDS,
    Attacker,
    HostileServer,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ATTACKS = all_attacks()
ATTEMPTS = 3
"""A machine that has other work stalls by itself: a bound is broken if it is in each of so many attempts,"""
CERTAIN = 3
"""or by so many times in one."""
PROBE_SECONDS = 5.0
"""How long a small request of another client takes at most, right after an attack."""
OVERLOADED = (429, 503)
ENDED_SECONDS = 1
"""After `--shutdown-timeout`: the end by force, and a slow machine."""


class Figures:
    """What was seen, line by line, and a server, started again when it has died."""

    COLUMNS = ("attack", "status", "seconds", "health", "gap", "first", "peak MB", "kept MB", "own stall", "verdict")

    def __init__(self, model: Path, file: Path):
        self._model, self._file = model, file
        self._server: HostileServer | None = None
        self.rows: list[tuple[str, ...]] = []
        self.num_starts = 0
        self._file.write_text("\t".join(self.COLUMNS) + "\n")

    def server(self) -> HostileServer:
        if self._server is None or not self._server.alive:
            self.drop_server()
            self._server = HostileServer(self._model)
            self.num_starts += 1
        return self._server

    def drop_server(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None

    def add(self, *row: Any) -> None:
        self.rows.append(tuple(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row))
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\t".join(self.rows[-1]) + "\n")

    def table(self) -> str:
        rows = [self.COLUMNS, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.COLUMNS) - 1)]
        return "\n".join("  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


@pytest.fixture(scope="module")
def figures(tmp_path_factory, tiny, session_folder, request) -> Iterator[Figures]:
    figures = Figures(tiny, session_folder / "hostile.tsv")
    yield figures
    figures.drop_server()
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:  # processes of pytest-xdist have none: there is the file
        reporter.write_line("\n" + figures.table())


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    attacker = Attacker()
    yield attacker
    attacker.close()


def faults_of(figures: Figures, attacker: Attacker, attack: Attack) -> tuple[list[str], bool]:
    """What an attempt has done that it must not, and whether another attempt may show that it was the machine."""
    server = figures.server()
    before = server.memory()
    with server.watch() as seen:
        found = attacker.attack(attack.id, server)
        time.sleep(0.3)  # what it has started goes on
    status, faults = found["status"], []
    if not server.alive:
        faults.append(f"the server has ended with {server.server.process.returncode}")
    elif attack.act is None and not isinstance(status, int):
        faults.append(f"{status} instead of an answer")
    elif status == "no answer" and found["seconds"] > 30:
        faults.append("no answer, and the connection is held")
    elif isinstance(status, int) and status >= 500 and status not in OVERLOADED:
        faults.append(f"status {status}")
    lasting = bool(faults)
    if server.alive:
        faults += probe_faults(server)
    if seen.health_status != 200:
        faults.append(f"/health says {seen.health_status}")
    if seen.errors:
        faults.append(f"the neighbour is told {seen.errors[0]}")
    if seen.health > HEALTH_SECONDS:
        faults.append(f"/health takes {seen.health:.2f} s")
    if seen.gap > GAP_SECONDS:
        faults.append(f"the neighbour waits {seen.gap:.2f} s")
    if seen.health > CERTAIN * HEALTH_SECONDS or seen.gap > CERTAIN * GAP_SECONDS:
        lasting = True
    if seen.peak > server.memory_before + PEAK_BYTES:
        lasting = True
        faults.append("too much memory")
    kept = server.memory() - server.memory_before if server.alive else 0
    figures.add(
        attack.id,
        *(status, found["seconds"], seen.health, seen.gap, seen.first),
        *((seen.peak - before) >> 20, kept >> 20, seen.own, "; ".join(faults) or "ok"),
    )
    return faults, lasting


def probe_faults(server: HostileServer) -> list[str]:
    """What is wrong with answers of small requests, of text and of a form."""
    faults = []
    for what, more in (("a prompt", {}), ("a form", {"structured_outputs": {"regex": "[ab]{2}"}})):
        start = time.monotonic()
        try:
            status: int | str = server.ask("/v1/completions", {"prompt": "Hi", "max_tokens": 1} | more, timeout=20)
        except OSError as error:
            status = type(error).__name__
        seconds = time.monotonic() - start
        if status != 200 or seconds > PROBE_SECONDS:
            faults.append(f"{what} afterwards: {status} after {seconds:.1f} s")
    return faults


def test_there_are_enough():
    assert len(ATTACKS) >= 250
    assert len({attack.id for attack in ATTACKS}) == len(ATTACKS)
    assert set(AT_WORK) <= {attack.id for attack in ATTACKS}
    for attack in ATTACKS:
        if attack.make is not None:  # what is larger is refused before it is read
            assert len(attack.make().body) <= BODY_LIMIT, attack.id


def test_the_machine_is_quiet_enough(figures):
    """An idle server keeps the bounds here: else no attack can be told from the machine's other work."""
    for _ in range(ATTEMPTS):
        with figures.server().watch() as seen:
            time.sleep(5)
        figures.add("(idle)", "", 5.0, seen.health, seen.gap, seen.first, 0, 0, seen.own, "")
        if seen.health <= HEALTH_SECONDS and seen.gap <= GAP_SECONDS:
            return
    pytest.fail(f"an idle server: /health takes {seen.health:.2f} s, the neighbour waits {seen.gap:.2f} s")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_attack(figures, attacker, attack):
    for _ in range(ATTEMPTS):
        faults, lasting = faults_of(figures, attacker, attack)
        if not faults or lasting:
            break
    if faults and probe_faults(figures.server()):  # the next attack must not suffer for it
        figures.drop_server()
    assert not faults


def test_memory_is_given_back(figures):
    server = figures.server()
    kept = server.settled_memory(20) - server.memory_before
    figures.add("(memory)", "", 20.0, 0.0, 0.0, 0.0, 0, kept >> 20, 0.0, f"{figures.num_starts} starts")
    assert kept <= MEMORY_BYTES


AT_WORK = (
    *(
        "references-chain_5000-outputs",
        "numbers-multiple_of_1000003-format",
        "bombs-patterns_26-text",
        "lark-doubled_30",
    ),
    *("regexes-many_states", "templates-quiet_loops-tokenize", "validation-messages_of_numbers", "stops-100000"),
    *("prompts-prompt_of_letters", "batches-n_1000", "held-half_head_300", "held-unread_streams_30"),
    *("floods-held_grammars", "bodies-stops"),
)
"""Attacks during which the server is told to end."""


@pytest.mark.parametrize("kind", [None, *dict.fromkeys(name.split("-")[0] for name in AT_WORK)])
def test_sigterm_ends_it(figures, attacker, kind):
    """Within the shutdown's timeout, with hostile work or none under way."""
    names = {attack.id for attack in ATTACKS if attack.id in AT_WORK and attack.kind == kind}
    server = figures.server()
    working = threading.Thread(target=lambda: [attacker.attack(name, server) for name in sorted(names)])
    working.start()
    time.sleep(1.5)
    start = time.monotonic()
    server.server.process.send_signal(signal.SIGTERM)
    try:
        code: int | str = server.server.process.wait(60)
    except subprocess.TimeoutExpired:
        code = "still there"
    seconds = time.monotonic() - start
    figures.add(f"(SIGTERM) {kind}", code, seconds, 0.0, 0.0, 0.0, 0, 0, 0.0, f"bound {SHUTDOWN_SECONDS} s")
    figures.drop_server()
    working.join()
    assert code == 0
    assert seconds <= SHUTDOWN_SECONDS + ENDED_SECONDS
