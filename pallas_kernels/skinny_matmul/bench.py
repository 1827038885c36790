"""Speed of products of few rows: `python -m jaxengine.pallas_kernels.skinny_matmul.bench [--tune N]`.

Times are of the kernels on the device, from a profile: launching them takes the host longer than some run. Each
product goes around among weights that do not fit the L2 cache. Products are compiled in processes of their own, all at
once, and measured one after the other, so that one that fails or hangs takes no other with it.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

SHAPES = {
    "llama-8b qkv": (6144, 4096, ""),
    "llama-8b o": (4096, 4096, ""),
    "llama-8b gate_up": (28672, 4096, "gated"),
    "llama-8b down": (4096, 14336, ""),
    "llama-8b head": (128256, 4096, "head"),
    "llama-1b qkv": (3072, 2048, ""),
    "llama-1b o": (2048, 2048, ""),
    "llama-1b gate_up": (16384, 2048, "gated"),
    "llama-1b down": (2048, 8192, ""),
    "qwen3-0.6b qkv": (4096, 1024, ""),
    "qwen3-0.6b o": (1024, 2048, ""),
    "qwen3-0.6b gate_up": (6144, 1024, "gated"),
    "qwen3-0.6b down": (1024, 3072, ""),
    "qwen3-0.6b head": (151936, 1024, "head"),
}
WEIGHT_BYTES = 400e6  # of the weights that a product goes around among
ROUNDS = 3
NORMS = ((4096, 4), (4096, 1), (2048, 4), (1024, 4))  # D and parts of the additions and norms


@dataclasses.dataclass(frozen=True)
class Job:
    """A product of `rows` rows by XLA (no `config`), or cut in a certain way."""

    rows: int
    config: Any = None


def xla_product(x, weight, kind: str):
    """Computes a product as the model's layers ask for it."""
    import jax
    import jax.numpy as jnp

    product = jnp.dot(x, weight.T, preferred_element_type=jnp.float32)
    if kind == "head":
        return product
    if kind == "gated":
        gate, up = jnp.split(product.astype(x.dtype).astype(jnp.float32), 2, axis=1)
        product = jax.nn.silu(gate) * up
    return product.astype(x.dtype)


def our_product(x, weight, kind: str, config):
    """Runs the kernel with a given cut."""
    import jax.numpy as jnp

    from jaxengine.pallas_kernels.skinny_matmul.mosaic_gpu import product

    return product(x, weight, config, gated=kind == "gated", out_dtype=jnp.float32 if kind == "head" else None)


def device_times(runs: list[tuple[Any, list[tuple]]], rounds: int) -> list[list[float]]:
    """Returns the seconds that the device spends in the kernels of each call, from one profile.

    Args:
      runs: functions, each with the arguments of the calls of a round.
      rounds: of each function's calls.
    """
    import jax
    import jax.numpy as jnp

    border = jax.jit(jnp.tan)  # its kernel parts the functions' in the profile
    mark = jax.block_until_ready(border(jnp.zeros(7)))
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for function, arguments in runs:
                mark = jax.block_until_ready(border(mark))
                out = None
                for args in arguments * rounds:
                    out = function(*args)
                jax.block_until_ready(out)
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        events = [
            (event.start_ns, event.duration_ns, event.name)
            for plane in jax.profiler.ProfileData.from_file(file).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if not event.name.startswith("Memcpy")
        ]
    if not events:
        raise RuntimeError("no kernels of a GPU in the profile")
    events.sort()
    found: list[list[float]] = []
    for _, duration, name in events:
        if name == events[0][2]:
            found.append([])
        else:
            found[-1].append(duration / 1e9)
    if len(found) != len(runs):
        raise RuntimeError(
            f"{len(found)} functions in the profile of {len(runs)}: {sorted({e[2] for e in events})[:8]}"
        )
    return [_per_call(times, rounds * len(arguments)) for times, (_, arguments) in zip(found, runs, strict=True)]


def _per_call(times: list[float], calls: int) -> list[float]:
    """Returns the sums of each call's kernels; NaN if the calls' numbers of kernels differ."""
    if not times or len(times) % calls:
        return [float("nan")]
    each = len(times) // calls
    return [sum(times[i : i + each]) for i in range(0, len(times), each)]


