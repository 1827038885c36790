"""Measurements as pictures; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from jaxengine.bench.serve import Record, ServeResult

NUM_BINS = 100
"""Steps of the run's course."""


def plot_serve(result: ServeResult, title: str, path: Path) -> None:
    """Draws how latencies are distributed, and the course of a run.

    Args:
        title: What was measured.
        path: Where the picture goes; its suffix says in which format.
    """
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(_headline(result, title))
    axes = figure.subplots(2, 2)
    good = [record for record in result.records if record.error is None]
    seconds = {"time to first token": [r.ttft for r in good], "end to end": [r.e2e for r in good]}
    _distribution(axes[0, 0], "Latency of requests", "seconds", seconds)
    tpot = [value * 1000 for record in good if (value := record.tpot) is not None]
    itl = [value * 1000 for record in good for value in record.itl]
    milliseconds = {"time per output token": tpot, "inter-token latency": itl}
    _distribution(axes[0, 1], "Latency of tokens", "milliseconds", milliseconds, is_log=True)
    _course(axes[1, 0], result)
    _requests(axes[1, 1], result.records)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _headline(result: ServeResult, title: str) -> str:
    rate = "all at once" if result.request_rate is None else f"{result.request_rate:g} requests/s"
    limit = "" if result.max_concurrency is None else f", at most {result.max_concurrency} at once"
    failed = f", {result.num_failed} failed" if result.num_failed else ""
    return f"{title}\n{rate}{limit}: {result.output_tokens_per_s:.1f} output tokens/s{failed}"


def _distribution(axis: Any, title: str, unit: str, values: dict[str, list[float]], *, is_log: bool = False) -> None:
    """How many percent of the values are at most so large."""
    for (name, found), color in zip(values.items(), ("C0", "C1"), strict=True):
        if found:
            ordered = sorted(found)
            percents = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
            axis.step([ordered[0], *ordered], [0.0, *percents], where="post", color=color, label=name)
    for rank in (50, 90, 99):
        axis.axhline(rank, color="0.8", linewidth=0.8, zorder=0)
    axis.set(title=title, xlabel=unit, ylabel="% at most so long", ylim=(0, 100.5), yticks=[0, 25, 50, 75, 90, 99])
    if is_log and any(value > 0 for found in values.values() for value in found):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
    axis.legend(loc="lower right")


def _course(axis: Any, result: ServeResult) -> None:
    """Tokens a second, and requests in flight."""
    times = [time for record in result.records for time in record.token_times]
    end = max((record.ended for record in result.records), default=0.0) or 1.0
    width = end / NUM_BINS
    counts = [0] * NUM_BINS
    for time in times:
        counts[min(NUM_BINS - 1, int(time / width))] += 1
    edges = [place * width for place in range(NUM_BINS + 1)]
    axis.stairs([count / width for count in counts], edges, color="C0", fill=True, alpha=0.35)
    axis.set(title="Course of the run", xlabel="seconds", xlim=(0, end))
    axis.set_ylabel("stream events/s", color="C0")
    axis.set_ylim(bottom=0)
    changes = sorted([(r.sent, 1) for r in result.records] + [(r.ended, -1) for r in result.records])
    at, running, level = [0.0], [0], 0
    for time, change in changes:
        level += change
        at.append(time)
        running.append(level)
    right = axis.twinx()
    right.step(at, running, where="post", color="C3")
    right.set_ylabel("requests in flight", color="C3")
    right.set_ylim(bottom=0)


def _requests(axis: Any, records: Sequence[Record]) -> None:
    """A line for each request: until its first token, and after it."""
    for place, record in enumerate(records):
        if record.error is None:
            axis.hlines(place, record.sent, record.sent + record.ttft, color="C1", linewidth=_line(len(records)))
            axis.hlines(place, record.sent + record.ttft, record.ended, color="C0", linewidth=_line(len(records)))
        else:
            axis.plot(record.sent, place, "x", color="C3")
    for color, label in (("C1", "until the first token"), ("C0", "after it"), ("C3", "failed")):
        if color != "C3" or any(record.error is not None for record in records):
            axis.plot([], [], color=color, marker="x" if color == "C3" else None, label=label)
    axis.set(title="Requests", xlabel="seconds", ylabel="request", ylim=(-1, len(records)))
    axis.set_xlim(left=0)
    axis.invert_yaxis()
    axis.legend(loc="upper right")


def _line(num_requests: int) -> float:
    """Width in points, so that lines fill the picture and do not overlap much."""
    return max(0.5, min(6.0, 200 / num_requests))
