"""What a program is being compiled for, which decides between kernels and forms that compute the same."""

import jax
from jax.sharding import get_abstract_mesh


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context (a planner lowers for a TPU on a CPU), else jax's default."""
    device = get_abstract_mesh().abstract_device
    return jax.devices()[0].platform if device is None else device.platform
