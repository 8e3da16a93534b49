"""A whole optim section with plain values, of which a test changes the fields it is about."""

from collections.abc import Callable
from typing import Any

import pytest

from t5x_like.core.config import build
from t5x_like.optim.config import OptimConfig


def section() -> dict[str, Any]:
    return {
        "name": "adamw",
        "learning_rate": 1e-2,
        "schedule": {
            "name": "constant",
            "steps": None,
            "warmup_steps": 0,
            "cosine": {"final_fraction": 0.1},
            "linear": {"final_fraction": 0.0},
            "rsqrt": {"timescale": None},
            "warmup_stable_decay": {"decay_fraction": 0.2, "final_fraction": 0.0, "shape": "sqrt"},
        },
        "clip_norm": 1.0,
        "weight_decay": 0.0,
        "decay": ((".*", 1.0),),
        "multiplier": ((".*", 1.0),),
        "freeze": ((".*", False),),
        "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "adafactor": {
            "decay_rate": 0.8,
            "eps": 1e-30,
            "clip_threshold": 1.0,
            "min_scale": 1e-3,
            "momentum": None,
            "min_dim_size_to_factor": 128,
        },
        "lion": {"b1": 0.9, "b2": 0.99},
        "muon": {
            "momentum": 0.95,
            "nesterov": True,
            "steps": 5,
            "scale": "rms",
            "rms": 0.2,
            "adam_multiplier": 1.0,
            "adam": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
        },
        "sgd": {"momentum": 0.9, "nesterov": False},
    }


@pytest.fixture
def config() -> Callable[..., OptimConfig]:
    """`config({"adamw.b1": 0.8})` is the plain section with changes by dotted path."""

    def changed(changes: dict[str, Any] | None = None) -> OptimConfig:
        result = section()
        for path, value in (changes or {}).items():
            *parents, name = path.split(".")
            node = result
            for parent in parents:
                node = node[parent]
            assert name in node, path
            node[name] = value
        return build(OptimConfig, result, path="config.optim")

    return changed
