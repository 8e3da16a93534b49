"""The start of configs/rl/reverse.py: instruction tuning on examples of the task, every other one of them wrong.

    python -m configs.rl.reverse runs/reverse.jsonl
    t5x_like train --config=configs/rl/reverse_start.py:runs/reverse.jsonl --workdir=runs/reverse_start
Hardware: 2 CPU cores, half a minute. Expected: about one sampled answer in five is the word backwards.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.rl import reverse


def get_config(examples: str = "runs/reverse.jsonl") -> ConfigDict:
    """`examples`: the file that `python -m configs.rl.reverse FILE` writes."""
    config = common.config()
    config.model = reverse.get_config().model
    config.data.fields.update({"text": "", "inputs": "inputs", "targets": "targets"})
    config.data.update({"source": f"jsonl:{examples}", "tokenizer": "bytes", "packing": "examples"})
    config.data.update({"batch_size": 16, "length": 64})
    config.optim.update({"learning_rate": 3e-3, "weight_decay": 0.0})
    config.optim.schedule.update({"name": "linear", "warmup_steps": 20})
    config.loop.update({"steps": 300, "log_every_steps": 20})
    config.checkpoint.every_steps = 300
    config.telemetry.measure_cpu_peak = False
    return config
