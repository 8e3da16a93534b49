"""Half an hour on a laptop: a 6M Llama on 25 MB of novels, textbooks, proposals and speeches in English.

    t5x_like train --config=configs/pretrain/small.py:FOLDER --workdir=runs/small
FOLDER holds one subfolder a source, named as in SOURCES; any text of yours does as well.
Hardware: 2 CPU cores, about 30 minutes. Curve and figures of a run: docs/log.md.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common

# Subfolder -> kind and pattern; rates follow the number of tokens, so that every text is read once an epoch.
SOURCES = {
    "english_novels": "text:*_*.txt",
    "tinyshakespeare": "text:input.txt",
    "ethereum_eips": "jsonl:*.jsonl",
    "python_peps": "jsonl:*.jsonl",
    "rust_rfcs": "jsonl:*.jsonl",
    "openstax_philosophy": "jsonl:*.jsonl",
    "openstax_psychology": "jsonl:*.jsonl",
    "inaugural": "jsonl:*.jsonl",
}


def get_config(folder: str = "data/pretrain") -> ConfigDict:
    config = common.config()
    # Layers one by one: on a CPU a step takes two thirds of the time that scanned layers take.
    config.model.update({"family": "llama", "size": "small", "scan": False})
    for name, source in SOURCES.items():
        kind, _, pattern = source.partition(":")
        config.data.mixture.sources[name] = f"{kind}:{folder}/{name}/{pattern}"
    config.data.mixture.counts = "tokens"
    config.data.update({"tokenizer": "train:bpe:4096", "validation": "0.02", "validation_batches": 8})
    config.data.update({"batch_size": 16, "length": 256})
    config.optim.update({"name": "muon", "learning_rate": 3e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "warmup_stable_decay", "warmup_steps": 50})
    config.loop.update({"steps": 1200, "log_every_steps": 10})
    config.evaluate.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
