"""T5 1.1 XXL (11B) from scratch by span corruption on 64 TPU v5p chips, FSDP.

    t5x_like plan --config=configs/pretrain/t5_xxl.py --topology=v5p:4x4x4
    t5x_like train --config=configs/pretrain/t5_xxl.py --workdir=gs://BUCKET/t5_xxl \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=spiece.model
Hardware: v5p-128 (64 chips). Global batch 512 x (512 source + 128 target tokens), fp32 master weights, bf16 compute;
no matrix product is computed again (15 of 95 GiB). The tokenizer is T5's: 32,000 pieces and the 100 sentinels behind
them.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common


def get_config() -> ConfigDict:
    config = common.config()
    config.model.update({"family": "t5", "size": "1_1_xxl", "remat": "products"})
    config.data.update({"source": "jsonl:REPLACE/*.jsonl", "tokenizer": "REPLACE/spiece.model", "extra_ids": 100})
    # Spans of 512 tokens need 114 target tokens; kernels of a TPU want a multiple of 128.
    config.data.update({"features": "span_corruption", "encoder_length": 512, "length": 128})
    config.data.update({"validation": "0.001", "validation_batches": 16, "batch_size": 512})
    config.mesh.preset = "fsdp"
    config.runtime.compiler_options.tpu = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    # As T5 was trained (arXiv 1910.10683, section 3.1.2): Adafactor, relative to the size of each weight, at 0.01 for
    # 10,000 steps, then falling as 1 / sqrt(step).
    config.optim.update({"name": "adafactor", "learning_rate": 1e-2, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optim.adafactor.min_scale = 1e-3
    config.optim.schedule.update({"name": "rsqrt", "warmup_steps": 0})
    config.optim.schedule.rsqrt.timescale = 10_000
    config.loop.update({"steps": 1_000_000, "log_every_steps": 10, "on_spike": "skip"})
    config.evaluate.every_steps = 1000
    config.checkpoint.every_steps = 1000
    return config
