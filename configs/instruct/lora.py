"""The task of configs/instruct/chat_tiny.py learned by an adapter: LoRA on the model of configs/pretrain/tiny.py.

    make train
    t5x_like train --config=configs/instruct/lora.py --workdir=runs/lora_tiny
    t5x_like generate runs/lora_tiny --chat --prompt="Give me a list of fruits." --temperature=0
    t5x_like convert runs/lora_tiny out/lora_tiny
Hardware: 2 CPU cores, about 84 s of CPU time. Expected: 2.73 (oasst) and 3.15 (self_instruct) bits per held-out byte of
answers (docs/log.md).
"""

from ml_collections import ConfigDict

from t5x_like.configs.instruct import chat_tiny


def get_config(base: str = "runs/tiny") -> ConfigDict:
    """`base`: the workdir of a run of configs/pretrain/tiny.py."""
    config = chat_tiny.get_config(base)
    config.adapter.name = "lora"
    config.adapter.lora.update({"rank": 8, "alpha": 16.0})
    config.checkpoint.holds = "trained"
    config.optim.update({"name": "adamw", "learning_rate": 5e-3, "weight_decay": 0.0})
    return config