def list_jobs(name: str, rows: list[int], num_configs: int, num_sms: int) -> list[Job]:
    """Returns XLA's and ours: as it would be cut, and then the most promising other ways."""
    from jaxengine.pallas_kernels.skinny_matmul.config import candidates, choose_config

    size_n, size_k, kind = SHAPES[name]
    jobs = []
    for num_rows in rows:
        chosen = choose_config(num_rows, size_n, size_k, gated=kind == "gated")
        others = candidates(num_rows, size_n, size_k, num_sms, gated=kind == "gated")
        configs = [c for c in (chosen, *others) if c is not None and (kind != "head" or c.splits == 1)]
        # The best of each tile; and the best two with longer steps.
        of_tiles = {(c.tile_n, c.occupancy): c for c in reversed(configs[1:])}
        long = [dataclasses.replace(c, tile_k=128) for c in configs[1:3]]
        long = [c for c in long if c.is_possible(num_rows, size_n, size_k, gated=kind == "gated")]
        ordered = [c for c in configs if c in of_tiles.values()]
        configs = list(dict.fromkeys([*configs[:1], *ordered[:3], *long, *ordered[3:]]))[:num_configs]
        jobs += [Job(num_rows), *(Job(num_rows, config) for config in configs)]
    return jobs


def work(name: str, rows: list[int], num_configs: int, seconds: float) -> None:
    """Compiles one product's jobs, waits for a line on the standard input, measures, and prints lines of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    begin = time.monotonic()
    size_n, size_k, kind = SHAPES[name]
    jobs = list_jobs(name, rows, num_configs, getattr(jax.devices()[0], "core_count", None) or 132)

    def compile_job(job: Job):
        function = functools.partial(xla_product if job.config is None else our_product, kind=kind)
        if job.config is not None:
            function = functools.partial(function, config=job.config)
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((job.rows, size_k), (size_n, size_k))]
        return jax.jit(function).lower(*shapes).compile()

    threads = concurrent.futures.ThreadPoolExecutor(4)
    compiled = {job: threads.submit(compile_job, job) for job in jobs}
    concurrent.futures.wait(compiled.values(), timeout=seconds - (time.monotonic() - begin))
    late = sum(future.cancel() for future in compiled.values())
    print(json.dumps({"compiled": len(jobs) - late, "of": len(jobs)}), flush=True)
    if not sys.stdin.readline():  # nobody is left who would read what is measured
        os._exit(1)
    key = jax.random.key(size_n + size_k)
    count = max(2, min(100, round(WEIGHT_BYTES / (2 * size_n * size_k))))
    draw = jax.jit(lambda key: jax.random.normal(key, (size_n, size_k), jnp.bfloat16) * 0.02)
    weights = [draw(jax.random.fold_in(key, i)) for i in range(count)]
    for num_rows in rows:
        x = jax.random.normal(jax.random.fold_in(key, num_rows), (num_rows, size_k), jnp.bfloat16)
        found, runs, want = [], [], None
        for job in (job for job in jobs if job.rows == num_rows and not compiled[job].cancelled()):
            row: dict[str, Any] = {"rows": num_rows, "config": job.config and dataclasses.asdict(job.config)}
            try:
                function = compiled[job].result(timeout=1)
                got = np.asarray(function(x, weights[0]), np.float32)
                got = got.sum(0) if got.ndim == 3 else got
                want = got if want is None else want
                row["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            except Exception as error:  # the others go on
                print(json.dumps(row | {"failed": describe(error)}), flush=True)
                continue
            found.append(row)
            runs.append((function, [(x, w) for w in weights]))
        times = device_times(runs, ROUNDS) if runs else []
        for row, seconds_of_calls in zip(found, times, strict=True):
            print(json.dumps(row | {"seconds": statistics.median(seconds_of_calls)}), flush=True)
    os._exit(0)  # whatever still compiles


def describe(error: Exception) -> str:
    """Returns an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure_norms(rows: list[int]) -> None:
    """Measures `add_norm` and XLA's; prints lines of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxengine.pallas_kernels.add_norm import mosaic_gpu, reference

    for dim, num_parts in NORMS:
        for num_rows in rows:
            key = jax.random.key(dim)
            residual = jax.random.normal(key, (num_rows, dim), jnp.bfloat16)
            parts = jax.random.normal(key, (num_parts, num_rows, dim), jnp.float32)
            args = residual, parts, jnp.ones(dim, jnp.bfloat16)
            options = {"eps": 1e-5, "offset": 0.0}
            calls = [jax.jit(functools.partial(f, **options)) for f in (reference.add_norm, mosaic_gpu.add_norm)]
            row: dict[str, Any] = {"name": f"add_norm {num_parts} x {dim}", "norm_rows": num_rows}
            try:
                want, got = (np.asarray(call(*args)[1], np.float32) for call in calls)
                row["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
                xla, ours = device_times([(call, [args]) for call in calls], 50)
                row |= {"xla": statistics.median(xla), "seconds": statistics.median(ours)}
            except Exception as error:  # the others go on
                row["failed"] = describe(error)
            print(json.dumps(row), flush=True)


def copy_rate() -> float:
    """Returns bytes per second, read and written, of a large addition."""
    import jax
    import jax.numpy as jnp

    x, y = (jax.random.normal(jax.random.key(i), (1 << 28,), jnp.bfloat16) for i in range(2))
    add = jax.jit(jnp.add)
    jax.block_until_ready(add(x, y))
    return 3 * x.nbytes / statistics.median(device_times([(add, [(x, y)])], 10)[0])


def start(arguments: list[str]) -> subprocess.Popen:
    """Starts this benchmark in a process of its own."""
    settings = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", __spec__.name if __spec__ else __file__, *arguments]
    return subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, seconds: float) -> list[dict[str, Any]]:
    """Lets a process measure, and ends it when its time is over; the lines that it printed."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        out, _ = process.communicate("go\n")
    finally:
        timer.cancel()
    lines = out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    if process.returncode:
        print(f"    ended with {process.returncode} after {len(rows)} lines", flush=True)
    return rows


