"""What the tests of GPU kernels share: an interpreter that detects races."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


@pytest.fixture(scope="session")
def gpu_mesh() -> jax.sharding.AbstractMesh:
    """One H100 that is not there."""
    return jax.sharding.AbstractMesh((), (), abstract_device=H100)


@pytest.fixture(scope="session")
def interpret(gpu_mesh: jax.sharding.AbstractMesh) -> Callable[..., Any]:
    """Calls `function(*args)`, jitted, with its kernels in the interpreter; fails if it finds a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    def run(function: Callable[..., Any], *args: Any) -> Any:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        try:
            with (
                jax.sharding.use_abstract_mesh(gpu_mesh),
                plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
            ):
                result = jax.block_until_ready(jax.jit(function)(*args))
            races = interpret_pallas_call.get_races()
            assert races is not None
            assert not races.races_found
            return result
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()

    return run
