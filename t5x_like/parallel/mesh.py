"""Makes the mesh, the only place that does: axis sizes from the config, devices in the order of the network.

Not here: what lies on which axis (rules.py), joining processes (multihost.py).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax._src.mesh import AbstractDevice  # of an abstract mesh; it has no public name
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.parallel.pipeline import NEUTRAL, PipelineConfig
from t5x_like.parallel.rules import MESH_AXES, PRESETS, idle, rules


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Axis sizes: None takes the preset's, -1 (once) the devices that are left over. `rules` changes the table.

    pipeline: how batches go through the stages of a mesh that has some.
    """

    preset: str
    rules: str
    slice: int | None
    stage: int | None
    data: int | None
    fsdp: int | None
    expert: int | None
    sequence: int | None
    tensor: int | None
    pipeline: PipelineConfig = NEUTRAL

    def check(self, path: str) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"{path}.preset={self.preset!r} is unknown; {nearest(self.preset, PRESETS)}")
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size is not None and size < 1 and size != -1:
                raise UsageError(f"{path}.{axis}={size} should be a positive number, or -1 for what is left")
        rules(self.rules)  # which refuses unknown names


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis for this number of devices. An axis on which no rule places anything must be 1.

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
    for axis in idle(rules(config.rules), sizes):
        raise UsageError(
            f"config.mesh: {axis}={sizes[axis]}, but no rule places anything on {axis!r}: its {sizes[axis]} parts "
            "would all do the same work; set it to 1, or name it in config.mesh.rules"
        )
    return sizes


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all seven axes, all of them Auto. `devices` may be those of a topology that is not there."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    shape = tuple(sizes.values())
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract(sizes: Mapping[str, int], *, platform: str, kind: str, cores: int = 1) -> AbstractMesh:
    """A mesh of devices that are not there: programs can be traced and lowered for it, and never run.

    sizes: of every axis, from `axis_sizes`. kind: as jax calls it, such as "TPU v5"; cores: of a device.
    """
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=auto, abstract_device=device)


def of_one(device: jax.Device) -> Mesh:
    """A mesh of one device: `jax.set_mesh` of it lets a program of that device be built under a larger mesh."""
    shape = (1,) * len(MESH_AXES)
    return Mesh(np.array(device).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The platform of its devices: cpu, gpu or tpu."""
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device.platform
    return mesh.devices.flat[0].platform


def across_slices(sizes: Mapping[str, int], slices: int) -> str:
    """The mesh axis along which this many slices are joined by the data-centre network: `slice`, or, where that is 1,
    `stage`, whose messages are the fewest.

    >>> across_slices({"slice": 2, "stage": 1}, 2), across_slices({"slice": 1, "stage": 4}, 2)
    ('slice', 'stage')
    """
    if sizes["slice"] == slices:
        return "slice"
    if sizes["slice"] == 1 and sizes["stage"] % slices == 0:
        return "stage"
    said = f"config.mesh.slice={sizes['slice']}, but the devices are {slices} slice{'s' * (slices != 1)}"
    if slices == 1:
        raise UsageError(f"{said}; set config.mesh.slice=1")
    raise UsageError(
        f"{said}; set config.mesh.slice={slices}, or config.mesh.slice=1 and config.mesh.stage to a multiple of "
        f"{slices}"
    )


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        # CPU and GPU: processes in order, so that neighbours in the mesh share a host.
        return np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    axis = across_slices(dict(zip(MESH_AXES, shape, strict=True)), found)
    across = tuple(found if name == axis else 1 for name in MESH_AXES)
    inside = tuple(size // parts for size, parts in zip(shape, across, strict=True))

    def arrange(split: bool) -> np.ndarray:
        if found == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=split)

    try:
        return arrange(split=False)
    except NotImplementedError:  # an axis of the mesh is no whole dimension of the network
        pass
    try:
        return arrange(split=True)
    except (NotImplementedError, ValueError) as error:
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1)
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"config.mesh: {sizes} does not fit the network of these devices ({reason})") from None
