"""Meshes over the devices of TPU slices: every preset fits the common ones, and several slices are one axis."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from t5x_like.core.errors import UsageError
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.rules import PRESETS
from t5x_like.planner import topology

SLICES = ("v4:2x2x1", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:2x4", "v6e:8x8", "tpu7x:2x2x2")


def config(preset: str, **sizes: int) -> meshes.MeshConfig:
    axes = dict.fromkeys(("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor"))
    return meshes.MeshConfig(preset, "", **(axes | sizes))


def check(mesh: jax.sharding.Mesh, devices) -> None:
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)


@pytest.mark.parametrize("name", SLICES)
def test_every_preset_fits(compiler, name):
    """Also where an axis of 2 is a part of a dimension of the network."""
    devices = topology.topology(name).devices
    for preset in PRESETS:
        check(meshes.make(config(preset), devices), devices)


@pytest.mark.parametrize("name,sizes", [("v5e:16x16", {"tensor": 4}), ("v6e:8x8", {"tensor": 4}), ("v5p:4x4x4", {})])
def test_a_part_of_a_dimension_lies_together(compiler, name, sizes):
    """Devices that share a tensor shard are neighbours in the network."""
    devices = topology.topology(name).devices
    mesh = meshes.make(config("fsdp_tensor", **sizes), devices)
    check(mesh, devices)
    for group in mesh.devices.reshape(-1, mesh.shape["tensor"])[:8]:
        places = np.array([device.coords for device in group])
        assert np.ptp(places, axis=0).sum() <= mesh.shape["tensor"], places.tolist()


@pytest.fixture(scope="module")
def two_slices(compiler):
    topology.topology("v5e:4x4")  # says to libtpu that no machine is around it
    return topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", chips_per_host_bounds=(2, 2, 1), num_slices=2
    ).devices


def test_slices_are_the_outermost_axis(two_slices):
    mesh = meshes.make(config("fsdp_tensor", slice=2, tensor=4), two_slices)
    check(mesh, two_slices)
    assert dict(mesh.shape) | {"slice": 2, "fsdp": 4, "tensor": 4} == dict(mesh.shape)
    for index in range(2):
        assert len({device.slice_index for device in mesh.devices[index].flat}) == 1


@pytest.mark.parametrize("sizes", [{}, {"slice": 4}])
def test_a_wrong_number_of_slices_is_named_with_the_right_one(two_slices, sizes):
    with pytest.raises(UsageError, match="but the devices are 2 slices; set config.mesh.slice=2"):
        meshes.make(config("fsdp", **sizes), two_slices)
