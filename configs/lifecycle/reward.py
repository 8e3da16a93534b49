"""A reward model: the instructed model with a scalar head, on pairs of a right and a wrong answer.

    t5x_like train --config=configs/lifecycle/reward.py:runs/lifecycle --workdir=runs/lifecycle/reward
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.lifecycle import instruct

LENGTH = 64  # tokens of a question with its answer


def get_config(folder: str = "runs/lifecycle") -> ConfigDict:
    """`folder`: that of the lifecycle, with `data` and `instruct` in it."""
    config = pairs(folder)
    config.model.scalar_heads = ("reward",)
    config.objective.name = "reward"
    config.data.features = "pair_texts"
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01})
    config.loop.steps = 150
    return config


def pairs(folder: str) -> ConfigDict:
    """What a run over pairs has: the instructed model, the pairs, the held-out pairs."""
    config = instruct.get_config(folder)
    config.checkpoint.init_from = f"{folder}/instruct"
    config.data.mixture = common.data()["mixture"]
    config.data.update({"source": f"jsonl:{folder}/data/pairs.jsonl", "packing": "single", "length": LENGTH})
    config.data.validation = f"jsonl:{folder}/data/pairs_held_out.jsonl"
    config.data.fields.update({"text": "", "messages": ""})
    config.data.fields.update({"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    config.data.chat.template = "none"
    config.data.tokenizer = f"{folder}/instruct/tokenizer"
    config.data.batch_size = 20  # pairs; divides the held-out ones
    config.evaluate.every_steps = 50
    return config
