"""What the code must never do: import upwards, in circles, or jax where plain Python suffices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.code_shape import (
    ALLOWED,
    ROOT,
    When,
    circles,
    import_graph,
    imports,
    module_name,
    names_imported,
    part_of,
    python_files,
    reachable,
    upward_imports,
)

PACKAGE = ROOT / "jaxengine"
LINKED = ("models", "pallas_kernels", "sharding")
BOOKKEEPING = ("scheduler", "kv_cache")
"""Parts that are plain Python, whatever they import and whenever."""
STARTING = [
    "jaxengine",
    "jaxengine.cli.main",
    "jaxengine.config",
    "jaxengine.engine_args",
    "jaxengine.outputs",
    "jaxengine.request",
    "jaxengine.sampling_params",
]
"""Loading these loads no jax: `jaxengine --help` answers at once."""
SERVING = ["jaxengine.engine.async_llm", "jaxengine.engine.core_client", "jaxengine.server.app", "jaxengine.server.run"]
"""A server's own process leaves the device to the engine's."""
MODULES = {module_name(path): path for path in python_files()}


def test_imports_point_downwards():
    new = {part_of(module) for module in MODULES} - ALLOWED.keys()
    assert not new, "a new part: say in code_shape.ALLOWED what it may import"
    assert not upward_imports(When.CALLED)


@pytest.mark.parametrize("when", When)
def test_no_module_imports_itself_through_others(when):
    assert not circles(import_graph(when))


@pytest.mark.parametrize("part", BOOKKEEPING)
def test_bookkeeping_never_imports_jax(part):
    """Not inside functions either, nor through what it imports."""
    own = [module for module in MODULES if part_of(module) == part]
    assert own
    for module in sorted(reachable(import_graph(When.CALLED), own) - {"jaxengine"}):
        names = {name.split(".")[0] for name in names_imported(MODULES[module], When.CALLED)}
        assert not names & {"jax", "jaxlib", "flax"}, module


def test_models_never_import_what_runs_them():
    """Not for type checkers either."""
    graph = import_graph(When.CHECKED)
    del graph["jaxengine"]  # which imports everything, for those who import it
    parts = {part_of(module) for module in reachable(graph, [m for m in MODULES if part_of(m) == "models"])}
    assert "models" in parts
    assert not parts & {"runner", "engine", "scheduler", "kv_cache", "llm", "server", "cli"}


def test_bookkeeping_does_not_load_jax():
    modules = [*STARTING, *SERVING, *(module for module in MODULES if part_of(module) in BOOKKEEPING)]
    code = f"import sys, {', '.join(modules)}\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_nothing_imports_the_linked_folders_bare():
    wrong = [
        (module, name)
        for module, path in MODULES.items()
        for name, _ in imports(path, When.CHECKED)
        if name.split(".")[0] in LINKED
    ]
    assert not wrong, "import jaxengine.models, jaxengine.pallas_kernels, jaxengine.sharding"


def test_symbolic_links_are_relative():
    links = [path for folder, names, _ in os.walk(ROOT) if not hidden(folder) for path in links_in(folder, names)]
    assert {path.relative_to(ROOT) for path in links} == {Path("jaxengine") / name for name in LINKED}
    for path in links:
        assert path.readlink() == Path("..") / path.name


def hidden(folder: str) -> bool:
    return any(name.startswith(".") for name in Path(folder).relative_to(ROOT).parts)


def links_in(folder: str, names: list[str]) -> list[Path]:
    return [path for name in names if not name.startswith(".") and (path := Path(folder) / name).is_symlink()]


def test_unit_tests_mirror_the_folders_they_test():
    unit = ROOT / "tests" / "unit"
    folders = [path.relative_to(unit) for path in unit.rglob("*") if path.is_dir() and any(path.glob("test_*.py"))]
    assert [folder for folder in folders if not (PACKAGE / folder).is_dir()] == []
    files = [path.name for path in unit.glob("test_*.py")]
    assert [name for name in files if not (PACKAGE / name.removeprefix("test_")).exists()] == []


def test_circles_are_found():
    """On a graph whose circles are known; the test of ours must be able to fail."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "g"}, "g": set(), "h": {"h"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"], ["h"]]
    assert reachable({"p.x": {"q.y"}, "p": {"r"}, "q.y": set(), "q": set(), "r": set()}, ["p.x"]) == {
        *("p.x", "p", "r", "q.y", "q")
    }
