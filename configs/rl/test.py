"""The smallest reinforcement learning that does everything: answers shall repeat the letter of the prompt. For tests.

    t5x_like rl --config=configs/rl/test.py --workdir=/tmp/run
Hardware: one CPU core, some seconds. Expected: the reward rises from about 0.004 (chance) in 40 updates.
"""

import random

from ml_collections import ConfigDict

from t5x_like.configs import common


def letter(seed: int, index: int) -> tuple[str, str]:
    chosen = random.Random(f"{seed}/{index}").choice("abcd")
    return f"{chosen}=", chosen


def share(prompt: str, answer: str, expected: str) -> float:
    """How much of the answer is the expected letter."""
    del prompt
    return answer.count(expected) / max(len(answer), 1)


def get_config(architecture: str = "decoder") -> ConfigDict:
    """`architecture`: "decoder" or "t5"."""
    config = common.rl_config()
    config.model.update({"family": "llama", "size": "custom", "vocab_size": 259, "width": 32, "max_length": 128})
    config.model.decoder.update({"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp": 64})
    config.model.head.tied = True
    if architecture == "t5":
        config.model.family = "t5"
        config.model.decoder.update({"kv_heads": 4})
        config.model.encoder.update({"layers": 2, "heads": 4, "kv_heads": 4, "head_size": 8, "mlp": 64})
        config.data.update({"encoder_length": 4, "length": 6})
    else:
        config.data.length = 8
    config.data.update({"tokenizer": "bytes", "batch_size": 8})
    config.data.fields.update({"inputs": "", "targets": ""})
    config.rl.update({"prompts": 4, "samples": 4, "new_tokens": 6, "generate": letter, "held_out": 4})
    config.rl.rewards.share = common.reward("function", function=share)
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 0.0})
    config.optim.schedule.warmup_steps = 4
    config.loop.update({"steps": 40, "log_every_steps": 1})
    config.evaluate.every_steps = 20
    config.checkpoint.every_steps = 10
    config.telemetry.update({"measure_cpu_peak": False, "plot": False})
    return config
