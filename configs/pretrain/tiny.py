"""The first run: a Llama-style decoder on the works of Shakespeare (1.1 MB), tokenizer included.

    make train
Hardware: 2 CPU cores, about 3 minutes. Expected: at most 2.40 bits per byte on the last tenth of the text.

    python -m launch.sweep --config=tiny --config.loop.steps=60 --workdir=runs/rates
"""

from ml_collections import ConfigDict

from t5x_like.configs import common


def get_config() -> ConfigDict:
    config = common.config()
    config.model.update({"family": "llama", "size": "custom", "vocab_size": 512, "width": 128, "max_length": 512})
    config.model.decoder.update({"layers": 4, "heads": 4, "kv_heads": 4, "head_size": 32, "mlp": 352})
    config.model.head.tied = True
    config.data.update({"source": f"text:{common.bundled('tinyshakespeare/input.txt')}", "tokenizer": "train:bpe:512"})
    # Half of each held-out row is context that another row has scored already.
    config.data.update({"validation": "0.1", "validation_stride": 128, "batch_size": 8, "length": 256})
    config.data.attend_across_documents = True  # it is one text
    config.optim.update({"name": "muon", "learning_rate": 5e-3, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "linear", "warmup_steps": 20})
    config.loop.update({"steps": 600, "log_every_steps": 10})
    config.evaluate.every_steps = 300
    config.checkpoint.every_steps = 300
    return config


def sweep(add):
    """Learning rates and seeds; docs/log.md has what came of them."""
    from launch.sweeps import points

    rates = points.values("config.optim.learning_rate", [1e-3, 3e-3, 1e-2, 3e-2])
    add(*points.product(rates, points.seeds(2)))
