"""A tree whose symbolic links git has written as text files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("models", "pallas_kernels", "sharding")


@pytest.fixture
def clone(tmp_path) -> Path:
    """The tree as git clones it with core.symlinks=false: a link is a file with the link's target in it."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "jaxengine", source / "jaxengine", symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "All"]):
        subprocess.run([*git, *arguments], cwd=source, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-c", "core.symlinks=false", str(source), str(clone)], check=True)
    return clone


@pytest.mark.parametrize("code", ["import jaxengine", "from jaxengine import LLM", "import jaxengine.cli.main"])
def test_importing_it_says_how_to_clone_again(clone, code):
    for name in LINKS:
        assert (clone / "jaxengine" / name).read_text() == f"../{name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(Path("jaxengine") / "models") in last
    assert "core.symlinks=false" in last
    assert "git clone -c core.symlinks=true" in last


@pytest.mark.parametrize("name", LINKS)
def test_one_link_that_is_missing_is_named(clone, name):
    for other in set(LINKS) - {name}:
        (clone / "jaxengine" / other).unlink()
        (clone / "jaxengine" / other).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import jaxengine"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert f"{Path('jaxengine') / name} is a file" in done.stderr
