"""Instruction tuning: the model of configs/pretrain/tiny.py learns the tasks of tasks.py and real conversations.

    t5x_like train --config=configs/lifecycle/instruct.py:runs/lifecycle --workdir=runs/lifecycle/instruct
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import tiny


def get_config(folder: str = "runs/lifecycle", base: str = "runs/tiny") -> ConfigDict:
    """`folder`: that of the lifecycle, with `data` in it."""
    config = tiny.get_config()
    config.checkpoint.init_from = base
    sources = {"tasks": f"jsonl:{folder}/data/examples.jsonl", "people": f"jsonl:{folder}/data/conversations.jsonl"}
    config.data.update({"source": "", "tokenizer": f"{base}/tokenizer"})
    config.data.mixture.update({"sources": sources, "rates": {"tasks": 0.8, "people": 0.2}, "counts": "tokens"})
    config.data.fields.messages = "messages"
    config.data.chat.update({"template": "plain", "train_on": "assistant"})
    config.data.update({"packing": "examples", "length": 256, "batch_size": 8, "attend_across_documents": False})
    config.data.update({"validation": "", "validation_stride": 0})
    config.optim.update({"name": "muon", "learning_rate": 5e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "linear", "warmup_steps": 20})
    config.loop.update({"steps": 250, "log_every_steps": 10})
    config.evaluate.every_steps = 0
    config.checkpoint.every_steps = 50
    config.telemetry.update({"measure_cpu_peak": False, "tensorboard": False})
    return config
