"""Teaches the T5 of configs/pretrain/t5_tiny.py to answer: every turn of the assistant in 457 conversations that people
wrote is the target of what was said before (1 conversation in 10 held out).

    t5x_like train --config=configs/pretrain/t5_tiny.py --workdir=runs/t5_tiny
    t5x_like train --config=configs/instruct/chat_t5_tiny.py --workdir=runs/instruct_t5_tiny
    t5x_like generate runs/instruct_t5_tiny --chat --prompt="Give me a list of fruits." --temperature=0
Hardware: 2 CPU cores, 2 minutes beside other work. Expected: the held-out loss of the assistant's first answers falls
from 5.34 to 4.00 a token, by 1.34 [0.93, 1.75] (43 conversations; docs/log.md).
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.instruct.chat_tiny import SETS
from t5x_like.configs.pretrain import t5_tiny


def get_config(base: str = "runs/t5_tiny") -> ConfigDict:
    """`base`: the workdir of a run of configs/pretrain/t5_tiny.py."""
    config = t5_tiny.get_config()
    config.checkpoint.init_from = base
    sources = {name: f"jsonl:{common.bundled(f'instructions/{name}.jsonl')}" for name in SETS}
    config.data.update({"source": "", "tokenizer": f"{base}/tokenizer", "extra_ids": 0})
    config.data.mixture.update({"sources": sources, "maximum": 200.0, "temperature": 2.0})
    config.data.fields.messages = "messages"
    config.data.chat.update({"template": "t5", "train_on": "assistant"})
    config.data.update({"features": "source_target", "packing": "examples", "batch_size": 8})
    config.data.update({"encoder_length": 256, "length": 256, "validation": "0.1"})
    config.optim.update({"name": "muon", "learning_rate": 2e-3, "weight_decay": 0.1})
    config.loop.update({"steps": 100, "log_every_steps": 10})
    config.evaluate.every_steps = 50
    config.checkpoint.every_steps = 50
    return config
