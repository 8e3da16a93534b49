"""Llama 3.1 405B from scratch on 1,024 TPU v5p chips, FSDP.

    t5x_like plan --config=configs/pretrain/llama3_405b.py --topology=v5p:8x8x16
    t5x_like train --config=configs/pretrain/llama3_405b.py --workdir=gs://BUCKET/llama3_405b \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=TOKENIZER
Hardware: v5p-2048 (1,024 chips). Global batch 1024 x 4096 tokens, fp32 master weights, bf16 compute, full remat.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common


def get_config() -> ConfigDict:
    config = common.config()
    config.model.update({"family": "llama", "size": "3_1_405b", "remat": "full"})
    config.data.update({"source": "jsonl:REPLACE/*.jsonl", "tokenizer": "REPLACE/tokenizer.json"})
    config.data.update({"validation": "0.001", "validation_batches": 16, "batch_size": 1024, "length": 4096})
    config.data.attend_across_documents = True
    config.mesh.preset = "fsdp"
    config.runtime.compiler_options.tpu = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    config.optim.update({"name": "adamw", "learning_rate": 8e-5, "weight_decay": 0.1})
    config.optim.schedule.update({"name": "cosine", "warmup_steps": 2000})
    config.loop.update({"steps": 100_000, "log_every_steps": 10, "on_spike": "skip"})
    config.evaluate.every_steps = 1000
    config.checkpoint.every_steps = 1000
    return config
