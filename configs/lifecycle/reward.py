"""A reward model: the model after LoRA with a scalar head, on pairs of a right answer and a wrong one of its own.

    t5x_like train --config=configs/lifecycle/reward.py:llama,runs/lifecycle --workdir=runs/lifecycle/reward
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.lifecycle import instruct, models


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `merged` and `pairs` in it."""
    config = pairs(given)
    config.model.scalar_heads = ("reward",)
    config.objective.name = "reward"
    config.data.features = "pair_texts"
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01})
    config.loop.steps = 150
    return config


def pairs(given: str) -> ConfigDict:
    """What a run over pairs has: the model that made them, the pairs, the held-out pairs."""
    kind, folder = models.given(given)
    config = instruct.get_config(given)
    config.checkpoint.init_from = f"{folder}/merged"
    config.data.mixture = common.data()["mixture"]
    config.data.update({"source": f"jsonl:{folder}/pairs/train.jsonl", "packing": "single", "length": models.LENGTH})
    if not kind.chat:
        config.data.update({"encoder_length": models.SOURCE, "length": models.ANSWER + 1})
    config.data.validation = f"jsonl:{folder}/pairs/held_out.jsonl"
    config.data.fields = common.data()["fields"]
    config.data.fields.update({"text": "", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    config.data.chat.template = "none"
    config.data.tokenizer = f"{folder}/instruct/tokenizer"
    config.data.batch_size = 20  # pairs; divides the held-out ones
    config.evaluate.every_steps = 50
    return config
