"""Every field of a run with its usual value: the one place where defaults stand. A config starts from `config()`.

A config of yours, which may lie anywhere, begins with `from t5x_like.configs import common`.

One file a section. A field that is None is supplied later: those of `model` by family and size, those of `mesh` by the
preset. Units and meanings are documented at the dataclass that each section becomes (`ModelConfig`, `DataConfig`, ...).
"""

from ml_collections import ConfigDict

from t5x_like.configs.common.adapter import adapter
from t5x_like.configs.common.bundled import bundled
from t5x_like.configs.common.checkpoint import checkpoint
from t5x_like.configs.common.data import data
from t5x_like.configs.common.loop import loop
from t5x_like.configs.common.mesh import mesh
from t5x_like.configs.common.model import model, stack
from t5x_like.configs.common.objective import objective
from t5x_like.configs.common.optim import optim
from t5x_like.configs.common.rl import reward, rl
from t5x_like.configs.common.runtime import runtime
from t5x_like.configs.common.telemetry import telemetry

__all__ = [
    "adapter",
    "bundled",
    "checkpoint",
    "config",
    "data",
    "loop",
    "mesh",
    "model",
    "objective",
    "optim",
    "reward",
    "rl",
    "rl_config",
    "runtime",
    "stack",
    "telemetry",
]


def config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "model": model(),
            "adapter": adapter(),
            "data": data(),
            "mesh": mesh(),
            "optim": optim(),
            "objective": objective(),
            "roles": {},  # name -> {"source": a model directory, "rules": "", "dtype": "stored"}
            "loop": loop(),
            "checkpoint": checkpoint(),
            "evaluate": {"every_steps": 0, "ema": False},
            "telemetry": telemetry(),
            "runtime": runtime(),
        }
    )


def rl_config() -> ConfigDict:
    """Of a run of `t5x_like rl`: prompts from examples or a function, rows made of the answers to them."""
    given = config()
    given.data.update({"features": "rollouts", "packing": "single"})
    given.data.fields.update({"text": "", "inputs": "inputs", "targets": "targets"})
    given.objective.name = "grpo"
    given.rl = rl()
    return given
