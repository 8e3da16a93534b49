"""Of checkpoints (t5x_like/training/keep.py)."""

from ml_collections.config_dict import placeholder


def checkpoint() -> dict:
    return {
        "every_steps": 1000,
        "asynchronous": True,
        "timeout_seconds": 1200,
        "keep_last": 2,
        "keep_every": placeholder(int),
        "best_metric": placeholder(str),
        "best_mode": "min",
        "keep_best": 1,
        "init_from": placeholder(str),
        "init_select": (".*",),
        "holds": "model",
        "branch_from": placeholder(str),
    }
