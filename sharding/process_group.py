"""Processes of one program that meet at the first one's address, notice when one dies, and gather what they have.

Plain TCP beside JAX: JAX ends a process whose peers do not come, without saying who is missing, and it knows nothing of
processes that share no devices.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from typing import Any

MEET_SECONDS = 25.0
"""How long processes wait for each other when they start."""
BEAT_SECONDS = 4.0
DEAD_SECONDS = 20.0
"""After how long without a sign of life a process counts as dead: one that has ended is noticed at once."""
GREETING_SECONDS = 2.0
GREETING = "jaxengine"
_HEADER = struct.Struct("!I")


class ProcessGroup:
    """Ranks 0 to `size - 1`. Rank 0 is connected to every other one.

    When a process of the group ends without `close`, all the others end with exit code 1 and say why.
    """

    def __init__(self, rank: int, size: int, host: str, port: int, *, names: tuple[str, str] = ("size", "port")):
        """Waits until all processes are there.

        Args:
            rank: Of this process.
            size: Number of processes.
            host: Where rank 0 runs.
            port: Where it listens.
            names: What users call `size` and `port`, for messages.

        Raises:
            ValueError: The rank is not one of the group, the port is in use, the processes disagree on the size, or
                some do not come in time.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not one of {names[0]}={size}: ranks are 0 to {size - 1}")
        self.rank, self.size = rank, size
        self._names, self._where = names, f"{host}:{port}"
        self._deadline = time.monotonic() + MEET_SECONDS
        self._peers = self._accept_all(port) if rank == 0 else {0: self._join(host, port)}
        self._received: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in self._peers}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def gather(self, value: Any) -> list[Any] | None:
        """Brings everybody's value, which JSON can express, to rank 0.

        Returns:
            The values in the order of ranks; None on other ranks than 0.

        Raises:
            RuntimeError: A rank has left the group.
        """
        if self.rank > 0:
            self._send(0, value)
            return None
        values = [value]
        for peer in range(1, self.size):
            message = self._received[peer].get()
            if message["is_last"]:
                raise RuntimeError(f"rank {peer} of {self.size} has left and given nothing")
            values.append(message["value"])
        return values

    def close(self) -> None:
        """Leaves the group; the others go on."""
        self._closed.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                self._send(peer, None, is_last=True)
        for connection in self._peers.values():
            connection.close()

    # Meeting

    def _accept_all(self, port: int) -> dict[int, socket.socket]:
        peers: dict[int, socket.socket] = {}
        try:
            server = socket.create_server(("", port), backlog=self.size)
        except OSError as error:
            reason = "another program listens there" if error.errno == errno.EADDRINUSE else str(error)
            raise ValueError(f"{self._names[1]}={port} cannot be used: {reason}") from error
        problem = None
        with server:
            while len(peers) < self.size - 1 and problem is None:
                server.settimeout(max(self._deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self.size)) - set(peers))
                    problem = f"ranks {missing} of {self._names[0]}={self.size} did not come in {MEET_SECONDS:.0f} s"
                    break
                connection.settimeout(GREETING_SECONDS)
                try:
                    greeting, rank, size = _receive(connection)
                except (OSError, ValueError, TypeError):
                    greeting = None
                if greeting != GREETING:  # not one of ours
                    connection.close()
                    continue
                if size != self.size:
                    problem = f"rank {rank} has {self._names[0]}={size}, but rank 0 has {self.size}"
                elif rank in peers:
                    problem = f"rank {rank} came twice"
                connection.settimeout(DEAD_SECONDS)
                peers[rank] = connection
        for connection in peers.values():
            with contextlib.suppress(OSError):
                _send(connection, problem)
                if problem is not None:
                    connection.close()
        if problem is not None:
            raise ValueError(f"{self._where}: {problem}")
        return peers

    def _join(self, host: str, port: int) -> socket.socket:
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=2)
                break
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise ValueError(f"{self._where}: rank 0 does not answer: {error}") from error
                time.sleep(0.1)
        try:
            connection.settimeout(MEET_SECONDS + 1)  # rank 0 knows better what is missing: let it tell
            _send(connection, [GREETING, self.rank, self.size])
            problem = _receive(connection)
        except (OSError, ValueError) as error:
            connection.close()
            raise ValueError(f"{self._where}: rank 0 has gone, or something else listens there") from error
        if problem is not None:
            connection.close()
            raise ValueError(f"{self._where}: {problem}")
        connection.settimeout(DEAD_SECONDS)
        return connection

    # Living

    def _send(self, peer: int, value: Any, *, is_last: bool = False) -> None:
        with self._lock:
            _send(self._peers[peer], {"value": value, "is_last": is_last})

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            for connection in self._peers.values():
                with contextlib.suppress(OSError), self._lock:  # `_listen` tells
                    _send(connection, None)

    def _listen(self, peer: int) -> None:
        try:
            is_last = False
            while not is_last:
                message = _receive(self._peers[peer])
                if message is not None:
                    self._received[peer].put(message)
                    is_last = message["is_last"]
        except (OSError, ValueError) as error:
            if self._closed.is_set():
                return
            reason = f"gave no sign of life for {DEAD_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "has died"
            # The main thread may be anywhere, in a step that never ends, too.
            print(f"rank {self.rank}: rank {peer} of {self.size} {reason}: giving up", file=sys.stderr, flush=True)
            os._exit(1)


def _send(connection: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    connection.sendall(_HEADER.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    """Returns one value; raises OSError at the end of the connection, ValueError for what is not JSON."""
    (size,) = _HEADER.unpack(_receive_bytes(connection, _HEADER.size))
    return json.loads(_receive_bytes(connection, size))


def _receive_bytes(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionResetError("the connection has ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
