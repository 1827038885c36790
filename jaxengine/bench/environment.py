"""What a measurement was made on, for its report."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxengine import __version__


def environment() -> dict[str, Any]:
    """Returns versions, devices, processor, date and commit."""
    import jax

    return host_environment() | {
        "backend": jax.default_backend(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "num_devices": jax.device_count(),
    }


def host_environment() -> dict[str, Any]:
    """Returns the same without the devices, which looking at them would take from a server on this machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jaxengine": __version__,
        "commit": git_commit(),
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "flax": _version("flax"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Returns the commit of the source tree that runs, with "+changes" if it has any; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_rss_bytes() -> int | None:
    """Returns the most memory that this process has held; None where the system does not count it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return max_rss_bytes(resource.getrusage(resource.RUSAGE_SELF))


def max_rss_bytes(usage: Any) -> int:
    """Returns `ru_maxrss` in bytes: macOS counts bytes, others KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
