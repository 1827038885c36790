"""Folders for the sockets between processes: short paths, for this user alone, and none left of the dead."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders of killed processes stay there
    fcntl = None

PREFIX = "jaxengine-"
MAX_PATH = 90
"""Bytes: a socket's path has 104 at most on macOS and 108 on Linux, its name included."""
MIN_AGE = 60.0
"""Seconds: a younger one may not hold its lock yet."""
_LOCK = "lock"


class SocketFolder:
    """A new folder that only this user may open.

    A lock in it is held as long as this process lives: whoever makes the next one removes those that nobody holds.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        """Makes it in the system's folder for temporary files or, where that has too long a path, in /tmp.

        Raises:
            OSError: There is none that can be written to.
        """
        parent = _parent()
        for stale in _stale(parent):
            shutil.rmtree(stale, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        if fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Removes it with all that it holds. Can be called again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        shutil.rmtree(self.path, ignore_errors=True)


def _parent() -> Path:
    found = Path(tempfile.gettempdir())
    if len(os.fsencode(found)) + len(PREFIX) + 10 <= MAX_PATH:
        return found
    short = Path("/tmp")
    if not os.access(short, os.W_OK | os.X_OK):
        raise OSError(
            f"TMPDIR={str(found)!r}: a socket's path has {MAX_PATH} bytes at most, and /tmp cannot be written to; "
            "set TMPDIR to a shorter folder"
        )
    return short


def _stale(parent: Path) -> Iterator[Path]:
    """Folders of this user's processes that have been killed."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            about = folder.lstat()
            if about.st_uid != os.getuid() or time.time() - about.st_mtime < MIN_AGE:
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # no folder of ours, or one that is being made or removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            yield folder
        finally:
            os.close(lock)
