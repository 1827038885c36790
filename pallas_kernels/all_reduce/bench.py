"""Speed of the all-reduce on all GPUs of this machine: `python -m jaxengine.pallas_kernels.all_reduce.bench`.

Each program holds 64 sums over the devices, one after the other, as a step of 32 layers does: either nothing but the
sums, each with residual and norm ("chain"), or those between the products of Llama-3.1-8B's layers ("layers"). Each set
of XLA's flags has a process of its own. Printed are microseconds a sum: of a chain all its time, of layers the time
over the same program without sums.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from typing import Any

SUMS = 64
DIM = 4096
DISTINCT = 8  # layers whose weights differ, more than a cache holds
EPS = 1e-5
NO_KERNEL = "--xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"
# Flags of XLA, and the variants that run under them.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "default": ("", ("none", "psum", "kernel", "fused", "kept")),
    "nccl": (NO_KERNEL, ("psum",)),
    "nccl in command buffers": (f"{NO_KERNEL} --xla_gpu_enable_command_buffer=+COLLECTIVES", ("psum",)),
    "no command buffers": ("--xla_gpu_enable_command_buffer=", ("psum", "kept")),
}


def reduce_and_norm(variant: str, part, residual, weight, workspace):
    """Returns a sum over the devices, residual and norm: (new residual, normed)."""
    from jaxengine.pallas_kernels.all_reduce import mosaic_gpu, reference

    norm = {"norm_weight": weight, "norm_eps": EPS, "norm_offset": 0.0}
    if variant == "kept":
        outs = mosaic_gpu.all_reduce(part, "model", residual=residual, workspace=workspace, **norm)
    elif variant == "fused":
        outs = mosaic_gpu.all_reduce(part, "model", residual=residual, **norm)
    else:
        if variant == "kernel":
            bare = {"residual": None, "norm_weight": None, "norm_eps": 0.0, "norm_offset": 0.0}
            part = mosaic_gpu.all_reduce(part, "model", **bare)
        axes: Any = "model" if variant == "psum" else ()
        outs = reference.all_reduce(part, axes, residual=residual, **norm)
    return outs


def inner_jit(variant: str):
    """Makes `reduce_and_norm` one function of the program, as a model's layers are: it is traced once."""
    import jax

    return jax.jit(functools.partial(reduce_and_norm, variant))


def chain(variant: str, x, weight, _, workspace):
    """Computes 64 sums; what each adds is made of the norm before it."""
    residual, normed, reduce = x, x, inner_jit(variant)
    for _ in range(SUMS):
        residual, normed = reduce(normed, residual, weight, workspace)
    return residual, normed


