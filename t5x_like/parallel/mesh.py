"""Makes the mesh, the only place that does: axis sizes from the config, devices in the order of the network.

Not here: what lies on which axis (rules.py), joining processes (multihost.py).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.parallel.rules import MESH_AXES, PRESETS


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Axis sizes: None takes the preset's, -1 (once) the devices that are left over. `rules` changes the table."""

    preset: str
    rules: str
    slice: int | None
    stage: int | None
    data: int | None
    fsdp: int | None
    expert: int | None
    sequence: int | None
    tensor: int | None


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis for this number of devices.

    >>> c = MeshConfig("fsdp_tensor", "", None, None, None, None, None, None, 4)
    >>> {k: v for k, v in axis_sizes(c, 8).items() if v > 1}
    {'fsdp': 2, 'tensor': 4}
    """
    if config.preset not in PRESETS:
        raise UsageError(f"config.mesh.preset={config.preset!r} is unknown; {nearest(config.preset, PRESETS)}")
    sizes = {axis: PRESETS[config.preset].get(axis, 1) for axis in MESH_AXES}
    sizes |= {axis: getattr(config, axis) for axis in MESH_AXES if getattr(config, axis) is not None}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UsageError(f"config.mesh.{axis}={size} should be a positive number, or -1 for what is left")
    open_axes = [axis for axis in MESH_AXES if sizes[axis] == -1]
    if len(open_axes) > 1:
        raise UsageError(f"config.mesh: only one axis can be -1, not {' and '.join(open_axes)}")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    composed = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1"
    if open_axes:
        if devices % fixed:
            raise UsageError(f"config.mesh: {composed} = {fixed} does not divide the {devices} devices")
        sizes[open_axes[0]] = devices // fixed
    elif fixed != devices:
        raise UsageError(
            f"config.mesh: {composed} = {fixed}, but there are {devices} devices; "
            "set one axis to -1 to take what is left"
        )
    return sizes


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all seven axes, all of them Auto. `devices` may be those of a topology that is not there."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    shape = tuple(sizes.values())
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        # CPU and GPU: processes in order, so that neighbours in the mesh share a host.
        return np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    slices, inner = shape[0], shape[1:]
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices)
    across = (slices,) + (1,) * len(inner)
    return mesh_utils.create_hybrid_device_mesh((1, *inner), across, devices)
