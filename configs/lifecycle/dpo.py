"""DPO: the model after LoRA learns from pairs of a right answer and a wrong one of its own; it is its own reference.

    t5x_like train --config=configs/lifecycle/dpo.py:llama,runs/lifecycle --workdir=runs/lifecycle/dpo
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs.lifecycle import models, reward


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `merged` and `pairs` in it."""
    _, folder = models.given(given)
    config = reward.pairs(given)
    config.objective.name = "dpo"
    config.objective.dpo.beta = 0.5
    config.roles.reference = {"source": f"{folder}/merged", "rules": "", "dtype": "stored"}
    config.data.features = "pairs"
    config.optim.update({"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.0})
    config.loop.steps = 100
    return config
