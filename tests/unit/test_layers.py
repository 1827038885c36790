"""Dependencies point one way: cli -> llm -> engine -> scheduler, kv_cache, runner -> models, sampling -> kernels."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxengine"
LINKED = ("models", "pallas_kernels", "sharding")

# Each part may import itself, PLAIN and the parts named here.
PLAIN = {"bounded_json", "config", "host_memory", "messages", "sampling_params", "outputs", "request", "__init__"}
MODELS = {"models", "pallas_kernels", "sharding"}
RUNNER = {"structured", "runner", "sampling", "scheduler", *MODELS}
ENGINE = {"engine", "workers", "engine_args", "metrics", "loading", "kv_cache", *RUNNER}
ALLOWED = {
    "__init__": {"engine_args", "llm"},
    "bounded_json": set(),
    "config": set(),
    "host_memory": set(),
    "messages": set(),
    "outputs": set(),
    "request": set(),
    "sampling_params": set(),
    "metrics": set(),
    "pallas_kernels": set(),
    "sharding": set(),
    "models": MODELS,
    "sampling": MODELS,
    "kv_cache": set(),
    "scheduler": {"kv_cache"},
    "structured": {"scheduler"},
    "workers": {"loading", "structured"},
    "loading": MODELS,
    "runner": {"loading", *RUNNER},
    "engine_args": {"loading", "models", "pallas_kernels", "runner"},
    "engine": ENGINE,
    "llm": ENGINE,
    "bench": {"llm", *ENGINE},
    "plan": {"bench", *ENGINE},
    "server": ENGINE,
    "cli": {"llm", "bench", "plan", "server", *ENGINE},
    "ray": {"engine_args", "llm"},
    "__main__": {"cli"},
}
WITHOUT_JAX = [
    "jaxengine",
    "jaxengine.cli.main",
    "jaxengine.config",
    "jaxengine.engine_args",
    "jaxengine.kv_cache",
    "jaxengine.kv_cache.block_pool",
    "jaxengine.kv_cache.manager",
    "jaxengine.kv_cache.prefix",
    "jaxengine.outputs",
    "jaxengine.request",
    "jaxengine.sampling_params",
    "jaxengine.scheduler",
    "jaxengine.scheduler.batch",
    "jaxengine.scheduler.policy",
    "jaxengine.scheduler.scheduler",
    "jaxengine.scheduler.shards",
]
SERVING = ["jaxengine.engine.async_llm", "jaxengine.engine.core_client", "jaxengine.server.app", "jaxengine.server.run"]
"""A server's own process leaves the device to the engine's."""
LAZY = {"jaxengine.engine_args"}
"""Import jax when they are called."""


def python_files() -> list[Path]:
    """Every module, linked folders included, by its path inside the package."""
    found = []
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found)


def part_of(module: str) -> str:
    """The layer of a module: `jaxengine.engine.core` -> engine."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too, but not those for type checkers only."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def test_imports_point_downwards():
    wrong = []
    for path in python_files():
        own = part_of(module_name(path))
        assert own in ALLOWED, f"{own} is a new part: say in ALLOWED what it may import"
        allowed = {own, *PLAIN, *ALLOWED[own]}
        ours = [name for name in imports(path) if name.split(".")[0] == "jaxengine"]
        wrong += [f"{module_name(path)} imports {name}" for name in ours if part_of(name) not in allowed]
    assert not wrong


def test_nothing_imports_the_linked_folders_bare():
    wrong = [(module_name(path), name) for path in python_files() for name in imports(path) if name.startswith(LINKED)]
    assert not wrong, "import jaxengine.models, jaxengine.pallas_kernels, jaxengine.sharding"


def test_bookkeeping_never_names_jax():
    for path in python_files():
        name = module_name(path)
        if name in WITHOUT_JAX and name not in LAZY:
            assert not {imported.split(".")[0] for imported in imports(path)} & {"jax", "flax"}, name


def test_all_bookkeeping_is_looked_at():
    bookkeeping = {name for name in map(module_name, python_files()) if part_of(name) in ("scheduler", "kv_cache")}
    assert bookkeeping <= set(WITHOUT_JAX)


def test_bookkeeping_does_not_load_jax():
    code = f"import sys, {', '.join(WITHOUT_JAX + SERVING)}\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_symbolic_links_are_relative():
    links = [path for folder, names, _ in os.walk(ROOT) if not hidden(folder) for path in links_in(folder, names)]
    assert {path.relative_to(ROOT) for path in links} == {Path("jaxengine") / name for name in LINKED}
    for path in links:
        assert path.readlink() == Path("..") / path.name


def hidden(folder: str) -> bool:
    return any(name.startswith(".") for name in Path(folder).relative_to(ROOT).parts)


def links_in(folder: str, names: list[str]) -> list[Path]:
    return [path for name in names if not name.startswith(".") and (path := Path(folder) / name).is_symlink()]
