"""A T5 from scratch by span corruption on the works of Shakespeare (1.1 MB), tokenizer included.

    t5x_like train --config=configs/pretrain/t5_tiny.py --workdir=runs/t5_tiny
    t5x_like generate runs/t5_tiny --prompt="To be, or <extra_id_0> that is the question." --temperature=0
Hardware: 2 CPU cores, 3 minutes. Expected: a held-out loss of 3.63, accuracy 0.28 (docs/log.md).
"""

from ml_collections import ConfigDict

from t5x_like.configs import common


def get_config() -> ConfigDict:
    config = common.config()
    config.model.update({"family": "t5", "size": "tiny", "vocab_size": 612, "scan": False})
    config.data.update({"source": f"text:{common.bundled('tinyshakespeare/input.txt')}", "tokenizer": "train:bpe:512"})
    # The last ids of the vocabulary stand for the spans that are cut out.
    config.data.update({"extra_ids": 100, "features": "span_corruption", "encoder_length": 128, "length": 29})
    config.data.update({"validation": "0.1", "batch_size": 16})
    config.optim.update({"name": "muon", "learning_rate": 5e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "linear", "warmup_steps": 20})
    config.loop.update({"steps": 700, "log_every_steps": 10})
    config.evaluate.every_steps = 350
    config.checkpoint.every_steps = 350
    return config
