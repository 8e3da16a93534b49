"""The smallest run that does everything: for tests and for tools/compare_losses. Not a model of anything.

    t5x_like train --config=configs/pretrain/test.py --workdir=/tmp/run
Hardware: one CPU core, a few seconds. Expected: the loss falls from about 5.6 to below 4 in 40 steps.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common


def get_config() -> ConfigDict:
    config = common.config()
    config.model.update({"family": "llama", "size": "custom", "vocab_size": 259, "width": 32, "max_length": 128})
    config.model.decoder.update({"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp": 64})
    config.model.head.tied = True
    config.data.update({"source": f"text:{common.bundled('tinyshakespeare/input.txt')}", "tokenizer": "bytes"})
    config.data.update({"validation": "0.01", "validation_batches": 2, "batch_size": 8, "length": 32})
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 0.0})
    config.optim.schedule.warmup_steps = 4
    config.loop.update({"steps": 40, "log_every_steps": 1})
    config.evaluate.every_steps = 10
    config.checkpoint.every_steps = 10
    config.telemetry.update({"measure_cpu_peak": False, "plot": False})
    return config
