"""A task that can be verified: spell a word backwards. GRPO from a start that does it now and then.

The start has learned from demonstrations of which every other one is wrong: it repeats the word as it is. So it can do
both, and nothing but the reward tells it which is wanted.

    python -m configs.rl.reverse runs/reverse.jsonl                                   20,000 examples, for the start
    t5x_like train --config=configs/rl/reverse_start.py:runs/reverse.jsonl --workdir=runs/reverse_start
    t5x_like rl --config=configs/rl/reverse.py:runs/reverse_start --workdir=runs/reverse
Hardware: 2 CPU cores, a minute. Expected: 98% of held-out words after 100 updates, from 30% (docs/log.md).
"""

import json
import random
import sys

from ml_collections import ConfigDict

from t5x_like.configs import common

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 3, 5


def word(seed: int, index: int) -> tuple[str, str]:
    """(a word of random letters and what asks for it, the word backwards)."""
    chance = random.Random(f"{seed}/{index}")
    letters = "".join(chance.choice(LETTERS) for _ in range(chance.randint(SHORTEST, LONGEST)))
    return f"{letters}>", letters[::-1]


def get_config(start: str = "runs/reverse_start") -> ConfigDict:
    """`start`: the model that the policy begins with, of configs/rl/reverse_start.py."""
    config = common.rl_config()
    config.model.update({"family": "llama", "size": "custom", "vocab_size": 259, "width": 64, "max_length": 64})
    config.model.decoder.update({"layers": 2, "heads": 4, "kv_heads": 4, "head_size": 16, "mlp": 128})
    config.checkpoint.init_from = start
    config.data.fields.update({"inputs": "", "targets": ""})
    config.data.update({"tokenizer": "bytes", "batch_size": 128, "length": LONGEST + 10})
    config.rl.update({"prompts": 32, "samples": 8, "new_tokens": LONGEST + 2, "generate": word, "held_out": 256})
    config.rl.rewards.exact = common.reward("exact")
    config.optim.update({"learning_rate": 3e-4, "weight_decay": 0.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 10})
    config.loop.update({"steps": 100, "log_every_steps": 2})
    config.evaluate.every_steps = 20
    config.checkpoint.every_steps = 20
    config.telemetry.measure_cpu_peak = False
    return config


def write(path: str, count: int = 20_000) -> None:
    """Demonstrations for instruction tuning, every other one wrong, of a seed that `t5x_like rl` does not use."""
    with open(path, "w", encoding="ascii") as out:
        for index in range(count):
            prompt, right = word(-1, index)
            out.write(json.dumps({"inputs": prompt, "targets": right if index % 2 else right[::-1]}) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
