"""GRPO: the model after DPO answers questions of the training part; answers that are right, and those that the reward
model prefers among wrong ones, are reinforced.

    t5x_like rl --config=configs/lifecycle/grpo.py:llama,runs/lifecycle --workdir=runs/lifecycle/grpo
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.lifecycle import models, tasks


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `instruct`, `dpo` and `reward` in it."""
    kind, folder = models.given(given)
    config = common.rl_config()
    config.model = models.pretrained(kind).model
    config.checkpoint.update({"init_from": f"{folder}/dpo", "every_steps": 20})
    config.data.fields.update({"inputs": "", "targets": ""})
    config.data.update({"tokenizer": f"{folder}/instruct/tokenizer", "batch_size": 160, "length": models.LENGTH})
    config.rl.update({"prompts": 20, "samples": 8, "new_tokens": models.ANSWER, "held_out": 120})
    config.rl.generate = tasks.ask if kind.chat else tasks.ask_source
    if not kind.chat:
        config.data.update({"encoder_length": models.SOURCE, "length": models.ANSWER})
    config.rl.rewards.exact = common.reward("exact")
    config.rl.rewards.preferred = common.reward("model", weight=0.05)
    # Divided by their deviation, what it says of answers that are all wrong would count as much as a right one.
    config.rl.advantage.scale = "none"
    config.roles.reward = {"source": f"{folder}/reward", "rules": "", "dtype": "stored"}
    config.optim.update({"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.0, "clip_norm": 1.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 5})
    config.loop.update({"steps": 60, "log_every_steps": 2})
    config.evaluate.every_steps = 20
    config.telemetry.update({"measure_cpu_peak": False, "tensorboard": False})
    return config
