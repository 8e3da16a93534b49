"""LoRA of Llama 3 8B on 64 TPU v5p chips, FSDP: every matrix of the layers at rank 16, the base frozen in bfloat16.

    t5x_like plan --config=configs/instruct/llama3_8b_lora.py --topology=v5p:4x4x4
    t5x_like train --config=configs/instruct/llama3_8b_lora.py --workdir=gs://BUCKET/llama3_8b_lora \\
        --config.checkpoint.init_from=gs://BUCKET/llama3_8b/checkpoints/100000 \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=TOKENIZER
Hardware: v5p-128 (64 chips). Global batch 256 x 4096 tokens as configs/pretrain/llama3_8b.py, full remat.
"""

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    config.model.remat = "full"
    config.model.dtype.params = "bfloat16"  # of the base; the adapter is float32 whatever stands here
    config.adapter.name = "lora"
    config.adapter.lora.update({"rank": 16, "alpha": 32.0})
    config.checkpoint.update({"init_from": "REPLACE/llama3_8b", "holds": "trained"})
    config.optim.update({"learning_rate": 2e-4, "weight_decay": 0.0})
    config.optim.schedule.warmup_steps = 100
    config.loop.steps = 2000
    return config
