"""Teaches the model of configs/pretrain/tiny.py to answer: 457 conversations that people wrote (1 in 10 held out).

    make train
    t5x_like train --config=configs/instruct/chat_tiny.py --workdir=runs/instruct_tiny
    t5x_like generate runs/instruct_tiny --chat --prompt="Give me a list of fruits." --temperature=0
Hardware: 2 CPU cores, 3 minutes beside other work. Expected: the held-out loss of the assistant's words falls from 5.19
to 3.55 (self_instruct) and from 4.66 to 3.17 (oasst): docs/log.md.

A model of one million parameters that has read nothing but Shakespeare learns the form of an answer, its language and
its end; it does not learn to be right.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.pretrain import tiny

SETS = ("self_instruct", "oasst")


def get_config(base: str = "runs/tiny") -> ConfigDict:
    """`base`: the workdir of a run of configs/pretrain/tiny.py."""
    config = tiny.get_config()
    config.checkpoint.init_from = base
    sources = {name: f"jsonl:{common.bundled(f'instructions/{name}.jsonl')}" for name in SETS}
    config.data.update({"source": "", "tokenizer": f"{base}/tokenizer"})
    config.data.mixture.update({"sources": sources, "maximum": 200.0, "temperature": 2.0})
    config.data.fields.messages = "messages"
    config.data.chat.update({"template": "plain", "train_on": "assistant"})
    config.data.update({"packing": "examples", "length": 512, "batch_size": 8, "attend_across_documents": False})
    config.data.update({"validation": "0.1", "validation_stride": 0})
    config.optim.update({"name": "muon", "learning_rate": 2e-3, "weight_decay": 0.1})
    config.loop.update({"steps": 100, "log_every_steps": 10})
    config.evaluate.every_steps = 50
    config.checkpoint.every_steps = 100
    return config