def print_rows(name: str, rows: list[dict[str, Any]], rate: float, best: int) -> None:
    """Prints XLA's time and those of the best ways to cut; what failed or is wrong."""
    size_n, size_k, _ = SHAPES[name]
    for num_rows in sorted({row["rows"] for row in rows}):
        mine = [row for row in rows if row["rows"] == num_rows]
        xla = next((row["seconds"] for row in mine if row["config"] is None and "seconds" in row), None)
        ours = sorted((r for r in mine if r["config"] and "seconds" in r), key=lambda r: r["seconds"])
        for row in ours[:best]:
            bandwidth = 2 * size_n * size_k / row["seconds"]
            config = " ".join(f"{k}={v}" for k, v in row["config"].items())
            wrong = "  WRONG" if row["error"] > 1e-2 else ""
            print(
                f"{name:<20} {size_n:>6}x{size_k:<6} {num_rows:>4} {xla * 1e6 if xla else float('nan'):8.1f} "
                f"{row['seconds'] * 1e6:8.1f} {bandwidth / 1e9:6.0f} {bandwidth / rate:5.0%}  {config}{wrong}",
                flush=True,
            )
        for row in mine:
            if "failed" in row:
                print(f"    {num_rows} rows, {row['config']}: {row['failed']}", flush=True)


def main() -> None:
    """Measures, or tunes, the products that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64, 128, 256])
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--tune", type=int, default=1, help="ways to cut each product that are tried")
    parser.add_argument("--best", type=int, default=1, help="ways that are printed, the fastest first")
    parser.add_argument("--seconds", type=float, default=90, help="for compiling; what is not ready then is left out")
    parser.add_argument("--timeout", type=float, default=40, help="for measuring one shape")
    parser.add_argument("--json", help="also write all rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "norms":
        print(json.dumps({"copy": copy_rate()}), flush=True)
        return measure_norms(args.rows)
    if args.worker:
        return work(args.worker, args.rows, args.tune, args.seconds)
    begin = time.monotonic()
    rows = [str(r) for r in args.rows]
    names = [name for name in SHAPES if args.only in name]
    options = ["--rows", *rows, "--tune", str(args.tune), "--seconds", str(args.seconds)]
    workers = {name: start(["--worker", name, *options]) for name in names}
    for name, worker in workers.items():
        print(f"{name}: {(worker.stdout.readline() if worker.stdout else '').strip()}", flush=True)
    print(f"compiled after {time.monotonic() - begin:.0f} s")
    norms = finish(start(["--worker", "norms", "--rows", *rows]), args.timeout)
    rate = next((row["copy"] for row in norms if "copy" in row), float("nan"))
    print(f"copy {rate / 1e9:.0f} GB/s")
    for row in (row for row in norms if "name" in row):
        times = (
            f"XLA {row['xla'] * 1e6:6.2f} us, ours {row['seconds'] * 1e6:6.2f}, error {row['error']:.0e}"
            if "xla" in row
            else row["failed"]
        )
        print(f"{row['name']:<20} {row['norm_rows']:>4} rows: {times}", flush=True)
    print(
        f"{'product':<20} {'N x K':>13} {'T':>4} {'XLA us':>8} {'ours us':>8} {'GB/s':>6} {'copy':>5}  cut", flush=True
    )
    everything = list(norms)
    for name, worker in workers.items():
        found = finish(worker, args.timeout)
        everything += [row | {"name": name} for row in found]
        print_rows(name, found, rate, args.best)
    print(f"all after {time.monotonic() - begin:.0f} s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
