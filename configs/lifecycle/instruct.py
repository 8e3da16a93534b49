"""Instruction tuning: the pretrained model learns the tasks of tasks.py and real conversations.

    t5x_like train --config=configs/lifecycle/instruct.py:llama,runs/lifecycle --workdir=runs/lifecycle/instruct
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs.lifecycle import models


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `data` in it."""
    kind, folder = models.given(given)
    config = models.pretrained(kind)
    config.checkpoint.update({"init_from": kind.base, "every_steps": 50})
    sources = {"tasks": f"jsonl:{folder}/data/examples.jsonl", "people": f"jsonl:{folder}/data/people.jsonl"}
    config.data.update({"source": "", "tokenizer": f"{kind.base}/tokenizer", "extra_ids": 0})
    config.data.mixture.update({"sources": sources, "rates": {"tasks": 0.8, "people": 0.2}, "counts": "tokens"})
    if kind.chat:
        config.data.fields.messages = "messages"
        config.data.chat.update({"template": "plain", "train_on": "assistant"})
        config.data.update({"length": 256, "batch_size": 8})
    else:
        config.data.fields.update({"text": "", "inputs": "inputs", "targets": "targets"})
        config.data.update({"features": "source_target", "encoder_length": 192, "length": 96, "batch_size": 8})
    config.data.update({"packing": "examples", "attend_across_documents": False})
    config.data.update({"validation": "", "validation_stride": 0})
    config.optim.update({"name": "muon", "learning_rate": 5e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "linear", "warmup_steps": 20})
    config.loop.update({"steps": 450, "log_every_steps": 10})
    config.evaluate.every_steps = 0
    config.telemetry.update({"measure_cpu_peak": False, "tensorboard": False})
    return config
