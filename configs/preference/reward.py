"""A reward model of one million parameters, from 1,156 pairs of dialogues that people judged (386 more held out).

    make train
    t5x_like train --config=configs/preference/reward.py --workdir=runs/reward
Hardware: 2 CPU cores, 190 s of CPU time. Expected: 0.57 of the held-out pairs judged as people did (docs/log.md).

The pairs are the test set of hh-rlhf (harmless-base; MIT licence): two answers to the same dialogue, the chosen one
less harmful. A model that has read Shakespeare alone cannot judge harm; what it can find is the manner of an answer.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.pretrain import tiny


def get_config(base: str = "runs/tiny") -> ConfigDict:
    """`base`: the workdir of a run of configs/pretrain/tiny.py."""
    config = tiny.get_config()
    config.checkpoint.init_from = base
    config.model.scalar_heads = ("reward",)
    config.objective.name = "reward"
    config.data.update({"source": f"jsonl:{common.bundled('preferences/harmless.jsonl.gz')}"})
    config.data.update({"tokenizer": f"{base}/tokenizer", "features": "pair_texts", "packing": "single"})
    config.data.fields.update({"text": "", "chosen": "chosen", "rejected": "rejected"})
    config.data.update({"on_bad_record": "skip", "attend_across_documents": False})
    config.data.update({"validation": "0.25", "validation_stride": 0, "length": 256, "batch_size": 16})
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "cosine", "warmup_steps": 10})
    config.loop.update({"steps": 150, "log_every_steps": 10})
    config.evaluate.every_steps = 50
    config.checkpoint.every_steps = 150
    return config
