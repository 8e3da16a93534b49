"""GRPO: the model after DPO answers questions of the training part, and answers that are right are reinforced.

    t5x_like rl --config=configs/lifecycle/grpo.py:runs/lifecycle --workdir=runs/lifecycle/grpo
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.lifecycle import tasks
from t5x_like.configs.pretrain import tiny


def get_config(folder: str = "runs/lifecycle") -> ConfigDict:
    """`folder`: that of the lifecycle, with `instruct` and `dpo` in it."""
    config = common.rl_config()
    config.model = tiny.get_config().model
    config.checkpoint.update({"init_from": f"{folder}/dpo", "every_steps": 20})
    config.data.fields.update({"inputs": "", "targets": ""})
    config.data.update({"tokenizer": f"{folder}/instruct/tokenizer", "batch_size": 160, "length": 64})
    config.rl.update({"prompts": 20, "samples": 8, "new_tokens": 20, "generate": tasks.ask, "held_out": 100})
    config.rl.rewards.exact = common.reward("exact")
    config.rl.rewards.share = common.reward("function", function=tasks.share, weight=0.5)
    config.optim.update({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0, "clip_norm": 1.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 5})
    config.loop.update({"steps": 60, "log_every_steps": 2})
    config.evaluate.every_steps = 20
    config.telemetry.update({"measure_cpu_peak": False, "tensorboard": False})
    return config
