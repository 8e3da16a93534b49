"""Llama 3.1 8B on rows of 131,072 tokens, on 64 TPU v5p chips: 8 chips share a row, 8 rows a batch.

    t5x_like plan --config=configs/pretrain/llama3_8b_128k.py --topology=v5p:4x4x4
    t5x_like train --config=configs/pretrain/llama3_8b_128k.py --workdir=gs://BUCKET/llama3_8b_128k \\
        --config.data.source=jsonl:gs://BUCKET/long/*.jsonl --config.data.tokenizer=TOKENIZER \\
        --config.checkpoint.init_from=gs://BUCKET/llama3_8b
The RoPE scaling is that of Llama 3.1 (arXiv 2407.21783, section 3.4.2 on training with long rows). A document sees
itself alone, which that paper found to matter in long rows. As many tokens a batch as llama3_8b.py, 1,048,576.
Hardware: v5p-128 (64 chips), fp32 master weights, bf16 compute; attention is not computed again.
"""

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    config.model.update({"size": "3_1_8b", "remat": "context"})
    config.data.update({"batch_size": 8, "length": 131_072, "attend_across_documents": False})
    # A row lies on 8 chips, which all hold the same eighth of the parameters. Parts on all 64 chips, by the rule
    # embed=fsdp+sequence, would take 17 GiB less and, by the plan, as much time (docs/log.md).
    config.mesh.update({"preset": "fsdp", "sequence": 8})
    config.optim.learning_rate = 3e-5
    config.loop.steps = 1000
    config.optim.schedule.warmup_steps = 100
    config.evaluate.every_steps = 100
    config.checkpoint.every_steps = 100
    return config
