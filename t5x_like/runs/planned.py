"""The run of a config that is planned or checked, and not started."""

import math
from collections.abc import Mapping
from typing import Any

from t5x_like.parallel.rules import MESH_AXES, PRESETS
from t5x_like.runs import train
from t5x_like.runs.arguments import section
from t5x_like.runs.functions import named_functions
from t5x_like.runs.rl_program import RlExperiment
from t5x_like.runs.train import Experiment


def experiment_of(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Experiment:
    """A training run, or one of reinforcement learning, whose functions are not called."""
    if "rl" not in config:
        return train.from_config(config, overrides=overrides)
    return train.built(RlExperiment, named_functions(config)[0], overrides=overrides)


def named_devices(config: Mapping[str, Any]) -> int:
    """The devices that the mesh of a config names, which need not be sound: an axis that takes what is left counts
    once.

    >>> named_devices({"mesh": {"preset": "fsdp_tensor", "fsdp": None, "tensor": 4}})
    4
    """
    mesh = section(config, "mesh")
    given = {axis: mesh.get(axis) for axis in MESH_AXES}
    sizes = PRESETS.get(str(mesh.get("preset")), {}) | {axis: size for axis, size in given.items() if size is not None}
    return math.prod(size for size in sizes.values() if isinstance(size, int) and size > 0)
