"""What a program is being compiled for, which decides between kernels and forms that compute the same."""

import jax
from jax.sharding import get_abstract_mesh


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context (a planner lowers for a TPU on a CPU), else jax's default."""
    device = get_abstract_mesh().abstract_device
    return jax.devices()[0].platform if device is None else device.platform


def compute_capability() -> float | None:
    """Of the NVIDIA GPUs of this process, such as 9.0 for Hopper; None where there is none, or a planner stands in."""
    if get_abstract_mesh().abstract_device is not None and platform() != jax.devices()[0].platform:
        return None
    text = getattr(jax.local_devices()[0], "compute_capability", None)
    return None if text is None else float(text)
