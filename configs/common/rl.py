"""Of reinforcement learning (t5x_like/rl/config.py). A config has this section where `t5x_like rl` runs it."""

from collections.abc import Callable

from ml_collections.config_dict import placeholder


def rl() -> dict:
    return {
        "prompts": 8,
        "samples": 8,
        "answers_per_row": 1,
        "epochs": 1,
        "new_tokens": 64,
        "rows": 0,
        "weights": "gathered",
        "end_tokens": ("eos",),
        "truncated": "keep",
        "generate": placeholder(object),  # a function, or None
        "held_out": 0,
        "advantage": {"scale": "std", "ddof": 1, "epsilon": 1e-4},
        "rewards": {},  # name -> reward(...)
        "reward_seconds": 10.0,
        "failure_value": 0.0,
    }


def reward(kind: str, *, weight: float = 1.0, pattern: str = "", function: Callable | None = None) -> dict:
    """One part of the reward, for `config.rl.rewards.NAME`."""
    return {"kind": kind, "weight": weight, "pattern": pattern, "function": function}
