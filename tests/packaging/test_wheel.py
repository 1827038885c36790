"""The built packages hold everything, though most of it lies behind symbolic links, and nothing else."""

import os
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="builds the wheel; it is in the dev group")

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def source_files() -> set[str]:
    """Everything of the package in the source tree, behind links too."""
    found = set()
    for folder, names, files in os.walk(ROOT / "jaxengine", followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in files if not name.endswith(".pyc")}
    return found


def test_source_files_are_found_behind_links():
    for name in (
        "models/llama.py",
        "sharding/axes.py",
        "pallas_kernels/__init__.py",
        "loading/configs/qwen3-0.6b.json",
    ):
        assert f"jaxengine/{name}" in source_files()


def test_the_wheel_holds_every_file_and_only_the_package(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == source_files()


def test_the_wheel_holds_real_files(wheel):
    for name in ("jaxengine/models/registry.py", "jaxengine/sharding/axes.py"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_requires_no_torch(wheel):
    metadata = Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode())
    required = [line.split(";")[0].strip().lower() for line in metadata.get_all("Requires-Dist") or []]
    assert any(line.startswith("jax") for line in required)
    assert not [line for line in required if line.startswith(("torch", "vllm", "tensorflow"))]
    assert metadata["Requires-Python"] == ">=3.12"
    assert str(metadata.get_payload()).startswith("# jaxengine")


def test_the_wheel_brings_the_command(wheel):
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "jaxengine = jaxengine.cli.main:main" in entry_points


def test_a_wheel_can_be_built_of_the_sdist(wheel, tmp_path):
    """Archives may drop symbolic links: the sdist must hold what they lead to."""
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    (rebuilt,) = WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(rebuilt) as archive:
        assert set(archive.namelist()) == set(wheel.namelist())
