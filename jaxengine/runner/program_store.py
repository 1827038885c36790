"""Keeps lowered programs on disk, beside the compiled ones, so that a warm start runs none of the Python behind them.

JAX's own cache spares XLA's part of a compilation. The part before it, tracing a model and lowering its kernels, is
Python that takes seconds a step on a GPU, one step at a time: all steps are minutes. What comes of it is StableHLO,
which `jax.export` reads back in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

from jaxengine.config import EngineConfig
from jaxengine.pallas_kernels.target import target_device
from jaxengine.runner.programs import Program
from jaxengine.runner.steps import ForwardOutputs, StepCaches
from jaxengine.sampling.logprobs import Logprobs
from jaxengine.sampling.state import SamplingState, SlotValues

logger = logging.getLogger(__name__)

for kind in (ForwardOutputs, Logprobs, SlotValues, StepCaches):
    export.register_namedtuple_serialization(kind, serialized_name=f"jaxengine.{kind.__name__}")
export.register_pytree_node_serialization(
    SamplingState,
    serialized_name="jaxengine.SamplingState",
    serialize_auxdata=lambda aux_data: b"",  # all fields are arrays
    deserialize_auxdata=lambda content: (),
    from_children=lambda aux_data, children: SamplingState(*children),
)

# Kernels of ours, which the same version of JAX that made them reads back.
_KERNELS = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "tpu_custom_call")]
# Of JAX: what it lowers depends on them.
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable", "jax_default_prng_impl")
# Of `EngineConfig`: they say how much memory there is, which steps come when, and who compiles.
_WITHOUT_EFFECT = {
    "num_pages",  # the number that was found counts
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "seed",
    "logits_processors",
    "warmup",
    "num_compile_threads",
    "num_lowering_processes",
}


class ProgramStore:
    """Lowered programs of one engine. Files of other engines, or of other versions, are other files."""

    def __init__(self, folder: Path, about: str, platform: str):
        """Remembers where they are.

        Args:
            folder: Of the files; made when the first is written.
            about: Everything that the programs depend on.
            platform: "cpu", "gpu" or "tpu".
        """
        self._folder, self._about = folder, about
        self._platform = "cuda" if platform == "gpu" else platform  # the name that lowering wants

    def lacks(self, key: Program) -> bool:
        """Returns whether a program is not there, but could be."""
        return key.can_be_stored and not self._file(key).exists()

    def exported(self, key: Program, jitted: Any, args: tuple) -> export.Exported | None:
        """Returns the program of this key, lowered now if it is not there.

        Returns:
            The program; None if it cannot be kept, and must be lowered in the usual way.
        """
        if not key.can_be_stored:
            return None
        file = self._file(key)
        with contextlib.suppress(OSError):
            data = file.read_bytes()
            try:
                return export.deserialize(bytearray(_checked(data)))
            except Exception as error:  # of the checksum; or of JAX, for what another version has written
                logger.warning("%s cannot be read (%s): lowering again", file, error)
                file.unlink(missing_ok=True)
        try:
            program = export.export(jitted, platforms=[self._platform], disabled_checks=_KERNELS)(*args)
            content = program.serialize()
        except Exception as error:  # if it is the program's, the usual way raises it again
            logger.warning("the lowered %s cannot be kept: %s", key, error)
            return None
        self._write(file, _with_checksum(bytes(content)))
        return program

    def _file(self, key: Program) -> Path:
        name = hashlib.sha256(f"{self._about}\n{key!r}".encode()).hexdigest()[:40]
        return self._folder / f"{name}.stablehlo"

    def _write(self, file: Path, content: bytes) -> None:
        """Writes a whole file or none: other processes may read and write the same."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as part:
                (Path(part) / file.name).write_bytes(content)
                os.replace(Path(part) / file.name, file)
        except OSError as error:
            logger.warning("%s cannot be written: %s", file, error)


def _with_checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest() + content


def _checked(data: bytes) -> bytes:
    """Returns what a file holds after its checksum.

    Raises:
        ValueError: It is another one: the file is damaged, and what it holds would be run.
    """
    size = hashlib.blake2b().digest_size
    if hashlib.blake2b(data[size:]).digest() != data[:size]:
        raise ValueError("its checksum is wrong")
    return data[size:]


def open_store(config: EngineConfig, num_pages: int) -> ProgramStore | None:
    """Returns the store in the folder of JAX's compilation cache; None where there is none."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return None
    versions = version("jax"), version("jaxlib")
    about = versions, target_device().device_kind, jax_options(), _hash_of_sources(), num_pages, _shaping(config)
    return ProgramStore(Path(folder) / "lowered", repr(about), config.platform)


def _shaping(config: EngineConfig) -> dict[str, Any]:
    """Returns what programs depend on; unless known to be left out, all."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sizes = config.scheduler.max_model_len, config.scheduler.max_num_seqs
    return {name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT} | {"scheduler": sizes}


def jax_options() -> dict[str, Any]:
    """Returns JAX's options that programs depend on, as they are set."""
    return {name: getattr(jax.config, name) for name in _OPTIONS}


@functools.cache  # an engine opens two stores: of its own and of the small one that tells what a step needs
def _hash_of_sources() -> str:
    total = hashlib.sha256()
    for name, path in sorted(_sources().items()):
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _sources() -> dict[str, Path]:
    """Returns all that this package is made of, by name; kernels' tuning files too."""
    root = Path(__file__).parents[1]
    found = (
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith((".py", ".json"))
    )
    return {path.relative_to(root).as_posix(): path for path in found}