def layers(variant: str, x, weight, products, workspace):
    """Computes 32 layers' products, with the two sums of each."""
    import jax.numpy as jnp
    from jax import lax

    def multiply(x, w):
        dims = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32).astype(x.dtype)

    residual, normed, reduce = x, x, inner_jit(variant)
    for i in range(SUMS // 2):
        qkv, o, gate_up, down = products[i % DISTINCT]
        heads = multiply(normed, qkv)[:, : o.shape[1]]
        residual, normed = reduce(multiply(heads, o), residual, weight, workspace)
        gate, up = jnp.split(multiply(normed, gate_up), 2, axis=1)
        residual, normed = reduce(multiply(gate * up, down), residual, weight, workspace)
    return residual, normed


def workspace_of(variant: str, mesh) -> list[Any]:
    """Returns one of all devices, zeroed and there; nothing where the variant has none."""
    import jax

    from jaxengine.pallas_kernels.all_reduce import make_workspace

    if variant != "kept":
        return []
    place = jax.NamedSharding(mesh, jax.P(None, "model"))
    return jax.block_until_ready([make_workspace(mesh.size, DIM, "bfloat16", place)])


def make_step(body):
    """Returns a jitted program of `body(*args, workspace)` on each device's part of the arguments."""
    import jax

    def step(args, workspace):
        refs = jax.tree.map(jax.new_ref, workspace)

        def local(args, refs):
            outs = body(*jax.tree.map(lambda x: x[0], args), *(refs or [None]))
            return jax.tree.map(lambda out: out[None], outs)

        specs = jax.P("model"), jax.P(None, "model")
        outs = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(args, refs)
        return outs, jax.tree.map(jax.freeze, refs)

    return jax.jit(step, donate_argnums=1)


def run(variants: tuple[str, ...], kinds: dict[str, list[int]], deadline: float) -> None:
    """Times programs, and prints a line of JSON for each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    size = len(jax.devices())
    mesh = jax.make_mesh((size,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.set_mesh(mesh)
    spec = jax.P("model")  # every argument and result has a part for each device

    def draw(key: int, *shape: int, scale: float = 1.0, copies: int = 1):
        def make():
            x = jax.random.normal(jax.random.key(key), (size // copies, *shape)) * scale
            return jnp.broadcast_to(x.astype(jnp.bfloat16), (size, *shape))

        return jax.jit(make, out_shardings=jax.NamedSharding(mesh, spec))()

    products: list[Any] = []
    shapes = ((6144 // size, DIM), (DIM, DIM // size), (28672 // size, DIM), (DIM, 14336 // size))
    for kind, token_counts in kinds.items():
        for num_tokens in token_counts:
            x, weight = draw(1, num_tokens, DIM, copies=size), draw(2, DIM, copies=size)
            if kind == "layers" and not products:
                products = [[draw(9, *s, scale=s[1] ** -0.5) for s in shapes] for _ in range(DISTINCT)]
            results: dict[str, Any] = {}
            for variant in variants:
                if time.time() > deadline:
                    return
                body = functools.partial({"chain": chain, "layers": layers}[kind], variant)
                args, workspace = (x, weight, products if kind == "layers" else []), workspace_of(variant, mesh)
                started = time.perf_counter()
                step = make_step(body).lower(args, workspace).compile()
                compile_s = time.perf_counter() - started
                first, workspace = step(args, workspace)
                first = jax.device_get(first)
                count, times = 20, []
                for _ in range(6):
                    outs = []
                    started = time.perf_counter()
                    for _ in range(count):
                        out, workspace = step(args, workspace)
                        outs.append(out)
                    jax.block_until_ready(outs)
                    times.append((time.perf_counter() - started) / count)
                wrong = sum(
                    not all(np.array_equal(a, b) for a, b in zip(jax.device_get(out), first, strict=True))
                    for out in outs
                )
                results[variant] = first
                line = {
                    "kind": kind,
                    "T": num_tokens,
                    "variant": variant,
                    "us": sorted(times)[len(times) // 2] * 1e6,
                    "best_us": min(times) * 1e6,
                    "compile_s": round(compile_s, 1),
                    "runs_that_differ": wrong,
                    "finite": bool(np.isfinite(first[1].astype(np.float32)).all()),
                }
                if variant != "none":
                    line["devices_differ"] = not all((out == out[:1]).all() for out in first)
                if "psum" in results and variant != "psum":
                    line["error"] = [
                        float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max())
                        for a, b in zip(first, results["psum"], strict=True)
                    ]
                print(json.dumps(line), flush=True)


def profile(token_counts: list[int]) -> None:
    """Prints how long the kernels of a chain take on the first GPU, by the profiler (without command buffers)."""
    import collections
    import glob
    import tempfile

    import jax

    size = len(jax.devices())
    mesh = jax.make_mesh((size,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.set_mesh(mesh)
    for num_tokens in token_counts:
        for variant in ("psum", "fused", "kept"):
            step = make_step(functools.partial(chain, variant))
            args = *(jax.numpy.ones((size, *shape), "bfloat16") for shape in ((num_tokens, DIM), (DIM,))), []
            _, workspace = jax.block_until_ready(step(args, workspace_of(variant, mesh)))
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    for _ in range(3):
                        out, workspace = step(args, workspace)
                    jax.block_until_ready(out)
                [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
                planes = jax.profiler.ProfileData.from_file(path).planes
                kernels: dict[str, list[float]] = collections.defaultdict(list)
                for plane in planes:
                    for line in plane.lines if plane.name == "/device:GPU:0" else ():
                        if line.name.startswith("Stream"):
                            for event in line.events:
                                kernels[event.name].append(event.duration_ns / 1e3)
            longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:6]
            each = {name[:60]: [len(us), round(sorted(us)[len(us) // 2], 2)] for name, us in longest}
            print(json.dumps({"profile": variant, "T": num_tokens, "count and median us": each}), flush=True)


def check(token_counts: list[int]) -> None:
    """Compares one sum each of random numbers with float64 on the host; prints what is wrong."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    size = len(jax.devices())
    mesh = jax.make_mesh((size,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.set_mesh(mesh)
    rng = np.random.default_rng(0)
    workspace = workspace_of("kept", mesh)  # of all sizes
    for num_tokens in [*token_counts, *reversed(token_counts)]:
        parts, residual = (jnp.asarray(rng.normal(size=(size, num_tokens, DIM)), jnp.bfloat16) for _ in range(2))
        residual = jnp.broadcast_to(residual[:1], residual.shape)
        weight = jnp.asarray(rng.normal(size=(size, DIM)), jnp.bfloat16)
        weight = jnp.broadcast_to(weight[:1], weight.shape)
        for variant in ("psum", "kernel", "fused", "kept"):
            step = make_step(functools.partial(reduce_and_norm, variant))
            outs, kept = step((parts, residual, weight), workspace if variant == "kept" else [])
            workspace = kept or workspace
            got, normed = (np.asarray(out, np.float64) for out in jax.device_get(outs))
            total = np.asarray(np.asarray(parts, np.float64).sum(0), jnp.bfloat16).astype(np.float64)
            want = np.asarray(total + np.asarray(residual[0], np.float64), jnp.bfloat16).astype(np.float64)
            want_normed = want / np.sqrt((want**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight[0], np.float64)
            line = {
                "check": variant,
                "T": num_tokens,
                "sum_error": float(np.abs(got - want).max()),
                "norm_error": float((np.abs(normed - want_normed) / (np.abs(want_normed) + 1e-3)).max()),
                "devices_differ": not all((out == out[:1]).all() for out in (got, normed)),
            }
            print(json.dumps(line), flush=True)


def spawn(setting: str, flags: str, arguments: list[str], limit: float) -> list[dict[str, Any]]:
    """Runs this file in a process with XLA's flags; returns its lines."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-m", "jaxengine.pallas_kernels.all_reduce.bench", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        out, errors = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out = error.stdout or ""
        out, errors = out if isinstance(out, str) else out.decode(), f"still running after {limit:.0f} s"
    if errors:
        print(f"{setting}: {errors[-1500:]}", flush=True)
    return [json.loads(line) | {"setting": setting} for line in out.splitlines() if line.startswith("{")]


def table(lines: list[dict[str, Any]]) -> None:
    """Prints microseconds a sum."""
    floors = {line["T"]: line["us"] for line in lines if line.get("variant") == "none" and line["kind"] == "layers"}
    print(f"{'':34}{'kind':8}{'T':>5}{'us/sum':>9}{'program us':>12}{'compile s':>11}  remarks")
    for line in lines:
        if "kind" not in line:
            continue
        us = line["us"]
        each = us / SUMS if line["kind"] == "chain" else (us - floors.get(line["T"], 0.0)) / SUMS
        names = ("runs_that_differ", "devices_differ", "error", "finite")
        remarks = " ".join(f"{name}={line[name]}" for name in names if name in line)
        print(
            f"{line['setting'] + ', ' + line['variant']:34}{line['kind']:8}{line['T']:5}{each:9.2f}{us:12.0f}"
            f"{line['compile_s']:11.1f}  {remarks}"
        )


def main() -> None:
    """Runs every setting in a process of its own, within the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=145, help="seconds for everything")
    parser.add_argument("--chain", type=int, nargs="*", default=[1, 16, 64, 256], help="tokens of the chains")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 64], help="tokens of the layers")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--json", help="file for all lines")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = {"chain": args.chain, "layers": args.layers}
    if args.child in ("check", "profile"):
        return {"check": check, "profile": profile}[args.child](args.chain)
    if args.child:
        return run(SETTINGS[args.child][1], kinds, time.time() + args.limit)
    end = time.time() + args.limit
    lines = spawn("check", "", ["--child", "check", "--chain", *map(str, args.chain)], args.limit / 3)
    for line in lines:
        print(line, flush=True)
    for i, name in enumerate(args.settings):
        left = end - time.time() - 15 * (len(args.settings) - i)
        if left < 10:
            print(f"{name}: no time left")
            continue
        arguments = ["--child", name, "--limit", str(left - 5)]
        for kind, counts in kinds.items():
            arguments += [f"--{kind}", *map(str, counts)]
        lines += spawn(name, SETTINGS[name][0], arguments, left)
    table(lines)
    for line in spawn("profile", "", ["--child", "profile", "--chain", "1", "64"], max(end - time.time(), 10)):
        print(line)
        lines.append(line)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
