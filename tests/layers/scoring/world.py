"""Sizes, meshes and the count of collectives that the tests of the scorer share."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from t5x_like.parallel import rules
from t5x_like.parallel.rules import MESH_AXES

FAST = {"xla_backend_optimization_level": 0}
B, T, D, V, REAL = 8, 6, 16, 256, 250
TABLE = rules.rules()
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "tensor8": {"tensor": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp2_sequence2_tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


def make_mesh(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def count(text):
    """How often the compiled program holds each collective."""
    found = re.findall(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in set(found)}
