"""The shape of the code: which module imports which, in circles or upwards, and how long files and functions are.

`python -m tests.code_shape [FOLDER]` prints it, of this repository or of another copy of it.
"""

from __future__ import annotations

import ast
import enum
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each part may import itself, PLAIN and the parts named here.
PLAIN = {"bounded_json", "config", "host_memory", "messages", "sampling_params", "outputs", "request", "__init__"}
MODELS = {"models", "pallas_kernels", "sharding"}
RUNNER = {"structured", "runner", "sampling", "scheduler", "kv_cache", *MODELS}
ENGINE = {"engine", "workers", "engine_args", "metrics", "loading", *RUNNER}
ALLOWED = {
    "__init__": {"engine", "engine_args", "llm"},
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
    "ray": {"engine", "engine_args", "llm"},
    "__main__": {"cli"},
}


class When(enum.IntEnum):
    """When an import runs; each kind includes those before."""

    LOADED = 0
    """As the module is loaded."""
    CALLED = 1
    """As a function is called."""
    CHECKED = 2
    """Never; only type checkers follow it."""


Graph = Mapping[str, set[str]]
"""Modules, and which of them each one imports."""


def python_files(root: Path = ROOT) -> list[Path]:
    """Returns the files of all modules, linked folders included, by their paths inside the package."""
    found = []
    for folder, _, names in os.walk(root / "jaxengine", followlinks=True):
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found)


def module_name(path: Path, root: Path = ROOT) -> str:
    """Returns a module's full name: `jaxengine/engine/core.py` is jaxengine.engine.core."""
    names = path.relative_to(root).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def part_of(module: str) -> str:
    """Returns the part that a module belongs to: `jaxengine.engine.core` to engine."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, wanted: When) -> Iterator[tuple[str, list[str]]]:
    """Yields what a file imports: a module, and the names that are taken from it."""
    waiting: list[tuple[ast.AST, When]] = [(_tree(path), When.LOADED)]
    while waiting:
        node, when = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += [(each, when) for each in node.orelse]
            waiting += [(each, When.CHECKED) for each in node.body]
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = max(when, When.CALLED)
        waiting += [(each, when) for each in ast.iter_child_nodes(node)]
        if when > wanted:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module, [alias.name for alias in node.names]


def import_graph(wanted: When, root: Path = ROOT) -> dict[str, set[str]]:
    """Returns the graph of the package's modules. `from a import b` leads to a.b if that is a module, else to a."""
    files = {module_name(path, root): path for path in python_files(root)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name, taken in imports(path, wanted):
            inner = {f"{name}.{each}" for each in taken} & files.keys()
            graph[module] |= inner
            if name in files and len(inner) < max(1, len(taken)):
                graph[module].add(name)
    return graph


def names_imported(path: Path, wanted: When) -> set[str]:
    """Returns the full names of all modules that a file imports, other packages' too."""
    return {name for name, _ in imports(path, wanted)}


def reachable(graph: Graph, start: Iterable[str]) -> set[str]:
    """Returns these modules, and all that they import directly or through others. Packages run their `__init__`."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module in found or module not in graph:
            continue
        found.add(module)
        names = module.split(".")
        waiting += [*graph[module], *(".".join(names[:length]) for length in range(1, len(names)))]
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Returns the sets of modules that import each other in a circle: strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1 or module in graph[module]:
                found.append(sorted(members))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return sorted(found)


def upward_imports(wanted: When, root: Path = ROOT) -> list[str]:
    """Returns the imports that `ALLOWED` does not allow, as sentences."""
    wrong = []
    for path in python_files(root):
        module = module_name(path, root)
        own = part_of(module)
        allowed = {own, *PLAIN, *ALLOWED.get(own, ())}
        ours = {name for name in names_imported(path, wanted) if name.split(".")[0] == "jaxengine"}
        wrong += [f"{module} imports {name}" for name in sorted(ours) if part_of(name) not in allowed]
    return wrong


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yields lines and names of a file's functions. Lines are from `def` to the last one, docstring included."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, node.name


def describe(root: Path = ROOT) -> str:
    """Returns the numbers as lines of text."""
    files = {module_name(path, root): path for path in python_files(root)}
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in files.items()}
    longest = max(lengths, key=lambda module: lengths[module])
    by_length = sorted(
        (length, f"{module}.{name}") for module, path in files.items() for length, name in functions(path)
    )
    lines = [
        f"files: {len(files)}",
        f"lines: {sum(lengths.values())}",
        f"longest file: {lengths[longest]} lines, {longest}",
        f"files over 400 lines: {sum(length > 400 for length in lengths.values())}",
        f"longest function: {by_length[-1][0]} lines, {by_length[-1][1]}",
        f"functions over 60 lines: {sum(length > 60 for length, _ in by_length)}",
    ]
    found = {
        "upward imports": upward_imports(When.CALLED, root),
        "upward imports, with those for type checkers": upward_imports(When.CHECKED, root),
    }
    for title, when in (
        ("import circles", When.LOADED),
        ("import circles, with imports inside functions", When.CALLED),
        ("import circles, with those for type checkers", When.CHECKED),
    ):
        found[title] = [", ".join(circle) for circle in circles(import_graph(when, root))]
    for title, rows in found.items():
        lines += [f"{title}: {len(rows)}", *(f"  {row}" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
