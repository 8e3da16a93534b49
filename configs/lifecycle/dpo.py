"""DPO: the instructed model learns from pairs of a right and a wrong answer, with itself as it was for a reference.

    t5x_like train --config=configs/lifecycle/dpo.py:runs/lifecycle --workdir=runs/lifecycle/dpo
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs.lifecycle import reward


def get_config(folder: str = "runs/lifecycle") -> ConfigDict:
    """`folder`: that of the lifecycle, with `data` and `instruct` in it."""
    config = reward.pairs(folder)
    config.objective.name = "dpo"
    config.objective.dpo.beta = 0.5  # kept near: a wrong answer is one token away from a right one
    config.roles.reference = {"source": f"{folder}/instruct", "rules": "", "dtype": "stored"}
    config.data.features = "pairs"
    config.optim.update({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0})
    config.loop.steps = 100
    return config
