"""What LoRA is compared with: the same examples, steps and optimizer, and all parameters are trained.

    t5x_like train --config=configs/lifecycle/full.py:llama,runs/lifecycle --workdir=runs/lifecycle/full
One of the stages of configs/lifecycle/tiny.py. The learning rates of both are the best of those in docs/log.md.
"""

from ml_collections import ConfigDict

from t5x_like.configs.lifecycle import lora


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `data` and `instruct` in it."""
    config = lora.get_config(given)
    config.checkpoint.holds = "model"
    config.adapter.name = "none"
    config.optim.learning_rate = 3e-4
    return config
