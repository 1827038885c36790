"""The device that a program is traced for, which need not be there."""

import jax


def target_device():
    """Returns the device of the mesh in use, which may be abstract; or else the default one.

    Returns:
      A `jax.Device` or `jax.sharding.AbstractDevice`: both have `platform` ("cpu", "gpu" or "tpu") and `device_kind`.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def num_cores(device) -> int | None:
    """Multiprocessors of a GPU; None where the device does not tell."""
    return getattr(device, "num_cores", None) or getattr(device, "core_count", None)
